"""Reading a study's YAML file. Every mistake is one line that names the file, the key, the value and what to write."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from syncbn.study.plan.contrasts import check_runs_differ, contrasts_from
from syncbn.study.plan.grid import Arm, Cell, Parity, Study, Sweep, Value, Vary, parity_cell, study_cells
from syncbn.study.plan.overlaps import check_overlaps
from syncbn.train.config import ConfigError, known_keys, require


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that rejects a key given twice; YAML keeps the last one, which would drop an arm silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before `<<` is resolved: a key may be given beside a merged one of the same name.
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
    """Read a study from its YAML file.

    Args:
        path_or_name: path of a YAML file, or the name of a study that comes with the package.

    Returns:
        The study. Each of its cells has a possible configuration.

    Raises:
        ValueError: there is no such study, or its file has a mistake; the message names the file, the key, the value
            and what was expected.

    Example:
        >>> from syncbn.study import load_study
        >>> study = load_study("quickstart")
        >>> study.name, study.seeds
        ('quickstart', (0, 1, 2))
    """
    path = _find_study(str(path_or_name))
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ConfigError(str(path), " ".join(str(error).split()), "a YAML file") from None
    return study_from_dict(content, str(path))


def available_studies() -> list[str]:
    """Names of the studies that come with the package, sorted."""
    return sorted({path.stem for folder in _study_folders() for path in folder.glob("*.yaml")})


def study_from_dict(content: object, source: str = "study") -> Study:
    """Build a study from the parsed content of its file; ``source`` is the file's name in error messages.

    Raises ConfigError if a key is missing, unknown or of the wrong type, or a cell has an impossible configuration.
    """
    required = ("name", "title", "question", "base", "arms", "seeds")
    data = _mapping(content, source, required, optional=("sweep", "axes", "contrasts", "parity", "notes"))
    arms = _mapping(data["arms"], f"{source}: arms")
    require(bool(arms), f"{source}: arms", arms, "at least one arm")
    sweep = _sweep(data.get("sweep"), f"{source}: sweep")
    study = Study(
        name=_text(data["name"], f"{source}: name"),
        title=_text(data["title"], f"{source}: title"),
        question=_text(data["question"], f"{source}: question"),
        base=_mapping(data["base"], f"{source}: base"),
        arms=tuple(_arm(name, arm, source) for name, arm in arms.items()),
        seeds=_seeds(data["seeds"], f"{source}: seeds"),
        sweep=sweep,
        grid=_grid(data.get("axes"), sweep, f"{source}: axes"),
        parity=_parity(data.get("parity"), f"{source}: parity"),
        notes=None if data.get("notes") is None else _text(data["notes"], f"{source}: notes"),
    )
    references = [arm.name for arm in study.arms if arm.reference]
    require(len(references) <= 1, f"{source}: arms", references, "at most one arm with `reference: true`")
    _check_places(study, source)
    check_overlaps(study, source)
    study = replace(study, contrasts=contrasts_from(data.get("contrasts"), study, f"{source}: contrasts"))
    cells = study_cells(study, source)
    if data.get("contrasts") is not None:
        check_runs_differ(study.contrasts, cells, f"{source}: contrasts")
    if study.parity is not None:
        _check_parity(study, study.parity, cells, f"{source}: parity")
    return study


def _study_folders() -> Iterator[Path]:
    package = Path(str(importlib.resources.files("syncbn")))
    # A wheel has the configurations inside the package; a source checkout has them beside it.
    for folder in (package / "configs" / "study", package.parent / "configs" / "study"):
        if folder.is_dir():
            yield folder


def _find_study(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.name == path_or_name:
        for folder in _study_folders():
            if (folder / f"{path_or_name}.yaml").is_file():
                return folder / f"{path_or_name}.yaml"
    names = ", ".join(available_studies()) or "none is installed"
    raise ConfigError("study", path_or_name, f"an existing YAML file or the name of a study ({names})")


# ---- parts of the file


def _seeds(content: object, where: str) -> tuple[int, ...]:
    integers = isinstance(content, list) and bool(content) and all(type(seed) is int for seed in content)
    if not isinstance(content, list) or not integers or len(set(content)) < len(content):
        raise ConfigError(where, content, "a list of different integers")
    require(all(0 <= seed < 2**31 for seed in content), where, content, "integers from 0 to 2^31 - 1")
    return tuple(content)


def _arm(name: object, content: object, source: str) -> Arm:
    where = f"{source}: arms.{name}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{source}: arms", name, "a name (YAML reads an unquoted no, off, 1 or null as a value)")
    data = _mapping(content, where, optional=("label", "overrides", "reference", "only"))
    reference = data.get("reference", False)
    require(isinstance(reference, bool), f"{where}.reference", reference, "true or false")
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
    require(kind in ("decoupled", "coupled"), f"{where}.kind", kind, "decoupled or coupled")
    require(vary in get_args(Vary), f"{where}.vary", vary, f"one of {', '.join(get_args(Vary))}")
    require(kind == "decoupled" or vary == "per_gpu_batch_size", f"{where}.vary", vary, "per_gpu_batch_size (coupled)")
    given = _values(data["values"], f"{where}.values")
    values = tuple(value for value in given if type(value) is int and value >= 1)
    require(len(values) == len(given), f"{where}.values", list(given), "positive integers")
    whole = data.get("global_batch_size")
    if kind == "decoupled" and vary == "per_gpu_batch_size":
        whole = _positive(whole, f"{where}.global_batch_size")
        odd = [v for v in values if whole % v]
        require(not odd, f"{where}.values", odd, f"divisors of global_batch_size ({whole})")
    else:
        require(whole is None, f"{where}.global_batch_size", whole, f"none with a {kind} sweep of {vary}")
    hold, steps = data.get("hold", ["epochs"]), data.get("steps")
    hold = [hold] if isinstance(hold, str) else hold
    hold_ok = isinstance(hold, list) and bool(hold) and all(h in ("epochs", "steps") for h in hold)
    require(hold_ok and len(set(hold)) == len(hold), f"{where}.hold", hold, "epochs, steps or both")
    require(kind == "coupled" or "hold" not in data, f"{where}.hold", hold, "none with a decoupled sweep")
    if kind == "coupled" and "steps" in hold:
        _positive(steps, f"{where}.steps")
    else:
        require(steps is None, f"{where}.steps", steps, "none unless a coupled sweep holds steps")
    return Sweep(kind=kind, vary=vary, values=values, global_batch_size=whole, hold=tuple(hold), steps=steps)


def _grid(content: object, sweep: Sweep | None, where: str) -> dict[str, tuple[Value, ...]]:
    if content is None:
        return {}
    axes = _mapping(content, where)
    known = [key for key in known_keys() if key != "seed"]
    for name in axes:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"a key of the run configuration{', such as ' + ', '.join(close) if close else ''}"
        require(name in known, f"{where}: axis", name, hint)
        swept = sweep is not None and name == sweep.vary
        require(not swept, f"{where}: axis", name, "an axis that the sweep does not vary already")
    return {name: _values(values, f"{where}.{name}") for name, values in axes.items()}


def _parity(content: object, where: str) -> Parity | None:
    if content is None:
        return None
    data = _mapping(content, where, required=("arm",), optional=("processes", "steps", "at"))
    processes = data.get("processes", list(Parity.processes))
    several = isinstance(processes, list) and len(processes) >= 2
    if not several or not all(type(number) is int and number >= 1 for number in processes):
        raise ConfigError(f"{where}.processes", processes, "a list of at least two positive integers")
    return Parity(
        arm=data["arm"],
        processes=tuple(processes),
        steps=_positive(data.get("steps", Parity.steps), f"{where}.steps"),
        at=_place(data.get("at", {}), f"{where}.at"),
    )


# ---- checks across parts


def _check_places(study: Study, source: str) -> None:
    """Every place that the file names has to lie on the axes."""
    axes = study.axes
    places = [(f"{source}: arms.{arm.name}.only", {k: list(v) for k, v in arm.only.items()}) for arm in study.arms]
    if study.parity is not None:
        places.append((f"{source}: parity.at", {axis: [value] for axis, value in study.parity.at.items()}))
    for where, place in places:
        for axis, values in place.items():
            require(axis in axes, where, axis, f"an axis of the study ({', '.join(axes) or 'it has none'})")
            missing = [value for value in values if value not in axes[axis]]
            require(not missing, f"{where}.{axis}", missing, f"values of that axis {list(axes[axis])}")


def _check_parity(study: Study, parity: Parity, cells: list[Cell], where: str) -> None:
    names = [arm.name for arm in study.arms]
    require(parity.arm in names, f"{where}.arm", parity.arm, f"one of the arms ({', '.join(names)})")
    cell = parity_cell(parity, cells)
    if cell is None:
        raise ConfigError(f"{where}.at", parity.at, "a place at which the arm is run")
    odd = [number for number in parity.processes if cell.config.gpus % number]
    require(not odd, f"{where}.processes", odd, f"divisors of the {cell.config.gpus} logical GPUs")


# ---- types


def _mapping(
    content: object, where: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[Any, Any]:
    """``content`` if it is a mapping with exactly these keys (any keys, if none are named)."""
    if not isinstance(content, dict):
        raise ConfigError(where, content, "a mapping")
    known = required + optional
    for key in content:
        require(not known or key in known, f"{where}: key", key, f"one of {', '.join(known)}")
    for key in required:
        require(key in content, f"{where}: keys", list(content), f"the key {key!r} too")
    return content


def _values(content: object, where: str) -> tuple[Value, ...]:
    """The values of an axis: at least one, plain and different."""
    plain = isinstance(content, list) and all(isinstance(v, int | float | str | bool | None) for v in content)
    if not isinstance(content, list) or not plain or not content:
        raise ConfigError(where, content, "a list of at least one value")
    values = tuple(map(_number, content))
    require(len({(type(v) is bool, v) for v in values}) == len(values), where, content, "values that differ")
    return values


def _place(content: object, where: str) -> dict[str, Value]:
    return {axis: _number(value) for axis, value in _mapping(content, where).items()}


def _number(value: Any) -> Any:
    """The number that a text spells, else the value itself: YAML reads 1e-3, which has no point, as a text."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def _positive(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(where, value, "a positive integer")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(where, value, "a text")
    return value.strip()
