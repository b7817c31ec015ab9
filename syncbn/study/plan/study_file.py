"""Reading a study's YAML file. Every mistake is one line that names the file, the key, the value and what to write."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from syncbn.study.plan.content import axis_values, mapping, place, positive, text
from syncbn.study.plan.contrasts import check_runs_differ, contrasts_from
from syncbn.study.plan.grid import Arm, Cell, Parity, Study, Sweep, Value, Vary, parity_cell, study_cells
from syncbn.study.plan.tune_file import check_trials, check_tune, grid_from, tune_from
from syncbn.train.config import ConfigError, require
from syncbn.train.result import Metric
from syncbn.train.yaml_file import read_yaml

MOST_RUNS = 100_000


def load_study(path_or_name: str | Path) -> Study:
    """Read a study from a YAML file, or the packaged study of this name.

    Raises ConfigError if there is none, or if it has a mistake.
    """
    path = _find_study(str(path_or_name))
    return study_from_dict(read_yaml(path, "config"), str(path))


def available_studies() -> list[str]:
    """Names of the studies that come with the package, sorted."""
    return sorted(packaged("study"))


def study_from_dict(content: object, source: str = "study") -> Study:
    """Build a study from the parsed content of its file; ``source`` is the file's name in error messages.

    Raises ConfigError if a key is missing, unknown or of the wrong type, or a cell has an impossible configuration.
    """
    required = ("name", "title", "question", "base", "arms", "seeds")
    optional = ("sweep", "axes", "contrasts", "parity", "tune", "notes", "run", "metric", "processes")
    data = mapping(content, source, required, optional)
    arms = mapping(data["arms"], f"{source}: arms")
    require(bool(arms), f"{source}: arms", arms, "at least one arm")
    sweep = _sweep(data.get("sweep"), f"{source}: sweep")
    study = Study(
        name=text(data["name"], f"{source}: name"),
        title=text(data["title"], f"{source}: title"),
        question=text(data["question"], f"{source}: question"),
        base=_base(data, source),
        arms=(),
        seeds=_seeds(data["seeds"], f"{source}: seeds"),
        sweep=sweep,
        grid=_grid(data.get("axes"), sweep, f"{source}: axes"),
        notes=None if data.get("notes") is None else text(data["notes"], f"{source}: notes"),
        content=data,
    )
    made = tuple(_arm(name, arm, study, source) for name, arm in arms.items())
    tune, made = tune_from(data.get("tune"), made, study, f"{source}: tune")
    study = replace(
        study,
        arms=made,
        tune=tune,
        parity=_parity(data.get("parity"), study, f"{source}: parity"),
    )
    study = replace(study, **_own_loop(data, source))
    references = [arm.name for arm in study.arms if arm.reference]
    require(len(references) <= 1, f"{source}: arms", references, "at most one arm with `reference: true`")
    _check_size(study, source)
    _check_overlaps(study, source)
    check_tune(study, _sweep_keys(study.sweep), source)
    study = replace(study, contrasts=contrasts_from(data.get("contrasts"), study, f"{source}: contrasts"))
    cells = study_cells(study, source)
    check_trials(study, source)
    if data.get("contrasts") is not None:
        check_runs_differ(study, cells, f"{source}: contrasts")
    if study.parity is not None:
        _check_parity(study, study.parity, cells, f"{source}: parity")
    return study


def packaged(kind: str) -> dict[str, Path]:
    """The YAML files of ``configs/KIND`` that come with the package, by name."""
    package = Path(str(importlib.resources.files("syncbn")))
    # A source checkout has the configurations beside the package; a wheel has them inside it.
    folders = (package.parent / "configs" / kind, package / "configs" / kind)
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def _find_study(path_or_name: str) -> Path:
    installed = packaged("study")
    path = Path(path_or_name) if Path(path_or_name).is_file() else installed.get(path_or_name)
    if path is None:
        names = ", ".join(sorted(installed)) or "none is installed"
        raise ConfigError("study", Path(path_or_name), f"an existing YAML file or the name of a study ({names})")
    return path


def _base(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What all arms share; with a training loop of the user's, its name is the task's."""
    base, run = mapping(data["base"], f"{source}: base"), data.get("run")
    if run is None:
        return base
    named = isinstance(run, str) and ":" in run
    function = f"{getattr(run, '__module__', None)}:{getattr(run, '__qualname__', None)}"
    require(named or (callable(run) and "None" not in function), f"{source}: run", run, "module:function")
    task = mapping(base.get("task") or {}, f"{source}: base.task", optional=("options",))
    return {**base, "task": {**task, "name": run if isinstance(run, str) else function}}


