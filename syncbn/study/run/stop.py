"""When a study stops early: a mistake in the user's code or configuration would make all of its runs fail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from syncbn.study.plan.alike import sentence
from syncbn.study.plan.grid import Candidate, Cell, Point
from syncbn.study.run.jobs import Job
from syncbn.study.run.status import Outcome

ENOUGH = 3
"""Runs that fail alike before the others are left."""


def hopeless(outcomes: Collection[Outcome], jobs: Collection[Job]) -> bool:
    """Whether so many runs failed by the same mistake that all ``jobs`` would, if none was done so far.

    One arm may be impossible where others are not, and so may a place, such as one image per GPU, or a candidate of a
    tuning. So the runs that failed differ in each of these in which the jobs do.
    """
    found: dict[str, list[Cell]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.mistake:
            found[sentence(outcome.message, outcome.job.key)].append(outcome.job.cell)
    every = _variety([job.cell for job in jobs])
    return any(
        len(cells) >= ENOUGH and all(mine >= min(2, most) for mine, most in zip(_variety(cells), every, strict=True))
        for cells in found.values()
    )


def _variety(cells: Sequence[Cell]) -> tuple[int, int, int]:
    """The numbers of different arms, places and candidates."""
    return len({cell.arm for cell in cells}), len({cell.point for cell in cells}), len({c.candidate for c in cells})


def different_first(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, but some that differ in all that varies before the others: a mistake in all of them shows soon."""
    arms, points, candidates = set[str](), set[Point](), set[Candidate]()
    every, first = _variety([job.cell for job in jobs]), set[str]()
    for job in jobs:
        cell = job.cell
        found = (cell.arm in arms, cell.point in points, cell.candidate in candidates)
        if not any(known and number > 1 for known, number in zip(found, every, strict=True)):
            arms.add(cell.arm)
            points.add(cell.point)
            candidates.add(cell.candidate)
            first.add(job.key)
    return sorted(jobs, key=lambda job: job.key not in first)
