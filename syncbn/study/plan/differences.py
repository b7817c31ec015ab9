"""What differs between the configurations of two studies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from syncbn.study.plan.content import number
from syncbn.study.plan.grid import Arm, Study, spelled
from syncbn.train.config import RunConfig, config_to_dict, flatten

ABSENT = "–"
"""Stands where a study does not have a key."""


class Difference(NamedTuple):
    """A key with its values in the two studies, as texts."""

    key: str
    first: str
    second: str


def differences(first: Study, second: Study) -> list[Difference]:
    """What differs: of the plans, of the arms, and of the runs' configurations.

    Defaults count as if the files had them. A key of the runs that differs in the same way for all common arms has one
    line; else each arm has its own. Values that a sweep or an axis sets are those of the sweep or axis.
    """
    arms = {arm.name: arm for arm in second.arms}
    common = [(arm, arms[arm.name]) for arm in first.arms if arm.name in arms]
    found = _pairs(_plan(first), _plan(second))
    by_arm = {one.name: _pairs(_runs(first, one), _runs(second, other)) for one, other in common}
    by_arm = by_arm or {"": _pairs(_runs(first, None), _runs(second, None))}
    everywhere = set.intersection(*(set(pairs) for pairs in by_arm.values()))
    found += [pair for pair in next(iter(by_arm.values())) if pair in everywhere]
    for name, pairs in by_arm.items():
        found += [pair._replace(key=f"arms.{name}.{pair.key}") for pair in pairs if pair not in everywhere]
    return found


def _plan(study: Study) -> dict[str, Any]:
    """What a study is, apart from the configuration of its runs; its training loop is their ``task.name``."""
    found: dict[str, Any] = {"name": study.name, "title": study.title, "seeds": study.seeds}
    found["reference"] = next((arm.name for arm in study.arms if arm.reference), None)
    found["contrasts"] = [each.name for each in study.contrasts]
    if study.sweep is not None:
        found |= {f"sweep.{key}": value for key, value in vars(study.sweep).items() if value is not None}
    found |= {f"axes.{key}": values for key, values in study.grid.items()}
    if study.tune is not None:
        found |= {f"tune.{key}": values for key, values in study.tune.grid.items()}
        found |= {"tune.seeds": study.tune.seeds, "tune.halving": study.tune.halving}
    if study.run is not None:
        found |= {"metric": study.metric, "processes": study.processes}
    for arm in study.arms:
        found[f"arms.{arm.name}"] = arm.label
        found |= {f"arms.{arm.name}.only.{axis}": values for axis, values in arm.only.items()}
        found |= {f"arms.{arm.name}.tune.{key}": values for key, values in (arm.tune or {}).items()}
    return found


def _runs(study: Study, arm: Arm | None) -> dict[str, Any]:
    """The configuration of an arm's runs by dotted key, or of the base, without what varies within the study."""
    values = flatten(config_to_dict(RunConfig())) | flatten(study.base)
    values |= flatten(arm.overrides) if arm is not None else {}
    varied = {"seed", *study.axes, *(("gpus",) if study.sweep is not None else ())}
    return {key: number(value) for key, value in values.items() if key not in varied}


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    keys = dict.fromkeys([*first, *second])
    values = [(key, first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys]
    found = []
    for key, one, other in values:
        if _text(one, exact=True) != _text(other, exact=True):
            exact = _text(one) == _text(other)  # in six digits
            found.append(Difference(key, _text(one, exact), _text(other, exact)))
    return found


def _text(value: Any, exact: bool = False) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(each, exact) for each in value)
    return f"{value:g}" if isinstance(value, float) and not exact else spelled(value)