def _own_loop(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    run, metric, processes = data.get("run"), data.get("metric"), data.get("processes", 1)
    if run is None:
        for key in ("metric", "processes"):
            require(key not in data, f"{source}: {key}", data.get(key), "none without `run`, a training loop of yours")
        return {}
    expected = "none with `run`, as it is the trainer's"
    require(data.get("parity") is None, f"{source}: parity", data.get("parity"), expected)
    positive(processes, f"{source}: processes")
    return {"run": run, "metric": metric_from(metric, f"{source}: metric"), "processes": processes}


def metric_from(content: object, where: str) -> Metric:
    """Read ``metric: {name: dice, higher_is_better: true, percent: true}``."""
    data = mapping(content, where, required=("name",), optional=("higher_is_better", "percent"))
    name = text(data["name"], f"{where}.name")
    require(not name.startswith("validation_"), f"{where}.name", name, "the name of a test metric")
    for key in ("higher_is_better", "percent"):
        require(isinstance(data.get(key, False), bool), f"{where}.{key}", data.get(key), "true or false")
    return Metric(**{**data, "name": name})


def _seeds(content: object, where: str) -> tuple[int, ...]:
    integers = isinstance(content, list) and all(type(seed) is int for seed in content)
    if not content or not isinstance(content, list) or not integers or len(set(content)) < len(content):
        raise ConfigError(where, content, "a list of different integers")
    require(all(0 <= seed < 2**31 for seed in content), where, content, "integers from 0 to 2^31 - 1")
    return tuple(content)


def _arm(name: object, content: object, study: Study, source: str) -> Arm:
    where = f"{source}: arms.{name}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{source}: arms", name, "a name (YAML reads an unquoted no, off, 1 or null as a value)")
    data = mapping(content, where, optional=("label", "overrides", "reference", "only", "tune"))
    reference = data.get("reference", False)
    require(isinstance(reference, bool), f"{where}.reference", reference, "true or false")
    only = {}
    for axis, values in mapping(data.get("only", {}), f"{where}.only").items():
        known = axis_values(values, f"{where}.only.{axis}")
        only[axis] = tuple(place({axis: value}, study.axes, f"{where}.only")[axis] for value in known)
    return Arm(
        name=name,
        label=text(data.get("label", name), f"{where}.label"),
        overrides=mapping(data.get("overrides", {}), f"{where}.overrides"),
        reference=reference,
        only=only,
        tune=None if data.get("tune") is None else grid_from(data["tune"], f"{where}.tune"),
    )


def _sweep(content: object, where: str) -> Sweep | None:
    if content is None:
        return None
    optional = ("kind", "vary", "global_batch_size", "hold", "steps")
    data = mapping(content, where, required=("values",), optional=optional)
    kind, vary = data.get("kind", "decoupled"), data.get("vary", "per_gpu_batch_size")
    require(kind in ("decoupled", "coupled"), f"{where}.kind", kind, "decoupled or coupled")
    require(vary in get_args(Vary), f"{where}.vary", vary, f"one of {', '.join(get_args(Vary))}")
    require(kind == "decoupled" or vary == "per_gpu_batch_size", f"{where}.vary", vary, "per_gpu_batch_size (coupled)")
    given = axis_values(data["values"], f"{where}.values")
    values = tuple(value for value in given if type(value) is int and value >= 1)
    require(len(values) == len(given), f"{where}.values", list(given), "positive integers")
    whole = data.get("global_batch_size")
    if kind == "decoupled" and vary == "per_gpu_batch_size":
        whole = positive(whole, f"{where}.global_batch_size")
        odd = [v for v in values if whole % v]
        require(not odd, f"{where}.values", odd, f"divisors of global_batch_size ({whole})")
    else:
        require(whole is None, f"{where}.global_batch_size", whole, f"none with a {kind} sweep of {vary}")
    hold, steps = data.get("hold", ["epochs"]), data.get("steps")
    hold = [hold] if isinstance(hold, str) else hold
    both = (["epochs"], ["steps"], ["epochs", "steps"], ["steps", "epochs"])
    require(hold in both, f"{where}.hold", hold, "epochs, steps or both")
    require(kind == "coupled" or "hold" not in data, f"{where}.hold", hold, "none with a decoupled sweep")
    if kind == "coupled" and "steps" in hold:
        positive(steps, f"{where}.steps")
    else:
        require(steps is None, f"{where}.steps", steps, "none unless a coupled sweep holds steps")
    return Sweep(kind=kind, vary=vary, values=values, global_batch_size=whole, hold=tuple(hold), steps=steps)


