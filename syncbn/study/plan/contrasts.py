"""Contrasts: the comparisons that a study plans, named before its runs.

A contrast is the test error at one place minus the test error at another: an arm against an arm, or one value of an
axis against another value along the same arm. With ``minus`` it is a difference of two such differences. The planned
contrasts are the family over which the tests are corrected, so a study should name those that answer its question and
no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from syncbn.train.checks import ConfigError, require

if TYPE_CHECKING:
    from syncbn.study.plan.grid import Arm, Cell, Point, Study, Value

_KEYS = ("arm", "at", "against", "minus", "no_worse_by")


@dataclass(frozen=True)
class Place:
    """An arm at a point of the axes."""

    arm: str
    point: Point


@dataclass(frozen=True)
class Contrast:
    """Error at ``first`` minus error at ``second``; with ``minus``, minus the same difference there."""

    name: str
    """Short and unique within the study; made of the arms and of the values that differ."""
    first: Place
    second: Place
    minus: tuple[Place, Place] | None = None
    margin: float | None = None
    """Error (a fraction of the test images) by which ``first`` may exceed ``second`` and still count as no worse."""

    @property
    def places(self) -> tuple[Place, ...]:
        """All places whose runs the contrast needs: two, or four with ``minus``."""
        return (self.first, self.second, *(self.minus or ()))


def contrasts_from(content: object, study: Study, where: str) -> tuple[Contrast, ...]:
    """Read the ``contrasts:`` of a study file.

    Each entry names an arm (or a list of arms, one contrast each) and its place. ``against`` says what is different in
    the second setting, and ``minus`` what is different in both settings of the difference that is subtracted. An axis
    that is not named is at its first value::

        contrasts:
          - {arm: [sync, renorm], at: {per_gpu_batch_size: 2}, against: {arm: batch}}
          - {arm: sync, at: {sync_group_size: 2}, against: {at: {sync_group_size: 16}}, no_worse_by: 0.5}
          - {arm: batch, at: {per_gpu_batch_size: 1}, against: {at: {per_gpu_batch_size: 128}}, minus: {arm: renorm}}

    Args:
        content: the parsed list; None for each other arm against the reference at the first value of each axis.
        study: the study; its ``contrasts`` are not read.
        where: what error messages call the key, such as ``my.yaml: contrasts``.

    Raises:
        ConfigError: an entry names an unknown key, arm, axis or value, a place at which its arm is not run, or two
            equal places.
    """
    if content is None:
        return default_contrasts(study)
    if not isinstance(content, list) or not content:
        raise ConfigError(where, content, "a list of at least one contrast")
    found: list[Contrast] = []
    for number, entry in enumerate(content):
        for contrast in _entry(entry, study, f"{where}[{number}]"):
            require(contrast not in found, f"{where}[{number}]", contrast.name, "each contrast once")
            found.append(contrast)
    return tuple(found)


def default_contrasts(study: Study) -> tuple[Contrast, ...]:
    """Each other arm against the reference, at the first value of each axis; empty without a reference."""
    first = tuple((axis, values[0]) for axis, values in study.axes.items())
    arms = [arm for arm in study.arms if first in study.points(arm)]
    reference = next((arm for arm in arms if arm.reference), None)
    if reference is None:
        return ()
    second = Place(reference.name, first)
    return tuple(_contrast(Place(arm.name, first), second) for arm in arms if arm is not reference)


def check_runs_differ(contrasts: Sequence[Contrast], cells: Sequence[Cell], where: str) -> None:
    """Check that no contrast compares runs with themselves, as along an axis that does not change its arm.

    Raises:
        ConfigError: the two settings of a contrast are the same runs.
    """
    keys: dict[Place, list[str]] = {}
    for cell in cells:
        keys.setdefault(Place(cell.arm, cell.point), []).append(cell.key)
    for contrast in contrasts:
        differ = keys[contrast.first] != keys[contrast.second]
        require(differ, where, contrast.name, "two settings that differ: these have the same configurations")


def _entry(content: object, study: Study, where: str) -> list[Contrast]:
    data = _mapping(content, where, _KEYS)
    for key in ("arm", "against"):
        require(key in data, where, data, f"the key {key!r} too")
    against = _changes(data["against"], study, f"{where}.against")
    minus = None if data.get("minus") is None else _changes(data["minus"], study, f"{where}.minus")
    margin = data.get("no_worse_by")
    if margin is not None:
        positive = isinstance(margin, int | float) and not isinstance(margin, bool) and 0 < margin < 100
        require(positive, f"{where}.no_worse_by", margin, "points of test error, above 0 and below 100")
    at = _point(data.get("at", {}), study, f"{where}.at")
    point = tuple((axis, at.get(axis, values[0])) for axis, values in study.axes.items())
    names = data["arm"] if isinstance(data["arm"], list) else [data["arm"]]
    require(bool(names), f"{where}.arm", names, "at least one arm")
    contrasts = []
    for name in names:
        first = Place(_arm(name, study, f"{where}.arm").name, point)
        ends = (first, _moved(first, against))
        require(ends[0] != ends[1], f"{where}.against", data["against"], "another arm or another place")
        pair = None if minus is None else (_moved(ends[0], minus), _moved(ends[1], minus))
        require(pair != ends, f"{where}.minus", data.get("minus"), "another arm or another place")
        for place in (*ends, *(pair or ())):
            run_there = place.point in study.points(_arm(place.arm, study, where))
            require(run_there, where, f"{place.arm} at {dict(place.point)}", "a place at which this arm is run")
        contrasts.append(_contrast(*ends, pair, None if margin is None else margin / 100))
    return contrasts


def _changes(content: object, study: Study, where: str) -> tuple[str | None, dict[str, Value]]:
    """The arm and the values that ``against`` or ``minus`` puts in place of the first setting's."""
    data = _mapping(content, where, ("arm", "at"))
    arm = None if data.get("arm") is None else _arm(data["arm"], study, f"{where}.arm").name
    return arm, _point(data.get("at", {}), study, f"{where}.at")


