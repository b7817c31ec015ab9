"""The choice of each setting's own options, such as its learning rate, before a study's runs are done.

Each setting (an arm at a place on the axes) tries every candidate of the grid with the tuning seeds, and takes the one
with the best mean validation metric: the protocol of Gulrajani and Lopez-Paz 2021 (In Search of Lost Domain
Generalization, arXiv 2007.01434, section 3). The study's seeds and the test set have no part in it. With successive
halving (:mod:`syncbn.study.plan.halving`) it compares all candidates at a small budget and a few at the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from syncbn.study.plan.grid import Candidate, Cell, Place, Study, setting_cells
from syncbn.study.plan.halving import Length, Rung, length_of, rungs_of, shortened
from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.result import RunResult

UNDECIDED = "undecided-"
"""Begins the key of a cell that depends on a choice which is still open. No record has such a key."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate of a setting at one budget, with its validation metric over the tuning seeds."""

    candidate: Candidate
    cells: tuple[Cell, ...]
    scores: tuple[float, ...]
    """By tuning seed; NaN for a run that diverged."""
    cost: float
    """The lower, the better: the mean, or its negative if a higher one is better; infinite if a run diverged. It is
    rounded, so that means of the same scores in another order are equal."""

    @property
    def mean(self) -> float:
        """The mean over the seeds; NaN if a run diverged."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a setting chose among the candidates."""

    place: Place
    rungs: tuple[tuple[Tried, ...], ...]
    """What was compared in each rung, in the grid's order; a single rung without halving."""
    chosen: Tried

    @property
    def tried(self) -> tuple[Tried, ...]:
        """Every candidate once, in the grid's order, as it was in the last rung that it reached."""
        last = {tried.candidate: tried for rung in self.rungs for tried in rung}
        return tuple(last.values())

    @property
    def tied(self) -> list[Candidate]:
        """The candidates that were as good as the chosen one. The first of the grid is chosen."""
        best, others = self.chosen.cost, [tried for tried in self.rungs[-1] if tried is not self.chosen]
        return [tried.candidate for tried in others if tried.cost == best and math.isfinite(best)]

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


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How far the choice of a setting has come."""

    place: Place
    length: Length
    """Of a run with the whole budget."""
    rungs: tuple[Rung, ...]
    """All that are planned."""
    compared: tuple[tuple[Tried, ...], ...]
    """The rungs whose runs have all ended."""
    cells: tuple[Cell, ...]
    """The runs that are known: of the rungs that are compared, and of the next one."""
    undecided: tuple[Cell, ...]
    """Stand-ins for the runs of later rungs, to count them and to estimate their time."""
    choice: Choice | None
    """None until the last rung is compared."""


def tunings_of(
    study: Study, results: Mapping[str, RunResult] | None = None, source: str | None = None
) -> dict[Place, Tuning]:
    """The settings that choose, each with how far it has come; ``results`` by the cells' keys.

    A candidate with a run that diverged comes last, and of equal ones the first of the grid comes first.

    Raises:
        ConfigError: a candidate is impossible, or a run of the tuning has no validation metric.
    """
    if study.tune is None:
        return {}
    parsed: dict[str, RunConfig] = {}
    found = {}
    for arm, point in [(each, point) for each in study.arms if each.tuned for point in study.points(each)]:
        candidates = study.tune.candidates(arm)
        trials = {each: setting_cells(study, arm, point, each, study.tune.seeds, source, parsed) for each in candidates}
        found[Place(arm.name, point)] = _tuning(study, Place(arm.name, point), trials, results or {})
    return found


def trial_cells(study: Study, results: Mapping[str, RunResult] | None = None, source: str | None = None) -> list[Cell]:
    """The runs from which the settings choose, as far as they are known; none if the study does not tune."""
    return [cell for tuning in tunings_of(study, results, source).values() for cell in tuning.cells]


def choices_of(study: Study, results: Mapping[str, RunResult]) -> dict[Place, Choice]:
    """The choices of the settings whose trials have all ended; arguments and errors as for :func:`tunings_of`."""
    tunings = tunings_of(study, results)
    return {place: tuning.choice for place, tuning in tunings.items() if tuning.choice is not None}


def failed_trials(study: Study, results: Mapping[str, RunResult], failed: Collection[str]) -> dict[Place, int]:
    """How many runs failed in the tuning of each setting that has not chosen; ``failed`` are their keys."""
    found = {}
    for place, tuning in tunings_of(study, results).items():
        number = len({cell.key for cell in tuning.cells if cell.key in failed and cell.key not in results})
        if number:
            found[place] = number
    return found


def _tuning(
    study: Study, place: Place, trials: Mapping[Candidate, Sequence[Cell]], results: Mapping[str, RunResult]
) -> Tuning:
    assert study.tune is not None, "it tunes"
    left = list(trials)
    length = length_of(trials[left[0]][0].config)
    rungs = rungs_of(len(left), study.tune.halving, length.number)
    compared: list[tuple[Tried, ...]] = []
    known: list[Cell] = []
    undecided: list[Cell] = []
    for number, rung in enumerate(rungs):
        # Where the rung before is not compared, the first candidates stand for those that it will keep.
        left = _best(compared[-1], rung.candidates) if number and compared else left[: rung.candidates]
        found = {each: _trial(study, trials[each], rung) for each in left}
        cells = [cell for each in found.values() for cell in each]
        if number > len(compared):
            undecided += [replace(cell, key=UNDECIDED + cell.key) for cell in cells]
            continue
        known += cells
        if all(cell.key in results for cell in cells):
            compared.append(tuple(_tried(study, each, own, results) for each, own in found.items()))
    choice = None
    if len(compared) == len(rungs):
        # min takes the first of equals.
        chosen = min(compared[-1], key=lambda tried: tried.cost)
        choice = Choice(place=place, rungs=tuple(compared), chosen=chosen)
    return Tuning(
        place=place,
        length=length,
        rungs=tuple(rungs),
        compared=tuple(compared),
        cells=tuple(known),
        undecided=tuple(undecided),
        choice=choice,
    )


def _trial(study: Study, cells: Sequence[Cell], rung: Rung) -> list[Cell]:
    """A candidate's runs in a rung. Without halving, the budget itself may be what is tried."""
    assert study.tune is not None, "it tunes"
    cells = cells if study.tune.halving is None else shortened(cells, rung.budget)
    return [replace(cell, tuning=True) for cell in cells]


def _best(compared: Sequence[Tried], number: int) -> list[Candidate]:
    """The candidates that go on to the next rung, in the grid's order."""
    kept = sorted(compared, key=lambda tried: tried.cost)[:number]  # a stable sort: of equals, the first go on
    return [tried.candidate for tried in compared if tried in kept]


def _tried(study: Study, candidate: Candidate, cells: Sequence[Cell], results: Mapping[str, RunResult]) -> Tried:
    runs = [results[cell.key] for cell in cells]
    scores = tuple(_validation(run, cell) for run, cell in zip(runs, cells, strict=True))
    mean = (study.metric or runs[0].metric).sign * sum(scores) / len(scores)
    cost = math.inf if math.isnan(mean) else float(f"{mean:.12g}")
    return Tried(candidate=candidate, cells=tuple(cells), scores=scores, cost=cost)


def _validation(run: RunResult, cell: Cell) -> float:
    if run.validation is None and run.status == "diverged":
        return math.nan
    if run.validation is None or run.metric.name not in run.validation:
        expected = "a task with validation data (for classification, set data.validation_fraction)"
        raise ConfigError(f"tune: {cell.label}", "no validation metric", expected)
    value = run.validation[run.metric.name]
    return math.nan if value is None else value
