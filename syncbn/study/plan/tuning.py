"""The choice of each setting's own options, such as its learning rate, before a study's runs are done.

Each setting (an arm at a place on the axes) tries every candidate of the grid with the tuning seeds, and takes the one
with the best mean validation metric: the protocol of Gulrajani and Lopez-Paz 2021 (In Search of Lost Domain
Generalization, arXiv 2007.01434, section 3). The study's seeds and the test set have no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from syncbn.study.plan.grid import Candidate, Cell, Place, Study, setting_cells
from syncbn.train.config import ConfigError
from syncbn.train.result import RunResult


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate of a setting, with its validation metric over the tuning seeds."""

    candidate: Candidate
    cells: tuple[Cell, ...]
    scores: tuple[float, ...]
    """By tuning seed; NaN for a run that diverged."""

    @property
    def mean(self) -> float:
        """The mean over the seeds; NaN if a run diverged."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a setting chose among the candidates."""

    place: Place
    tried: tuple[Tried, ...]
    chosen: Tried

    @property
    def at_edge(self) -> list[str]:
        """The options whose chosen value is the least or the greatest number that was tried, of three or more."""
        found = []
        for name, value in self.chosen.candidate:
            values = {v for each in self.tried for key, v in each.candidate if key == name}
            numbers = sorted(v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
            if len(numbers) > 2 and value in (numbers[0], numbers[-1]):
                found.append(name)
        return found


def trial_cells(study: Study, source: str | None = None) -> list[Cell]:
    """The runs from which the settings choose; none if the study does not tune."""
    found: list[Cell] = []
    for each in _trials(study, source).values():
        for cells in each.values():
            found += cells
    return found


def choices_of(study: Study, results: Mapping[str, RunResult]) -> dict[Place, Choice]:
    """The choices of the settings whose trials have all ended; ``results`` by the cells' keys.

    A candidate with a run that diverged is the last choice. Of equal ones, the first of the grid is taken.

    Raises:
        ConfigError: a trial has no validation metric.
    """
    found = {}
    for place, candidates in _trials(study, None).items():
        if any(cell.key not in results for cells in candidates.values() for cell in cells):
            continue
        tried, sign = [], 1
        for candidate, cells in candidates.items():
            runs = [results[cell.key] for cell in cells]
            sign = (study.metric or runs[0].metric).sign
            scores = tuple(_validation(run, cell) for run, cell in zip(runs, cells, strict=True))
            tried.append(Tried(candidate=candidate, cells=tuple(cells), scores=scores))
        costs = [math.inf if math.isnan(each.mean) else sign * each.mean for each in tried]
        found[place] = Choice(place=place, tried=tuple(tried), chosen=tried[costs.index(min(costs))])
    return found


def _trials(study: Study, source: str | None) -> dict[Place, dict[Candidate, list[Cell]]]:
    if study.tune is None:
        return {}
    found: dict[Place, dict[Candidate, list[Cell]]] = {}
    for arm in study.arms:
        for point in study.points(arm) if arm.tuned else ():
            trials = found[Place(arm.name, point)] = {}
            for candidate in study.tune.candidates(arm):
                cells = setting_cells(study, arm, point, candidate, study.tune.seeds, source)
                trials[candidate] = [replace(cell, tuning=True) for cell in cells]
    return found


def _validation(run: RunResult, cell: Cell) -> float:
    if run.validation is None and run.status == "diverged":
        return math.nan
    if run.validation is None or run.metric.name not in run.validation:
        expected = "a task with validation data (for classification, set data.validation_fraction)"
        raise ConfigError(f"tune: {cell.label}", "no validation metric", expected)
    value = run.validation[run.metric.name]
    return math.nan if value is None else value