def _moved(place: Place, changes: tuple[str | None, Mapping[str, Value]]) -> Place:
    arm, at = changes
    return Place(arm or place.arm, tuple((axis, at.get(axis, value)) for axis, value in place.point))


def _contrast(
    first: Place, second: Place, minus: tuple[Place, Place] | None = None, margin: float | None = None
) -> Contrast:
    words = [_name(first), "against", _difference(second, first)]
    if minus is not None:
        words += ["minus", _difference(minus[0], first), "against", _difference(minus[1], minus[0])]
    return Contrast(" ".join(words), first, second, minus, margin)


def _name(place: Place) -> str:
    return " ".join([place.arm, *(f"{axis}={value}" for axis, value in place.point)])


def _difference(place: Place, other: Place) -> str:
    """A place by what differs from another one."""
    values = [f"{axis}={value}" for axis, value in place.point if (axis, value) not in other.point]
    return " ".join([place.arm, *values] if place.arm != other.arm else values)


def _point(content: object, study: Study, where: str) -> dict[str, Value]:
    data = _mapping(content, where, tuple(study.axes))
    return {axis: _value(value, study.axes[axis], f"{where}.{axis}") for axis, value in data.items()}


def _value(value: Any, values: Sequence[Value], where: str) -> Value:
    for known in values:
        alike = type(known) is bool if type(value) is bool else type(known) is not bool  # True equals 1
        # YAML reads 1e-3, without a point, as a text.
        if alike and (value == known or (isinstance(value, str) and _number(value) == known)):
            return known
    raise ConfigError(where, value, f"one of that axis's values {list(values)}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _arm(name: object, study: Study, where: str) -> Arm:
    for arm in study.arms:
        if arm.name == name:
            return arm
    raise ConfigError(where, name, f"one of the arms ({', '.join(arm.name for arm in study.arms)})")


def _mapping(content: object, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(where, content, "a mapping")
    for key in content:
        require(key in known, f"{where}: key", key, f"one of {', '.join(known)}" if known else "none: no axes")
    return content
