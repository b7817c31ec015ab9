"""Reading the ``tune:`` of a study file, and the keys of a run's configuration that a study varies.

Each setting chooses its own values of these keys by its validation metric, with seeds that the study does not use::

    tune: {optimizer.lr: [0.03, 0.1, 0.3], optimizer.weight_decay: [0, 1.0e-4], seeds: 2, untuned: true}

``seeds`` is a number or a list. With ``untuned``, the report also has each arm as it is without tuning. With
``halving: true``, or a factor, a few of the candidates have the whole budget. An arm may have a ``tune:`` of its own in
place of the study's; it has as many candidates, so that no arm has a larger budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from syncbn.study.plan.content import axis_values, mapping
from syncbn.study.plan.grid import Arm, Study, Tune, Value
from syncbn.study.plan.halving import FACTOR
from syncbn.study.plan.tuning import tunings_of
from syncbn.train.config import ConfigError, known_keys, meant, require

FIRST_SEED = 1000
"""Tuning seeds count from here."""
MOST_SEEDS = 1000
OPTIONS = ("task.options.", "model.options.")
"""Sections whose keys a configuration does not list."""


def grid_from(
    content: object, where: str, what: str = "key", others: Sequence[str] = ()
) -> dict[str, tuple[Value, ...]]:
    """A mapping from dotted keys of the run configuration to the values that are tried or run.

    ``others`` are keys that may stand beside them, for the error of a misspelt one.
    """
    found = mapping(content, where)
    known = [key for key in known_keys() if key != "seed"]
    for name in found:
        beside = f", or one of {', '.join(others)}" * bool(others)
        hint = f"a key of the run configuration{beside}{meant(name, [*known, *others])}"
        option = isinstance(name, str) and any(name.startswith(start) and name != start for start in OPTIONS)
        require(option or name in known, f"{where}: {what}", name, hint)
    return {name: axis_values(values, f"{where}.{name}") for name, values in found.items()}


def tune_from(content: object, arms: tuple[Arm, ...], study: Study, where: str) -> tuple[Tune | None, tuple[Arm, ...]]:
    """The ``tune:`` of a study file, and the arms, with their untuned copies if it asks for them."""
    if content is None:
        own = [arm.name for arm in arms if arm.tune is not None]
        require(not own, f"{where} of arms", own, "none without a `tune` of the study, which has the seeds")
        return None, arms
    data = dict(mapping(content, where))
    seeds, untuned = data.pop("seeds", 1), data.pop("untuned", False)
    halving = _halving(data.pop("halving", False), f"{where}.halving")
    require(isinstance(untuned, bool), f"{where}.untuned", untuned, "true or false")
    grid = grid_from(data, where, others=("seeds", "untuned", "halving"))
    require(bool(grid), where, content, "at least one key with the values to try, such as optimizer.lr: [0.03, 0.1]")
    copies = [replace(arm, name=f"{arm.name} untuned", label=f"{arm.label}, untuned", tuned=False) for arm in arms]
    copies = [replace(arm, reference=False) for arm in copies] if untuned else []
    tune = Tune(grid=grid, seeds=_seeds(seeds, study.seeds, f"{where}.seeds"), halving=halving)
    return tune, (*arms, *copies)


def check_tune(study: Study, swept: Sequence[str], source: str) -> None:
    """Check that tuning sets nothing that the study varies, and that every arm has as many candidates.

    Raises ConfigError if not, or if the task is classification and nothing is held out for validation.
    """
    if study.tune is None:
        return
    numbers = {}
    for arm in study.arms:
        where = f"{source}: tune" if arm.tune is None else f"{source}: arms.{arm.name}.tune"
        for key in study.tune.grid if arm.tune is None else arm.tune:
            require(key not in study.grid and key not in swept, where, key, "a key that the study does not vary")
        numbers[arm.name] = len(study.tune.candidates(arm))
    same = f"as many candidates for each arm, so that no arm has a larger budget than another: {numbers}"
    require(len(set(numbers.values())) == 1, f"{source}: tune", max(numbers.values()), same)
    parts = {name: study.base.get(name) or {} for name in ("task", "data")}
    task, data = (mapping(part, f"{source}: base.{name}") for name, part in parts.items())
    held_out = task.get("name", "classification") != "classification" or data.get("validation_fraction", 0)
    expected = "a fraction above 0 in `base`, as tuning chooses by validation data"
    require(bool(held_out), f"{source}: base: data.validation_fraction", data.get("validation_fraction", 0), expected)
    if study.tune.halving is not None:
        _check_halving(study, study.tune.halving, numbers, f"{source}: tune")


def check_trials(study: Study, source: str) -> None:
    """Check that every candidate is possible, and that successive halving has a budget to divide.

    Raises ConfigError if not.
    """
    for tuning in tunings_of(study, source=source).values():
        if study.tune is not None and study.tune.halving is not None:
            where = f"{source}: arm {tuning.place.arm}: budget.{tuning.length.unit}"
            expected = f"at least 2 {tuning.length.unit}, as tune.halving divides them"
            require(len(tuning.rungs) > 1, where, tuning.length.number, expected)
            cost = sum(rung.candidates * rung.budget for rung in tuning.rungs)
            whole = tuning.rungs[0].candidates * tuning.rungs[-1].budget
            cheaper = f"no halving here: its rungs take {cost} {tuning.length.unit}, all candidates together {whole}"
            require(cost <= whole, f"{source}: tune.halving", study.tune.halving, cheaper)


def _check_halving(study: Study, factor: int, candidates: Mapping[str, int], where: str) -> None:
    grids = [study.tune.grid if study.tune is not None else {}, *(arm.tune or {} for arm in study.arms)]
    budgets = [key for grid in grids for key in grid if key in ("budget.epochs", "budget.steps")]
    require(not budgets, where, budgets, "no budget with halving, which divides it")
    number = max(candidates.values())
    expected = f"a factor below the number of candidates ({number}), as the last rung compares that many"
    require(number > factor, f"{where}.halving", factor, expected)
    budget, swept = study.base.get("budget") or {}, study.sweep is not None and study.sweep.steps is not None
    given = isinstance(budget, Mapping) and any(budget.get(unit) is not None for unit in ("epochs", "steps"))
    if study.run is not None and not given and not swept and not any(key.startswith("budget.") for key in study.grid):
        trains = "`run` has to train for setting.config.budget.epochs (or steps)"
        expected = f"epochs or steps in `base`, which tune.halving divides; {trains}"
        raise ConfigError(f"{where.removesuffix('tune')}base: budget", budget or None, expected)


def _halving(content: object, where: str) -> int | None:
    if content is True or content is False:
        return FACTOR if content else None
    if type(content) is not int or content < 2:
        raise ConfigError(where, content, "true, false, or a factor of at least 2")
    return content


def _seeds(content: Any, taken: Sequence[int], where: str) -> tuple[int, ...]:
    if type(content) is int and 1 <= content <= MOST_SEEDS:
        free = (seed for seed in range(FIRST_SEED, FIRST_SEED + content + len(taken)) if seed not in taken)
        return tuple(next(free) for _ in range(content))
    integers = isinstance(content, list) and all(type(seed) is int and 0 <= seed < 2**31 for seed in content)
    if not integers or not content or len(set(content)) < len(content) or set(content) & set(taken):
        raise ConfigError(
            where,
            content,
            f"a number of seeds up to {MOST_SEEDS}, or a list of different ones that are not the study's",
        )
    return tuple(content)
