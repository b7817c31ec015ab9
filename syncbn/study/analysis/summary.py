"""A study's results by setting (an arm at a place on the axes, over all seeds), and how the axes are laid out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product

from syncbn.study.analysis.statistics import Centre, centre_of
from syncbn.study.plan.grid import HOLD, Candidate, Cell, Place, Point, Study, Value
from syncbn.study.plan.tuning import failed_trials
from syncbn.train.config import ConfigError
from syncbn.train.result import Metric, RunResult
from syncbn.train.tasks.classification import Classification


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One arm at one place, over all seeds.

    >>> from syncbn.study.plan.study_file import load_study
    >>> from syncbn.study.analysis.summary import summary_of
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
    scores: tuple[float, ...]
    """The task's metric on the test set, in the same order; NaN for a run that diverged or has no result."""
    score: Centre
    """Of the runs that finished."""
    finished: int
    diverged: int
    missing: int
    failed: tuple[str, ...] = ()
    """The keys of its runs that failed."""
    failed_trials: int = 0
    """Runs of its tuning that failed. It cannot choose before they have ended."""
    chosen: Candidate | None = None
    """What it chose in the study's tuning; None if it does not tune, or has not chosen yet."""

    @property
    def runs(self) -> list[RunResult]:
        """The results there are."""
        return [result for result in self.results if result is not None]


@dataclass(frozen=True)
class LayerMeans:
    """One layer of one setting; NaN where no run has the number. See :class:`syncbn.population.LayerDivergence`."""

    count: float
    """Values per channel in one normalization batch."""
    kl: float
    """Divergence of a batch's statistics from the population's."""
    effective: float
    """Independent values that would diverge as much."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All settings of a study, with one axis laid out across and a panel for each place on the others."""

    study: Study
    settings: Mapping[tuple[str, Point], Setting]
    """By arm and place, in the order of the study's arms, and of the places within."""
    across: str | None
    """The axis that goes across; None where arms are compared at single places."""
    values: tuple[Value, ...]
    """Its values from left to right."""
    panels: tuple[Point, ...]
    """The places on the other axes; one empty place where there are none."""
    metric: Metric
    """What its settings are compared by: the metric of its results, or of its tuning while there is none, or the error
    of classification."""

    def panel_of(self, point: Point) -> Point:
        """The panel in which a place lies."""
        return tuple((name, value) for name, value in point if name != self.across)

    def at(self, point: Point) -> list[Setting]:
        """The arms that are run at a place, in the study's order."""
        return [setting for (_, place), setting in self.settings.items() if place == point]

    def along(self, arm: str, panel: Point) -> dict[int, Setting]:
        """An arm's settings within a panel, from left to right, by their position's number."""
        found = [s for (name, point), s in self.settings.items() if name == arm and self.panel_of(point) == panel]
        places = [self.values.index(dict(s.point)[self.across]) if self.across is not None else 0 for s in found]
        return dict(sorted(zip(places, found, strict=True), key=lambda pair: pair[0]))


def summary_of(
    study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult], failed: Collection[str] = ()
) -> Summary:
    """The settings of a study; ``results`` by the cells' keys, and ``failed`` the keys of the runs that failed.

    Raises ConfigError if two of the runs have different metrics.
    """
    stuck = failed_trials(study, results, failed) if failed else {}
    by_place = {(cell.arm, cell.point, cell.seed): cell for cell in cells}
    settings = {}
    for arm, point in [(each, point) for each in study.arms for point in study.points(each)]:
        column = [by_place[arm.name, point, seed] for seed in study.seeds]
        runs = [results.get(cell.key) for cell in column]
        scores = [score_of(run) for run in runs]
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
            scores=tuple(scores),
            score=centre_of(scores),
            finished=finished,
            diverged=ended - finished,
            missing=len(runs) - ended,
            failed=tuple(cell.key for cell in column if cell.key in failed and cell.key not in results),
            failed_trials=stuck.get(Place(arm.name, point), 0),
            chosen=column[0].candidate or None,
        )
    across, values = _axis_across(study)
    others = [[(name, value) for value in of] for name, of in study.axes.items() if name != across]
    return Summary(
        study=study,
        settings=settings,
        across=across,
        values=values,
        panels=tuple(product(*others)),
        metric=_metric_of(study, [run for s in settings.values() for run in s.runs] or _first(study, results)),
    )


def layer_means(setting: Setting) -> dict[str, LayerMeans]:
    """The layers of a setting, in the order of the model: means over its runs; empty without batch statistics."""
    found: dict[str, list[dict[str, float | None]]] = defaultdict(list)
    for run in setting.runs:
        for entry in run.layers:
            found[str(entry.get("layer"))].append(entry)
    return {
        layer: LayerMeans(*(_mean(entries, f.name) for f in fields(LayerMeans))) for layer, entries in found.items()
    }


def _mean(entries: Sequence[dict[str, float | None]], name: str) -> float:
    values = [float(value) for entry in entries if (value := entry.get(name)) is not None]
    return sum(values) / len(values) if values else math.nan


def score_of(result: RunResult | None) -> float:
    """The metric of a run that finished, NaN for any other, and where the metric is not finite."""
    if result is None or result.status == "diverged" or not math.isfinite(result.score):
        return math.nan
    return float(result.score)


def by_badness(settings: Sequence[Setting], metric: Metric) -> list[Setting]:
    """The worst first and the reference last: divergence throughout above all, settings without a result last."""

    def badness(setting: Setting) -> float:
        if setting.finished == 0:
            return math.inf if setting.diverged else -math.inf
        return metric.sign * setting.score.mean

    return sorted(settings, key=lambda setting: (setting.reference, -badness(setting)))


def _metric_of(study: Study, runs: Sequence[RunResult]) -> Metric:
    if study.metric is not None:  # the file's, whose direction may have been corrected since the runs
        other = next((run.metric.name for run in runs if run.metric.name != study.metric.name), None)
        if other is not None:
            expected = f"{other}, as runs in the study's folder have it; use another folder"
            raise ConfigError(f"{study.name}: metric", study.metric.name, expected)
        return study.metric
    found = list(dict.fromkeys(run.metric for run in runs)) or [Classification.metric]
    if len(found) > 1:
        one, two = found[:2]
        words = f"{one}, not {two}" if one.name == two.name else one.name
        raise ConfigError(f"{study.name}: metric", two.name, f"{words}, as other runs of the study have it")
    return found[0]


def _first(study: Study, results: Mapping[str, RunResult]) -> list[RunResult]:
    """A run whose metric is the study's, such as one of its tuning, unless its file names the metric."""
    return [] if study.metric is not None else [*results.values()][:1]


def _axis_across(study: Study) -> tuple[str | None, tuple[Value, ...]]:
    """The axis that goes across, and its values from left to right.

    The sweep goes across, the largest batch on the left: what is lost by smaller ones is then on the right, as in Wu
    and He's figures (2018, Group Normalization). Without a sweep it is the first axis with at least three numbers,
    rising unless the study's file has them falling; without that, nothing.
    """
    if study.sweep is not None and len(study.sweep.values) > 1:
        return study.sweep.vary, tuple(sorted(study.sweep.values, reverse=True))
    for name, values in study.axes.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if name != HOLD and len(numbers) == len(values) >= 3:
            falling = sorted(numbers, reverse=True)
            return name, tuple(falling if numbers == falling else falling[::-1])
    return None, ()
