"""From a study file to the list of runs it asks for: one keyed run for each arm and seed."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.config_io import config_from_dict, config_to_dict

KEY_LENGTH = 16
"""Hexadecimal digits of a cell's key (64 bits: no accidental collision among any number of runs one can pay for)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting under comparison."""

    name: str
    """Short name, used in files and commands."""
    label: str
    """Name in tables and plots."""
    overrides: dict[str, Any]
    """What differs from the study's base configuration, as a nested mapping."""
    reference: bool = False
    """The arm that the others are measured against (at most one)."""


@dataclass(frozen=True, kw_only=True)
class RepeatDistributed:
    """The one cell that is repeated under real processes, to check the emulation of logical GPUs."""

    arm: str
    seed: int
    processes: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the arms that answer it, and the seeds each arm is run with."""

    name: str
    title: str
    question: str
    base: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    repeat_distributed: RepeatDistributed | None = None

    @property
    def reference(self) -> Arm | None:
        """The reference arm, if the study names one."""
        return next((arm for arm in self.arms if arm.reference), None)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study: an arm with a seed, resolved into a full run configuration."""

    arm: str
    seed: int
    config: RunConfig
    key: str
    """Hash of ``config``: an unchanged cell keeps its key and is not run again, a changed one is a new cell."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own rule for a key given twice is that the last one wins; here that would drop an arm without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [child.value for child, _ in node.value if isinstance(child, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_study(path_or_name: str | Path) -> Study:
    """Read a study file.

    Args:
        path_or_name: a YAML file, or the name of a study that comes with the package (see :func:`available_studies`).

    Raises:
        ConfigError: no such study, or the file is malformed; the message names the file, the key and what was expected.
    """
    path = _find_study(str(path_or_name))
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), re.sub(r"\s+", " ", str(error)), "a YAML file") from None
    return study_from_dict(content, str(path))


def available_studies() -> list[str]:
    """Names of the studies that come with the package, sorted."""
    return sorted({path.stem for folder in _study_folders() for path in folder.glob("*.yaml")})


def study_from_dict(content: object, source: str = "study") -> Study:
    """Build a study from the content of its file.

    Args:
        content: the parsed file; see ``configs/study/quickstart.yaml`` for the keys.
        source: what error messages call the file.

    Raises:
        ConfigError: a key is missing, unknown or of the wrong type, or a cell's configuration is impossible.
    """
    required = ("name", "title", "question", "base", "arms", "seeds")
    data = _mapping(content, source, required, optional=("repeat_distributed",))
    arms = _mapping(data["arms"], f"{source}: arms")
    seeds = data["seeds"]
    _require(bool(arms), f"{source}: arms", arms, "at least one arm")
    seeds_ok = isinstance(seeds, list) and bool(seeds) and all(type(s) is int for s in seeds)
    _require(seeds_ok and len(set(seeds)) == len(seeds), f"{source}: seeds", seeds, "a list of different integers")
    study = Study(
        name=_text(data["name"], f"{source}: name"),
        title=_text(data["title"], f"{source}: title"),
        question=_text(data["question"], f"{source}: question"),
        base=_mapping(data["base"], f"{source}: base"),
        arms=tuple(_arm(name, arm, source) for name, arm in arms.items()),
        seeds=tuple(seeds),
        repeat_distributed=_repeat(data.get("repeat_distributed"), source),
    )
    references = [arm.name for arm in study.arms if arm.reference]
    _require(len(references) <= 1, f"{source}: arms", references, "at most one arm with `reference: true`")
    _check_repeat(study, study_cells(study, source), source)
    return study


def study_cells(study: Study, source: str | None = None) -> list[Cell]:
    """The runs of a study, arm by arm within each seed, so that a study cut short has compared all arms on some seeds.

    Seeds are paired: a cell's seed is its run's seed, so all arms of one seed share initial weights, data order and
    augmentation as far as their configurations allow.

    Raises:
        ConfigError: an arm's configuration is impossible; the message names the arm and the key.
    """
    return [_cell(study, arm, seed, source or study.name) for seed in study.seeds for arm in study.arms]


def cell_key(config: RunConfig) -> str:
    """Hash of a resolved run configuration: ``KEY_LENGTH`` hexadecimal digits of the sha256 of its canonical JSON."""
    content = json.dumps(_canonical(config_to_dict(config)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]


def _cell(study: Study, arm: Arm, seed: int, source: str) -> Cell:
    merged = _merge(study.base, arm.overrides)
    if "seed" in merged:
        raise ConfigError(f"{source}: arm {arm.name}: seed", merged["seed"], "no seed here: the study's `seeds` set it")
    try:
        config = config_from_dict({**merged, "seed": seed})
    except ConfigError as error:
        raise ConfigError(f"{source}: arm {arm.name}: {error.key}", error.value, error.expected) from None
    return Cell(arm=arm.name, seed=seed, config=config, key=cell_key(config))


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides`` laid over it, section by section; neither is changed."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _canonical(value: Any) -> Any:
    """Lists for tuples, and 1 for 1.0: how a number was written in the file must not make a new cell."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _study_folders() -> Iterator[Path]:
    package = Path(str(importlib.resources.files("syncbn")))
    # An installed wheel carries the configurations inside the package; in a source checkout they lie beside it.
    for folder in (package / "configs" / "study", package.parent / "configs" / "study"):
        if folder.is_dir():
            yield folder


