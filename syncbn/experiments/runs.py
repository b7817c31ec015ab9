"""What the runs of an experiment measured, by arm, point and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncbn.study.plan.grid import Cell, Study, Value
from syncbn.train.result import RunResult


@dataclass(frozen=True)
class Runs:
    """The results of an experiment's runs. Runs that are missing or failed have no values."""

    study: Study
    cells: Sequence[Cell]
    results: Mapping[str, RunResult]
    """By the cells' keys."""

    def at(self, arm: str, place: Mapping[str, Value]) -> list[tuple[int, RunResult]]:
        """(seed, result) of each run of an arm at the points that have the values of ``place``."""
        cells = [c for c in self.cells if c.arm == arm and place.items() <= dict(c.point).items()]
        return [(cell.seed, self.results[cell.key]) for cell in cells if cell.key in self.results]

    def values(self, quantity: str, arm: str, place: Mapping[str, Value] | None = None) -> dict[int, float]:
        """A quantity of the runs at one place by seed; a diverged run has none."""
        runs = self.at(arm, place or {})
        measured = {seed: run.test.get(quantity) for seed, run in runs if run.test is not None}
        return {seed: value for seed, value in measured.items() if value is not None}

    def along(self, quantity: str, arm: str, axis: str, place: Mapping[str, Value] | None = None) -> Trace:
        """A quantity along an axis of the study: the values of each seed at each value of the axis."""
        points = [value for value in self.study.axes[axis] if self.at(arm, {**(place or {}), axis: value})]
        return _trace(points, [self.values(quantity, arm, {**(place or {}), axis: value}) for value in points])

    def curve(self, quantity: str, arm: str, place: Mapping[str, Value] | None = None) -> Trace:
        """A quantity that the runs reported, along their steps."""
        by_step: dict[int, dict[int, float]] = {}
        for seed, run in self.at(arm, place or {}):
            for entry in run.history:
                value = entry["test"].get(quantity)
                if value is not None:
                    by_step.setdefault(entry["step"], {})[seed] = value
        return _trace(sorted(by_step), [by_step[step] for step in sorted(by_step)])


@dataclass(frozen=True)
class Trace:
    """Values along an axis or the steps."""

    places: list[Any]
    """(P,)"""
    values: NDArray[np.float64]
    """(P, seeds), NaN where a run has none."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """(P,): over the seeds that have a value."""
        found: NDArray[np.float64] = np.nanmean(self.values, axis=1)
        return found


def _trace(places: Sequence[Any], found: Sequence[Mapping[int, float]]) -> Trace:
    seeds = sorted({seed for values in found for seed in values})
    kept = [(place, values) for place, values in zip(places, found, strict=True) if values]
    table = np.full((len(kept), len(seeds)), np.nan)
    for i, (_, values) in enumerate(kept):
        for j, seed in enumerate(seeds):
            table[i, j] = values.get(seed, np.nan)
    return Trace([place for place, _ in kept], table)
