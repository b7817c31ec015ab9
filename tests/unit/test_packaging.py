"""What the repository promises about itself: pinned versions, the wheel, who imports whom, sizes, words."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import syncbn
from syncbn.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "syncbn"

NEVER: dict[str, tuple[str, ...]] = {
    "functional": ("any",),
    "kernels": ("collectives", "autograd", "layers", "convert", "population", "train", "study", "bench"),
    "kernels.cpu": ("kernels.cuda",),
    "kernels.cuda": ("kernels.cpu",),
    "collectives": ("functional", "kernels", "layers", "train", "study", "bench"),
    "autograd": ("layers", "train", "study", "bench"),
    "layers": ("kernels", "convert", "convert_layer", "population", "train", "study", "bench"),
    "convert_layer": ("train", "study", "bench"),
    "convert": ("train", "study", "bench"),
    "population": ("train", "study", "bench"),
    "train": ("study", "bench", "advise", "experiments", "cli"),
    "study": ("bench", "advise", "experiments", "cli"),
    "study.plan": ("study.run", "study.analysis", "study.report"),
    "study.run": ("study.analysis", "study.report"),
    "study.analysis": ("study.run", "study.report", "matplotlib", "rich", "jinja2"),
    "study.report": ("study.run",),
    "bench": ("study", "advise", "experiments", "cli"),
    "advise": ("study", "experiments", "cli"),
    "experiments": ("bench", "cli"),
    "integrations": ("train", "study", "bench", "experiments", "cli"),
    "face": ("integrations",),
}
"""By part of the package, what it never imports, inside a function either: other parts of it (`any`: all of them), or
other packages."""
FRAMEWORKS = ("lightning", "lightning_fabric", "pytorch_lightning", "transformers")
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8

# Written as patterns, so that this file does not match itself.
REGISTRY_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org|(?:docker|ghcr|quay)\.io\b"
)
MACHINE_PATH = re.compile(r"(?<![\w.})\]-])/(?:work|root|home/\w+|Users/\w+|opt/wheels|opt/pypi)/")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(extra: str) -> list[Requirement]:
    """The requirements of an extra, with those of the extras that it names in turn."""
    found: list[Requirement] = []
    for requirement in map(Requirement, project()["optional-dependencies"][extra]):
        if requirement.name == "syncbn":
            found += [nested for name in requirement.extras for nested in requirements(name)]
        else:
            found.append(requirement)
    return found + [Requirement(text) for text in project()["dependencies"]]


# -- versions ----------------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = constraints()
    wrong = [
        f"{requirement}: pinned {pins.get(canonicalize_name(requirement.name))}"
        for extra in ("dev", "dist", "ecosystem")
        for requirement in requirements(extra)
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    ]
    assert not wrong


def test_pins_name_no_build_of_torch() -> None:
    # "2.13.0+cpu" as a pin would turn a CUDA build away.
    assert all(Version(version).local is None for version in constraints().values())


def test_pre_commit_uses_the_pinned_versions() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads .pre-commit-config.yaml")
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    pinned = {name: constraints()[name] for name in ("ruff", "mypy")}
    for hook in hooks:
        tool = hook["entry"].split()[0]
        assert hook["additional_dependencies"] == [f"{tool}=={pinned[tool]}"], hook["id"]
    assert {hook["entry"].split()[0] for hook in hooks} == set(pinned)


def test_the_workflow_covers_the_supported_pythons() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the workflow")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    supported = [text.split()[-1] for text in project()["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == supported
    steps = [step for job in ("lint", "test", "ecosystem", "docs") for step in jobs[job]["steps"]]
    assert {step["run"] for step in steps if "run" in step} == {
        "make lint",
        "make test",
        "make test-ecosystem",
        "make docs",
    }
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == project()["license"]


def test_make_test_runs_every_folder_but_those_with_a_target_of_their_own() -> None:
    paths = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    folders = {relative(path.parent) for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders == {*paths, "tests/cluster", "tests/ecosystem"}


# -- the wheel ---------------------------------------------------------------------------------------------------------


def built(kind: str, source: Path, folder: Path, **environment: str) -> Path:
    """An sdist or a wheel, built offline."""
    build = "import sys, hatchling.build as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-c", build, kind, str(folder)]
    done = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,  # it compiles, on a machine that does other things too
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel is built by hatchling")
    folder = tmp_path_factory.mktemp("build")
    sdist = built("sdist", ROOT, folder)
    shutil.unpack_archive(sdist, folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built, offline, from an sdist that is built from this tree."""
    return built("wheel", unpacked_sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


@pytest.mark.slow  # it compiles the kernels
def test_wheel_has_the_compiled_kernels(wheel: Path, wheel_names: list[str]) -> None:
    """For every Python and torch on this platform, and with the sources whose digest is in their names."""
    names = {f"syncbn/kernels/cpu/{build.library(kind).name}" for kind in build.kinds()}
    names |= {relative(path) for path in build.sources()}
    assert names <= set(wheel_names)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"syncbn-{syncbn.__version__}-py3-none-{platform}.whl"


def test_a_wheel_without_a_compiler(unpacked_sdist: Path, tmp_path: Path) -> None:
    source = shutil.copytree(unpacked_sdist, tmp_path / "source", ignore=shutil.ignore_patterns("*.so"))
    for compiler in ("false", "no-such-compiler", 'g++ "'):
        wheel = built("wheel", source, tmp_path, CXX=compiler)
        assert wheel.name == f"syncbn-{syncbn.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as opened:
            assert not [name for name in opened.namelist() if name.endswith(".so")]


@pytest.mark.slow  # the wheel is built first
def test_wheel_has_all_sources_and_the_type_marker(wheel_names: list[str]) -> None:
    assert {"syncbn/py.typed", *map(relative, python_files("syncbn"))} <= set(wheel_names)


@pytest.mark.slow  # the wheel is built first
def test_wheel_has_the_configs(wheel_names: list[str]) -> None:
    expected = {f"syncbn/{relative(path)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert expected
    assert expected <= set(wheel_names)


@pytest.mark.slow  # the wheel is built first
def test_wheel_has_nothing_else(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"syncbn", f"syncbn-{syncbn.__version__}.dist-info"}
    assert not [name for name in wheel_names if "test" in name.split("/")[1] or name.endswith(".pyc")]


def test_every_config_is_valid_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the configs")
    kinds = ("study", "experiments", "bench")
    results = {ROOT / "configs" / kind / "results" for kind in kinds}  # kept reports, no part of the wheel
    files = [path for path in (ROOT / "configs").rglob("*") if path.is_file() and results.isdisjoint(path.parents)]
    assert files
    for path in files:
        assert path.suffix == ".yaml", f"{relative(path)}: only .yaml files belong here"
        assert isinstance(yaml.safe_load(path.read_text()), dict), relative(path)


@pytest.mark.parametrize("source", [None, "https://example.org/syncbn"])
def test_the_page_of_a_package_index_has_no_dead_links(source: str | None) -> None:
    pytest.importorskip("hatchling", reason="the page is written by a hook of hatchling")
    hooks = runpy.run_path(str(ROOT / "hatch_build.py"))
    metadata = {"urls": {"Source": source}} if source else {}
    hooks["IndexPage"](str(ROOT), {}).update(metadata)
    text = metadata["readme"]["text"]
    assert not hooks["LINK"].search(text)
    links = re.findall(r"\]\((\S+?)\)", text)
    assert bool(links) == bool(source)
    for link in links:
        path = re.fullmatch(rf"{source}/(raw|blob)/HEAD/(.+)", link)
        assert path is not None, link
        assert (ROOT / path[2]).exists(), link
    assert ("*Figure: Test error of five" in text) == (source is None)


# -- imports -----------------------------------------------------------------------------------------------------------

TORCH_ALONE = '''
import sys

blocked = set(sys.argv[1].split(","))

class Without:
    """A finder to which the blocked modules are not installed; a finder that raises would also break find_spec."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, *where)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
import syncbn

model = torch.nn.Sequential(syncbn.SyncBatchNorm(3), syncbn.GhostBatchNorm(3, 2), syncbn.BatchRenorm(3))
model(torch.arange(12.0).reshape(4, 3)).sum().backward()
'''


def required_by(distribution: str, found: set[str]) -> set[str]:
    """A distribution and all that it requires, without extras."""
    if distribution not in found:
        found.add(distribution)
        for requirement in map(Requirement, importlib.metadata.requires(distribution) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required_by(canonicalize_name(requirement.name), found)
    return found


@pytest.mark.slow  # it imports torch under a finder that looks at every import
def test_the_layers_need_torch_alone() -> None:
    allowed = {"syncbn", *required_by("torch", set())}
    modules = importlib.metadata.packages_distributions().items()
    blocked = {name for name, owners in modules if allowed.isdisjoint(map(canonicalize_name, owners))}
    assert blocked >= {"numpy", "torchvision", "pytest"}
    command = [sys.executable, "-W", "ignore", "-c", TORCH_ALONE, ",".join(sorted(blocked))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names under `syncbn` that a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(place: str, part: str) -> bool:
    return place == part or place.startswith(f"{part}.")


def place_of(module: str) -> str:
    """Where an imported name lies: `syncbn.study.run.records` -> `study.run.records`; `syncbn` and the names that it
    defines itself -> `face`; another package's name stays."""
    package, _, name = module.partition(".")
    top = name.partition(".")[0]
    if package != "syncbn":
        return module
    return name if top and ((PACKAGE / top).is_dir() or (PACKAGE / f"{top}.py").is_file()) else "face"


def imports() -> Iterator[tuple[Path, str, str, bool]]:
    """Each import of the package: the file, its place, the place that it imports, and whether that is ours."""
    for path in python_files("syncbn"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        importer = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "face"
        for module in imported_modules(path):
            yield path, importer, place_of(module), within(module, "syncbn")


def test_no_part_imports_what_it_never_should() -> None:
    found = set()
    for path, importer, imported, ours in imports():
        for part, never in NEVER.items():
            if within(importer, part) and not within(imported, part):
                hits = [name for name in never if within(imported, name) or (name == "any" and ours)]
                found |= {(relative(path), name) for name in hits}
    assert not found


def test_frameworks_are_imported_by_their_integration_alone() -> None:
    found = {(importer, imported.partition(".")[0]) for _, importer, imported, ours in imports() if not ours}
    within_them = ("integrations", "named_model")  # the second makes a model that the user names
    outside = {
        (part, name) for part, name in found if name in FRAMEWORKS and not any(within(part, i) for i in within_them)
    }
    assert not outside


def test_parts_import_each_other_in_one_direction() -> None:
    """There is an order of the parts in which each imports only what stands below it."""
    graph: dict[str, set[str]] = {}
    for _, importer, imported, ours in imports():
        if ours and room(importer) != room(imported):
            graph.setdefault(room(importer), set()).add(room(imported))
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("functional") < order.index("layers") < order.index("face") < order.index("cli")


def room(place: str) -> str:
    """`train.data.cache` -> `train`, but `study.plan.grid` -> `study.plan`."""
    parts = place.split(".")
    in_study = parts[0] == "study" and len(parts) > 1 and (PACKAGE / "study" / parts[1]).is_dir()
    return ".".join(parts[:2]) if in_study else parts[0]


# -- sizes and words ---------------------------------------------------------------------------------------------------


def functions(*folders: str) -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in python_files(*folders):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_functions_are_small() -> None:
    wrong = []
    for path, node in functions("syncbn", "tests", "docs", "examples"):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            wrong.append(f"{relative(path)}:{node.lineno} {node.name}: {length} lines")
    assert not wrong


def test_functions_have_few_parameters() -> None:
    """Triton's kernels and the constructors of the layers are the exception."""
    wrong = []
    for path, node in functions("syncbn"):
        names = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        number = len([name for name in names if name.arg not in ("self", "cls", "ctx")])
        is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
        is_layer = node.name == "__init__" and path.name == "layers.py"
        if number > MAX_PARAMETERS and not is_kernel and not is_layer:
            wrong.append(f"{relative(path)}:{node.lineno} {node.name}: {number} parameters")
    assert not wrong


def repository_files() -> list[Path]:
    """Files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.mark.parametrize("pattern", [REGISTRY_HOST, MACHINE_PATH], ids=["registry_host", "machine_path"])
def test_no_file_names(pattern: re.Pattern[str]) -> None:
    found = [
        f"{relative(path)}: {match.group()}"
        for path in repository_files()
        if (match := pattern.search(path.read_text(errors="ignore")))
    ]
    assert not found