def _find_study(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.suffix not in (".yaml", ".yml") and path.name == path_or_name:
        for folder in _study_folders():
            if (folder / f"{path_or_name}.yaml").is_file():
                return folder / f"{path_or_name}.yaml"
    names = ", ".join(available_studies()) or "none is installed"
    raise ConfigError("study", path_or_name, f"an existing YAML file or the name of a study ({names})")


def _arm(name: object, content: object, source: str) -> Arm:
    where = f"{source}: arms.{name}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{source}: arms", name, "a name (YAML reads an unquoted no, off, 1 or null as a value)")
    data = _mapping(content, where, optional=("label", "overrides", "reference"))
    reference = data.get("reference", False)
    _require(isinstance(reference, bool), f"{where}.reference", reference, "true or false")
    return Arm(
        name=name,
        label=_text(data.get("label", name), f"{where}.label"),
        overrides=_mapping(data.get("overrides", {}), f"{where}.overrides"),
        reference=reference,
    )


def _repeat(content: object, source: str) -> RepeatDistributed | None:
    if content is None:
        return None
    where = f"{source}: repeat_distributed"
    data = _mapping(content, where, required=("arm", "seed", "processes"))
    processes = data["processes"]
    _require(type(processes) is int and processes >= 2, f"{where}.processes", processes, "2 or more")
    return RepeatDistributed(arm=data["arm"], seed=data["seed"], processes=processes)


def _check_repeat(study: Study, cells: list[Cell], source: str) -> None:
    repeat = study.repeat_distributed
    if repeat is None:
        return
    where = f"{source}: repeat_distributed"
    names = [arm.name for arm in study.arms]
    _require(repeat.arm in names, f"{where}.arm", repeat.arm, f"one of the arms ({', '.join(names)})")
    _require(repeat.seed in study.seeds, f"{where}.seed", repeat.seed, f"one of the seeds {list(study.seeds)}")
    cell = next(cell for cell in cells if (cell.arm, cell.seed) == (repeat.arm, repeat.seed))
    divisor = f"a divisor of the {cell.config.gpus} logical GPUs"
    _require(cell.config.gpus % repeat.processes == 0, f"{where}.processes", repeat.processes, divisor)


def _mapping(
    content: object, where: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[Any, Any]:
    """``content`` if it is a mapping with exactly these keys (any keys, if none are named)."""
    if not isinstance(content, dict):
        raise ConfigError(where, content, "a mapping")
    known = required + optional
    for key in content:
        _require(not known or key in known, f"{where}: key", key, f"one of {', '.join(known)}")
    for key in required:
        _require(key in content, f"{where}: keys", list(content), f"the key {key!r} too")
    return content


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(where, value, "a text")
    return value.strip()


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(key, value, expected)
