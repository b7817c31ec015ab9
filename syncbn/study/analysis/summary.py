"""A study's results by setting: an arm at a place on the axes, over all seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncbn.study.analysis.layout import Layout, layout_of
from syncbn.study.analysis.statistics import Centre, centre_of
from syncbn.study.plan.grid import Cell, Point, Study, Value

if TYPE_CHECKING:
    from syncbn.train.result import RunResult


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One arm at one place, over all seeds. Errors are fractions of the test images.

    >>> from syncbn.study import load_study
    >>> from syncbn.study.plan.grid import study_cells
    >>> study = load_study("quickstart")
    >>> setting = summary_of(study, study_cells(study), results={}).settings["sync", ()]
    >>> setting.label, setting.missing
    ('SyncBatchNorm', 3)
    """

    arm: str
    label: str
    reference: bool
    point: Point
    normalization_batch_size: int | None
    """Samples that share statistics; None without batch statistics."""
    keys: tuple[str, ...]
    """Of its runs, in the order of the study's seeds. Settings of the same keys are the same runs."""
    results: tuple[RunResult | None, ...]
    """In the same order; None where a run has no result."""
    errors: tuple[float, ...]
    """Test errors in the same order; NaN for a run that diverged or has no result."""
    error: Centre
    """Of the runs that finished."""
    finished: int
    diverged: int
    missing: int
    level: bool = False
    """Whether the same runs stand at several places of this arm, as no axis that varies between them changes it."""

    @property
    def runs(self) -> list[RunResult]:
        """The results there are."""
        return [result for result in self.results if result is not None]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All settings of a study, by arm and place."""

    study: Study
    layout: Layout
    settings: Mapping[tuple[str, Point], Setting]
    """In the order of the study's arms, and of the places within."""

    def at(self, point: Point) -> list[Setting]:
        """The arms that are run at a place, in the study's order."""
        return [setting for (_, place), setting in self.settings.items() if place == point]

    def across(self, arm: str, panel: Point) -> list[tuple[int, Setting]]:
        """An arm's settings within a panel, from left to right, each with its position's number."""
        values: Sequence[Value] = self.layout.values or (None,)
        found = [(i, self.settings.get((arm, self.layout.point(panel, value)))) for i, value in enumerate(values)]
        return [(i, setting) for i, setting in found if setting is not None]


def summary_of(study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult]) -> Summary:
    """The settings of a study; ``results`` by the cells' keys."""
    by_place = {(cell.arm, cell.point, cell.seed): cell for cell in cells}
    places = [(arm, point) for arm in study.arms for point in study.points(arm)]
    columns = [[by_place[arm.name, point, seed] for seed in study.seeds] for arm, point in places]
    found = [[results.get(cell.key) for cell in column] for column in columns]
    errors = [[error_of(result) for result in column] for column in found]
    settings = {}
    places_of = Counter((arm.name, column[0].key) for (arm, _), column in zip(places, columns, strict=True))
    for (arm, point), column, runs, scores in zip(places, columns, found, errors, strict=True):
        ended = sum(run is not None for run in runs)
        finished = sum(not math.isnan(score) for score in scores)
        settings[arm.name, point] = Setting(
            arm=arm.name,
            label=arm.label,
            reference=arm.reference,
            point=point,
            normalization_batch_size=column[0].config.normalization_batch_size,
            keys=tuple(cell.key for cell in column),
            results=tuple(runs),
            errors=tuple(scores),
            error=centre_of(scores),
            finished=finished,
            diverged=ended - finished,
            missing=len(runs) - ended,
            level=places_of[arm.name, column[0].key] > 1,
        )
    return Summary(study=study, layout=layout_of(study), settings=settings)


def error_of(result: RunResult | None) -> float:
    """The test error of a run that finished, NaN for any other."""
    if result is None or result.status == "diverged" or result.test_error is None:
        return math.nan
    return float(result.test_error)


def by_badness(settings: Sequence[Setting]) -> list[Setting]:
    """The worst first and the reference last: divergence throughout above all, settings without a result last."""
    return sorted(settings, key=lambda setting: (setting.reference, -_badness(setting)))


def _badness(setting: Setting) -> float:
    if setting.finished == 0:
        return 2.0 if setting.diverged else -1.0
    return setting.error.mean
