"""Reading a study's file: every mistake is one line that names the file, the key, the value and what was expected."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from syncbn.study.plan.contrasts import check_runs_differ, contrasts_from
from syncbn.study.plan.grid import (
    Arm,
    Cell,
    RepeatDistributed,
    Study,
    Sweep,
    Value,
    Vary,
    repeated_cell,
    study_cells,
)
from syncbn.study.plan.overlaps import check_overlaps
from syncbn.train.config import ConfigError
from syncbn.train.config_io import known_keys

_PROCESSES = 2
"""Real processes under which a study repeats one cell, where its file does not say."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own rule for a key given twice is that the last one wins; here that would drop an arm without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As the file has it: later, the keys that `<<` brings stand beside those that replace them.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for child, _ in node.value:
            if not isinstance(child, yaml.ScalarNode) or child.tag == "tag:yaml.org,2002:merge":
                continue
            if (child.tag, child.value) in seen:
                problem = f"key {child.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, child.start_mark)
            seen.add((child.tag, child.value))
        return node


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ConfigError(str(path), re.sub(r"\s+", " ", str(error)), "a YAML file") from None
    return study_from_dict(content, str(path))


def available_studies() -> list[str]:
    """Names of the studies that come with the package, sorted."""
    return sorted({path.stem for folder in _study_folders() for path in folder.glob("*.yaml")})


def study_from_dict(content: object, source: str = "study") -> Study:
    """Build a study from the content of its file.

    Args:
        content: the parsed file; see ``configs/study/nbs_sweep.yaml`` for the keys.
        source: what error messages call the file.

    Raises:
        ConfigError: a key is missing, unknown or of the wrong type, an axis is unknown or empty, or a cell's
            configuration is impossible.
    """
    required = ("name", "title", "question", "base", "arms", "seeds")
    data = _mapping(content, source, required, optional=("sweep", "axes", "contrasts", "repeat_distributed", "notes"))
    arms = _mapping(data["arms"], f"{source}: arms")
    seeds = data["seeds"]
    _require(bool(arms), f"{source}: arms", arms, "at least one arm")
    seeds_ok = isinstance(seeds, list) and bool(seeds) and all(type(s) is int for s in seeds)
    _require(seeds_ok and len(set(seeds)) == len(seeds), f"{source}: seeds", seeds, "a list of different integers")
    _require(all(0 <= s < 2**31 for s in seeds), f"{source}: seeds", seeds, "integers from 0 to 2^31 - 1")
    sweep = _sweep(data.get("sweep"), f"{source}: sweep")
    study = Study(
        name=_text(data["name"], f"{source}: name"),
        title=_text(data["title"], f"{source}: title"),
        question=_text(data["question"], f"{source}: question"),
        base=_mapping(data["base"], f"{source}: base"),
        arms=tuple(_arm(name, arm, source) for name, arm in arms.items()),
        seeds=tuple(seeds),
        sweep=sweep,
        grid=_grid(data.get("axes"), sweep, f"{source}: axes"),
        repeat_distributed=_repeat(data.get("repeat_distributed"), source),
        notes=None if data.get("notes") is None else _text(data["notes"], f"{source}: notes"),
    )
    references = [arm.name for arm in study.arms if arm.reference]
    _require(len(references) <= 1, f"{source}: arms", references, "at most one arm with `reference: true`")
    _check_places(study, source)
    check_overlaps(study, source)
    study = replace(study, contrasts=contrasts_from(data.get("contrasts"), study, f"{source}: contrasts"))
    cells = study_cells(study, source)
    if data.get("contrasts") is not None:
        check_runs_differ(study.contrasts, cells, f"{source}: contrasts")
    if study.repeat_distributed is None:
        return _with_default_repeat(study, cells)
    _check_repeat(study, cells, source)
    return study


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


# ---- parts of the file


def _arm(name: object, content: object, source: str) -> Arm:
    where = f"{source}: arms.{name}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{source}: arms", name, "a name (YAML reads an unquoted no, off, 1 or null as a value)")
    data = _mapping(content, where, optional=("label", "overrides", "reference", "only"))
    reference = data.get("reference", False)
    _require(isinstance(reference, bool), f"{where}.reference", reference, "true or false")
    only = _mapping(data.get("only", {}), f"{where}.only")
    return Arm(
        name=name,
        label=_text(data.get("label", name), f"{where}.label"),
        overrides=_mapping(data.get("overrides", {}), f"{where}.overrides"),
        reference=reference,
        only={axis: _values(values, f"{where}.only.{axis}") for axis, values in only.items()},
    )


