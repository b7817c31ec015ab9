"""The comparisons that a study plans, named before its runs.

A contrast is the test score (the task's metric on the test set) at one place minus that at another: an arm against an
arm, or a value of an axis against another along the same arm. With ``minus`` it is a difference of two such
differences. The tests are corrected over all planned contrasts, so a study should name those that answer its question
and no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.study.plan.content import mapping, place
from syncbn.study.plan.grid import Cell, Contrast, Place, Point, Study, Value, spelled
from syncbn.train.config import ConfigError, require


def contrasts_from(content: object, study: Study, where: str) -> tuple[Contrast, ...]:
    """Read the ``contrasts:`` of a study file.

    Each entry names an arm (or a list of arms, one contrast each) and its place. ``against`` says what is different in
    the second setting, and ``minus`` what is different in both settings of the difference that is subtracted.
    ``no_worse_by`` is a margin: in points for a metric in percent, such as the error of classification, else in the
    metric's own unit. An axis that is not named is at its first value::

        contrasts:
          - {arm: [sync, renorm], at: {per_gpu_batch_size: 2}, against: {arm: batch}}
          - {arm: sync, at: {sync_group_size: 2}, against: {at: {sync_group_size: 16}}, no_worse_by: 0.5}
          - {arm: batch, at: {per_gpu_batch_size: 1}, against: {at: {per_gpu_batch_size: 128}}, minus: {arm: renorm}}

    Args:
        content: the parsed list; None for :func:`default_contrasts`.
        study: the study; its own ``contrasts`` are not read.
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
    for index, entry in enumerate(content):
        for contrast in _entry(entry, study, f"{where}[{index}]"):
            require(contrast not in found, f"{where}[{index}]", contrast.name, "each contrast once")
            found.append(contrast)
    return tuple(found)


def default_contrasts(study: Study) -> tuple[Contrast, ...]:
    """Each other arm against the reference, at the first value of each axis; empty without a reference.

    Copies of arms without tuning are left out: they are shown beside the tuned ones, and claim nothing.
    """
    first = _point({}, study)
    arms = [arm for arm in study.arms if arm.tuned and first in study.points(arm)]
    reference = next((arm for arm in arms if arm.reference), None)
    if reference is None:
        return ()
    second = Place(reference.name, first)
    return tuple(_contrast((Place(arm.name, first), second), None, None) for arm in arms if arm is not reference)


def check_runs_differ(study: Study, cells: Sequence[Cell], where: str) -> None:
    """Check that no contrast compares runs with themselves, as along an axis that does not change its arm.

    An arm that tunes differs from its copy without tuning, and from an arm with other candidates.

    Raises ConfigError if one does.
    """
    keys: dict[Place, list[str]] = {}
    for cell in cells:
        keys.setdefault(Place(cell.arm, cell.point), []).append(cell.key)
    tune = study.tune
    tried = {arm.name: tune.candidates(arm) if tune is not None and arm.tuned else None for arm in study.arms}
    for contrast in study.contrasts:
        one, other = contrast.first, contrast.second
        same = keys[one] == keys[other] and tried[one.arm] == tried[other.arm]
        require(not same, where, contrast.name, "two settings whose configurations differ")


def _entry(content: object, study: Study, where: str) -> list[Contrast]:
    data = mapping(content, where, required=("arm", "against"), optional=("at", "minus", "no_worse_by"))
    margin = data.get("no_worse_by")
    _check_margin(margin, study, f"{where}.no_worse_by")
    names = data["arm"] if isinstance(data["arm"], list) else [data["arm"]]
    require(bool(names), f"{where}.arm", names, "at least one arm")
    point = _point(place(data.get("at", {}), study.axes, f"{where}.at"), study)
    contrasts = []
    for name in names:
        first = Place(_arm(name, study, f"{where}.arm"), point)
        ends = (first, _moved(first, data["against"], study, f"{where}.against"))
        moved = [_moved(end, data["minus"], study, f"{where}.minus") for end in ends if "minus" in data]
        minus = (moved[0], moved[1]) if moved else None
        for end in (*ends, *moved):
            run_there = any(arm.name == end.arm and end.point in study.points(arm) for arm in study.arms)
            require(run_there, where, _name(end), "a place at which this arm is run")
        contrasts.append(_contrast(ends, minus, margin))
    return contrasts


def _check_margin(margin: Any, study: Study, where: str) -> None:
    most, expected = 100.0, "points of test error, above 0 and below 100"
    if study.samples_word != "images":  # the metric of another task is known from its results alone
        most, expected = math.inf, "a number above 0: points if the metric is in percent, else in the metric's unit"
    number = isinstance(margin, int | float) and not isinstance(margin, bool) and 0 < margin < most
    require(margin is None or number, where, margin, expected)


def _moved(start: Place, content: object, study: Study, where: str) -> Place:
    """The place with the arm and the values that ``against`` or ``minus`` names put in."""
    data = mapping(content, where, optional=("arm", "at"))
    arm = start.arm if data.get("arm") is None else _arm(data["arm"], study, f"{where}.arm")
    moved = Place(arm, _point(dict(start.point) | place(data.get("at", {}), study.axes, f"{where}.at"), study))
    require(moved != start, where, content, "another arm or another place")
    return moved


def _contrast(ends: tuple[Place, Place], minus: tuple[Place, Place] | None, margin: float | None) -> Contrast:
    name = f"{_name(ends[0])} against {_name(ends[1], ends[0])}"
    if minus is not None:
        name += f" minus {_name(minus[0], ends[0])} against {_name(minus[1], minus[0])}"
    return Contrast(name, *ends, minus, margin)


def _name(place: Place, other: Place | None = None) -> str:
    """A place in words; beside another one, by what differs from it."""
    arm = [place.arm] if other is None or place.arm != other.arm else []
    known = () if other is None else other.point
    return " ".join([*arm, *(f"{axis}={spelled(value)}" for axis, value in place.point if (axis, value) not in known)])


def _point(values: Mapping[str, Value], study: Study) -> Point:
    return tuple((axis, values.get(axis, known[0])) for axis, known in study.axes.items())


def _arm(name: object, study: Study, where: str) -> str:
    names = [arm.name for arm in study.arms]
    require(name in names, where, name, f"one of the arms ({', '.join(names)})")
    return str(name)