def _grid(content: object, sweep: Sweep | None, where: str) -> dict[str, tuple[Value, ...]]:
    if content is None:
        return {}
    axes = grid_from(content, where, "axis")
    for name in axes:
        swept = sweep is not None and name == sweep.vary
        require(not swept, f"{where}: axis", name, "an axis that the sweep does not vary already")
    return axes


def _parity(content: object, study: Study, where: str) -> Parity | None:
    if content is None:
        return None
    data = mapping(content, where, required=("arm",), optional=("processes", "steps", "at"))
    processes = data.get("processes", list(Parity.processes))
    several = isinstance(processes, list) and len(processes) >= 2
    if not several or not all(type(number) is int and number >= 1 for number in processes):
        raise ConfigError(f"{where}.processes", processes, "a list of at least two positive integers")
    return Parity(
        arm=data["arm"],
        processes=tuple(processes),
        steps=positive(data.get("steps", Parity.steps), f"{where}.steps"),
        at=place(data.get("at", {}), study.axes, f"{where}.at"),
    )


def _check_parity(study: Study, parity: Parity, cells: list[Cell], where: str) -> None:
    names = [arm.name for arm in study.arms]
    require(parity.arm in names, f"{where}.arm", parity.arm, f"one of the arms ({', '.join(names)})")
    cell = parity_cell(parity, cells)
    if cell is None:
        raise ConfigError(f"{where}.at", parity.at, "a place at which the arm is run")
    odd = [number for number in parity.processes if cell.config.gpus % number]
    require(not odd, f"{where}.processes", odd, f"divisors of the {cell.config.gpus} logical GPUs")


def _check_size(study: Study, source: str) -> None:
    """Check the number of runs before they are listed, which would take all memory."""
    tried = max((math.prod(map(len, tune)) for tune in _grids(study)), default=1)
    points = math.prod(map(len, study.axes.values()))
    runs = len(study.arms) * points * max(len(study.seeds), tried * len(study.tune.seeds if study.tune else ()))
    require(runs <= MOST_RUNS, source, runs, f"a study of at most {MOST_RUNS:,} runs")


def _grids(study: Study) -> list[Collection[Sequence[Value]]]:
    grids = [arm.tune for arm in study.arms] + [study.tune.grid if study.tune is not None else None]
    return [grid.values() for grid in grids if grid is not None]


def _check_overlaps(study: Study, source: str) -> None:
    """Check that no two parts set the same key, so that nothing is silently overwritten.

    The base may set the key of an axis, which the axis then replaces. Nothing may set a key that the sweep sets.
    """
    swept, sweep, axes = _sweep_keys(study.sweep), study.sweep, list(study.grid)
    replaced = list(swept)
    if sweep is not None and sweep.kind == "coupled":
        replaced += ["optimizer.lr_scaling"] + ["budget.epochs"] * ("steps" in sweep.hold)
    for index, axis in enumerate(axes):
        for other in axes[:index]:
            expected = f"no such axis, as the axis {other} sets the same"
            require(not _overlap(axis, other), f"{source}: axes: axis", axis, expected)
        free = not any(_overlap(axis, key) for key in replaced)
        require(free, f"{source}: axes: axis", axis, "no such axis, as the sweep sets it")
    parts = [(f"{source}: base", study.base)]
    parts += [(f"{source}: arms.{arm.name}.overrides", arm.overrides) for arm in study.arms]
    for index, (where, values) in enumerate(parts):
        for key, value in _leaves(values):
            for axis in axes:
                if index == 0:
                    wrong, expected = axis.startswith(f"{key}."), f"a mapping, as the axis {axis} lies in it"
                else:
                    wrong, expected = _overlap(key, axis), f"no such key in an arm, as the axis {axis} sets it"
                require(not wrong, f"{where}: {key}", value, expected)
            # A null in the budget is what the sweep itself sets.
            free = key not in swept or (value is None and key.startswith("budget."))
            require(free, f"{where}: {key}", value, "no such key here, as the sweep sets it")


def _sweep_keys(sweep: Sweep | None) -> list[str]:
    """The keys that the sweep sets."""
    if sweep is None:
        return []
    if sweep.kind == "coupled":
        keys = ["per_gpu_batch_size"]
        keys += ["budget.steps"] if "steps" in sweep.hold else []
        return keys + ([] if "epochs" in sweep.hold else ["budget.epochs"])
    if sweep.vary == "per_gpu_batch_size":
        return ["gpus", "per_gpu_batch_size"]
    return ["norm.ghost_batch_size"] if sweep.vary == "ghost_batch_size" else ["sync_group_size"]


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping with its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