def _sweep(content: object, where: str) -> Sweep | None:
    if content is None:
        return None
    optional = ("kind", "vary", "global_batch_size", "hold", "steps")
    data = _mapping(content, where, required=("values",), optional=optional)
    kind, vary = data.get("kind", "decoupled"), data.get("vary", "per_gpu_batch_size")
    _require(kind in ("decoupled", "coupled"), f"{where}.kind", kind, "decoupled or coupled")
    _require(vary in get_args(Vary), f"{where}.vary", vary, f"one of {', '.join(get_args(Vary))}")
    given = _values(data["values"], f"{where}.values")
    values = tuple(value for value in given if type(value) is int and value >= 1)
    _require(len(values) == len(given), f"{where}.values", list(given), "positive integers")
    whole = data.get("global_batch_size")
    if kind == "decoupled" and vary == "per_gpu_batch_size":
        whole = _positive(whole, f"{where}.global_batch_size")
        odd = [v for v in values if whole % v]
        _require(not odd, f"{where}.values", odd, f"divisors of global_batch_size ({whole})")
    else:
        _require(whole is None, f"{where}.global_batch_size", whole, f"none with a {kind} sweep of {vary}")
    _require(kind == "decoupled" or vary == "per_gpu_batch_size", f"{where}.vary", vary, "per_gpu_batch_size (coupled)")
    hold, steps = data.get("hold", ["epochs"]), data.get("steps")
    hold = [hold] if isinstance(hold, str) else hold
    hold_ok = isinstance(hold, list) and bool(hold) and all(h in ("epochs", "steps") for h in hold)
    _require(hold_ok and len(set(hold)) == len(hold), f"{where}.hold", hold, "epochs, steps or both")
    _require(kind == "coupled" or "hold" not in data, f"{where}.hold", hold, "none with a decoupled sweep")
    if kind == "coupled" and "steps" in hold:
        _positive(steps, f"{where}.steps")
    else:
        _require(steps is None, f"{where}.steps", steps, "none unless a coupled sweep holds steps")
    return Sweep(kind=kind, vary=vary, values=values, global_batch_size=whole, hold=tuple(hold), steps=steps)


def _grid(content: object, sweep: Sweep | None, where: str) -> dict[str, tuple[Value, ...]]:
    if content is None:
        return {}
    axes = _mapping(content, where)
    known = [key for key in known_keys() if key != "seed"]
    for name in axes:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"a key of the run configuration{', such as ' + ', '.join(close) if close else ''}"
        _require(name in known, f"{where}: axis", name, hint)
        taken = sweep is not None and name == sweep.vary
        _require(not taken, f"{where}: axis", name, "an axis that the sweep does not vary already")
    return {name: _values(values, f"{where}.{name}") for name, values in axes.items()}


def _repeat(content: object, source: str) -> RepeatDistributed | None:
    if content is None:
        return None
    where = f"{source}: repeat_distributed"
    data = _mapping(content, where, required=("arm", "seed", "processes"), optional=("at",))
    processes = data["processes"]
    _require(type(processes) is int and processes >= 2, f"{where}.processes", processes, "2 or more")
    at = _place(data.get("at", {}), f"{where}.at")
    return RepeatDistributed(arm=data["arm"], seed=data["seed"], processes=processes, at=at)


# ---- what has to fit together


def _check_places(study: Study, source: str) -> None:
    axes = study.axes
    ones = {}
    if study.repeat_distributed is not None:
        ones["repeat_distributed.at"] = study.repeat_distributed.at
    places = [(f"{source}: {key}", {axis: [value] for axis, value in at.items()}) for key, at in ones.items()]
    places += [(f"{source}: arms.{arm.name}.only", {k: list(v) for k, v in arm.only.items()}) for arm in study.arms]
    for where, place in places:
        for axis, values in place.items():
            _require(axis in axes, where, axis, f"an axis of the study ({', '.join(axes) or 'it has none'})")
            missing = [value for value in values if value not in axes[axis]]
            _require(not missing, f"{where}.{axis}", missing, f"values of that axis {list(axes[axis])}")
    for arm in study.arms:
        _require(bool(study.points(arm)), f"{source}: arms.{arm.name}.only", arm.only, "a part of the grid, not none")


def _with_default_repeat(study: Study, cells: list[Cell]) -> Study:
    """Every study checks its emulation: the first cell with several logical GPUs that share or keep statistics."""
    for cell in cells:
        c = cell.config
        if c.normalization_batch_size is not None and c.gpus % _PROCESSES == 0:
            at = dict(cell.point)
            repeat = RepeatDistributed(arm=cell.arm, seed=cell.seed, processes=_PROCESSES, at=at)
            return replace(study, repeat_distributed=repeat)
    return study  # one logical GPU in every arm: there is nothing that is emulated


def _check_repeat(study: Study, cells: list[Cell], source: str) -> None:
    repeat = study.repeat_distributed
    assert repeat is not None
    where = f"{source}: repeat_distributed"
    names = [arm.name for arm in study.arms]
    _require(repeat.arm in names, f"{where}.arm", repeat.arm, f"one of the arms ({', '.join(names)})")
    _require(repeat.seed in study.seeds, f"{where}.seed", repeat.seed, f"one of the seeds {list(study.seeds)}")
    cell = repeated_cell(study, cells)
    if cell is None:
        raise ConfigError(f"{where}.at", repeat.at, "a place at which the arm is run")
    divisor = f"a divisor of the {cell.config.gpus} logical GPUs"
    _require(cell.config.gpus % repeat.processes == 0, f"{where}.processes", repeat.processes, divisor)


# ---- types


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


def _values(content: object, where: str) -> tuple[Value, ...]:
    """The values of an axis: at least one, plain and different."""
    plain = isinstance(content, list) and all(isinstance(v, int | float | str | bool | None) for v in content)
    if not isinstance(content, list) or not plain or not content:
        raise ConfigError(where, content, "a list of at least one value")
    values = tuple(map(_number, content))
    _require(len({(type(v) is bool, v) for v in values}) == len(values), where, content, "values that differ")
    return values


def _place(content: object, where: str) -> dict[str, Value]:
    return {axis: _number(value) for axis, value in _mapping(content, where).items()}


def _number(value: Any) -> Any:
    """The number that a text stands for, else the value itself: YAML takes 1e-3, without a point, for a text."""
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.ASCII | re.I):
        return value
    return int(value) if re.fullmatch(r"[-+]?\d+", value) else float(value)


def _positive(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(where, value, "a positive integer")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(where, value, "a text")
    return value.strip()


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(key, value, expected)
