"""The documentation: the site builds without a warning, its links lead somewhere, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_table import END, START, rows_in

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "recipes.md": "tests/ecosystem/test_recipes.py",
    "recipes_vision.md": "tests/ecosystem/test_recipes_vision.py",
}
"""Pages whose Python needs other frameworks or processes, with the test that runs it."""


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow  # Sphinx imports the package and renders every page
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(name, reason="the extra `docs` builds the site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    sources = [path for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")]
    assert {path.stem for path in sources} <= {page.stem for page in pages}
    fetched = re.compile(r'<(?:script|img)[^>]*\bsrc="(?:https?:)?//|<link[^>]*\bhref="(?:https?:)?//')
    assert not [page.name for page in pages if fetched.search(page.read_text())], "the site has to work offline"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    "path",
    [path for path in TEXTS if blocks(path, "python") and path.name not in ELSEWHERE],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_python_runs(path: Path, world: None) -> None:
    """The blocks of a page, one after another, for a user who has a model and batches."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    names: dict[str, object] = {"model": model, "batches": torch.randn(4, 16, 4).unbind()}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)
    assert "syncbn" in names, "no block imports syncbn"


def test_python_of_other_pages_runs_elsewhere() -> None:
    assert not [page for page, test in ELSEWHERE.items() if page not in (ROOT / test).read_text()]


def test_the_studys_file_is_one(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="a study is a YAML file")
    from syncbn.study.plan.grid import Study
    from syncbn.study.plan.study_file import load_study

    fields = set(Study.__dataclass_fields__)
    if not {"contrasts", "parity"} <= fields:
        pytest.skip("contrasts and parity are not yet keys of a study")
    whole, tune, contrasts = blocks(ROOT / "docs" / "studies.md", "yaml")
    file = tmp_path / "study.yaml"
    file.write_text(whole.replace("mnist5k}", "mnist5k, validation_fraction: 0.1}") + tune)
    assert set(load_study(file).tune.grid) == {"optimizer.lr", "norm.momentum"}
    for text, number in ((whole, 3), (whole[: whole.index("contrasts:")] + contrasts, 4)):
        file.write_text(text)
        assert len(load_study(file).contrasts) == number


@pytest.mark.slow  # it imports the files of the tests of faults
def test_the_table_of_faults_is_that_of_the_tests(tmp_path: Path) -> None:
    """The same rows; only the seconds may be those of another day."""
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.fault(" in path.read_text()]
    page, copy = (ROOT / "docs" / "faults.md").read_text(), tmp_path / "faults.md"
    copy.write_text(START + END)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "fault"]
    options = ["--write-fault-table", "--fault-page", str(copy)]
    done = subprocess.run(
        [*command, *options, *files], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout
    rows = rows_in(page)
    assert rows.keys() == rows_in(copy.read_text()).keys(), "run: make test-faults ARGS=--write-fault-table"
    assert len(rows) >= 40
    assert "not run" not in rows.values()


def test_guarantees_name_tests_that_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "guarantees.md").read_text()))
    assert len(named) > 10
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]
