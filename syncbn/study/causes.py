"""Training or estimation: where the cost of small batches comes from.

A batch-normalized model is tested with running statistics, an average over the last steps of training. If its error is
high with them and low with the statistics of the test batch, or with population statistics recomputed from training
images with the weights as they are, the weights are good and only the estimate is not. If it stays high with all of
them, small batches have hurt the training itself (Wu and Johnson 2021, arXiv 2105.07576, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from syncbn.study.evaluations import FAMILIES, Evaluated, Kind, evaluated
from syncbn.study.plan import Point
from syncbn.study.statistics import interval
from syncbn.study.summary import Setting, Summary
from syncbn.study.words import SPACE, percent, place_words, plural, points, some

RECOVERED, KEPT = 0.8, 0.2
"""Shares of the cost from which on it is called one of estimation, and up to which it is called one of training."""
MIN_COST = 0.005
"""A cost below this (a fraction of the test images) is not divided into shares: it would be noise that is divided."""
_RUNNING, _BATCH = Kind(statistics="running"), Kind(statistics="batch")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Where the cost of a setting comes from, in error (fractions), as means over the seeds that both have."""

    setting: Setting
    base: Setting
    """What the cost is measured against."""
    cost: float
    """Error with running statistics above the base's."""
    low: float
    """Lower end of the 95 % interval of the cost; NaN below two seeds."""
    running: float
    """Error with running statistics."""
    population: tuple[Kind, float] | None
    """The better estimate of the population's statistics, and the error with it."""
    batch: float
    """Error with the test batch's own statistics; NaN where that was not evaluated."""

    @property
    def best(self) -> tuple[Kind, float]:
        """The statistics that leave the least error, and that error."""
        found = [] if self.population is None else [self.population]
        found += [] if math.isnan(self.batch) else [(_BATCH, self.batch)]
        return min(found, key=lambda pair: pair[1])

    def back(self, error: float) -> float:
        """How much of the cost is gone at an error."""
        return self.running - error

    @property
    def verdict(self) -> str:
        """What the cost is of.

        ``none``: there is none to speak of. ``estimation``: population statistics bring it back. ``mismatch``: only
        the test batch's own statistics do; the weights have learnt to go with those of small batches. ``training``:
        no statistics bring it back. ``both``: they bring back a part.
        """
        if self.cost < MIN_COST or self.low <= 0:
            return "none"
        if self.population is not None and self.back(self.population[1]) >= RECOVERED * self.cost:
            return "estimation"
        share = self.back(self.best[1]) / self.cost
        if share >= RECOVERED:
            return "mismatch" if self.population is not None else "estimation"
        return "training" if share <= KEPT else "both"


def cause_of(summary: Summary, item: Evaluated) -> Cause | None:
    """Divide the cost of a setting; None where there is nothing to measure it against, or no other statistics."""
    base, setting = _base(summary, item.setting), item.setting
    populations = [kind for kind in map(item.largest, FAMILIES) if kind is not None and kind.statistics == "population"]
    population = min(populations, key=lambda kind: item.errors[kind].mean, default=None)
    others = [kind for kind in (population, _BATCH) if kind is not None and kind in item.errors]
    if base is None or not others:
        return None
    columns = [[evaluated(result, kind) for result in setting.results] for kind in (_RUNNING, *others)]
    lines = [line for line in zip(*columns, base.errors, strict=True) if not any(map(math.isnan, line))]
    if not lines:
        return None
    means = dict(
        zip((_RUNNING, *others), (sum(column) / len(lines) for column in zip(*lines, strict=True)), strict=False)
    )
    cost, low, _ = interval(np.array([line[0] - line[-1] for line in lines]))
    return Cause(
        setting=setting,
        base=base,
        cost=cost,
        low=low,
        running=means[_RUNNING],
        population=None if population is None else (population, means[population]),
        batch=means.get(_BATCH, math.nan),
    )


def causes_of(summary: Summary, items: Mapping[tuple[str, Point], Evaluated]) -> list[Cause]:
    """The causes of each arm's cost at its smallest normalization batch that has results, the largest cost first.

    With further axes, in the panel in which arms are compared.
    """
    panel = summary.layout.panel_of(summary.study.comparison_point())
    found = []
    for arm in summary.study.arms:
        here = [items[arm.name, s.point] for _, s in summary.across(arm.name, panel) if (arm.name, s.point) in items]
        smallest = min(here, key=lambda item: item.setting.normalization_batch_size or 0, default=None)
        cause = None if smallest is None else cause_of(summary, smallest)
        if cause is not None:
            found.append(cause)
    return sorted(found, key=lambda cause: -cause.cost)


def cause_words(causes: Sequence[Cause]) -> list[tuple[str, str]]:
    """A line for each arm with a cost, and one for those without: what it is about, and the sentence."""
    words = [_cost_words(cause) for cause in causes if cause.verdict != "none"]
    free = [cause.setting.label for cause in causes if cause.verdict == "none"]
    if free:
        least = f"less than {100 * MIN_COST:g}{SPACE}points, or no more than the scatter of the seeds"
        words.append(("No cost to divide", f"{some(free, 8)} ({least})."))
    return words


def estimator_words(items: Mapping[tuple[str, Point], Evaluated]) -> str:
    """How far the two estimators of the population's variance are apart, where they are farthest."""
    apart = []
    for item in items.values():
        kinds = [item.largest(f"population {name}") for name in ("mean", "total")]
        if None not in kinds:
            mean, total = (item.errors[kind].mean for kind in kinds if kind is not None)
            apart.append((abs(mean - total), mean, total, item.setting))
    if not apart:
        return ""
    difference, mean, total, setting = max(apart, key=lambda entry: entry[0])
    return (
        f"The two estimators of the population's variance end at most {points(difference)} points apart "
        f"({_name(setting)}: {percent(mean)} with the mean of the batches' variances, {percent(total)} with the total)."
    )


def kind_words(kind: Kind) -> str:
    """A kind of statistics within a sentence."""
    if kind.statistics != "population":
        return "the test batch's own statistics"
    estimator = {"mean": "mean of the batches' variances", "total": "total variance"}.get(
        kind.estimator, kind.estimator
    )
    return f"population statistics of {plural(kind.samples, 'image')} ({estimator})"


def _cost_words(cause: Cause) -> tuple[str, str]:
    name, cost = _name(cause.setting), points(cause.cost)
    base = place_words(_differing(cause)) if cause.base.arm == cause.setting.arm else cause.base.label
    lost = f"points lost against {base} ({percent(cause.running - cause.cost)})"
    kind, error = cause.best
    if cause.verdict == "estimation" and cause.population is not None:
        kind, error = cause.population
    becomes = f"{percent(cause.running)} becomes {percent(error)}"
    back, left = points(cause.back(error)), points(max(cause.cost - cause.back(error), 0.0))
    if cause.verdict == "estimation":
        part = "All" if cause.back(error) >= cause.cost else f"{back} of"
        why = f"{part} the {cost} {lost} come back with {kind_words(kind)}, the weights as they are: {becomes}."
        return f"{name}: the estimate", why
    if cause.verdict == "mismatch":
        assert cause.population is not None
        part = "All" if cause.back(error) >= cause.cost else f"{back} of"
        why = (
            f"{part} the {cost} {lost} come back with {kind_words(kind)} ({becomes}), but population statistics leave "
            f"{percent(cause.population[1])}: the weights have learnt to go with the statistics of such batches."
        )
        return f"{name}: the mismatch of training and inference", why
    if cause.verdict == "training":
        part = "All" if cause.back(error) <= 0 else f"{left} of"
        why = f"{part} the {cost} {lost} stay with the best statistics, {kind_words(kind)}: {becomes}."
        return f"{name}: the training", f"{why} The weights themselves are worse."
    why = f"Of {cost} {lost}, {back} come back with {kind_words(kind)} ({becomes}); {left} are in the weights."
    return f"{name}: both", why


def _base(summary: Summary, setting: Setting) -> Setting | None:
    """What a setting's cost is measured against.

    The same arm with the largest normalization batch beside it; where it has none that is larger, the reference at
    the same place if it is better, or else the best arm there.
    """
    size = setting.normalization_batch_size or 0
    panel = summary.layout.panel_of(setting.point)
    beside = [
        s for _, s in summary.across(setting.arm, panel) if s.finished and (s.normalization_batch_size or 0) > size
    ]
    if beside:
        return max(beside, key=lambda s: s.normalization_batch_size or 0)
    others = [s for s in summary.at(setting.point) if s.finished and s.arm != setting.arm]
    reference = next((s for s in others if s.reference), None)
    if reference is not None and reference.error.mean < setting.error.mean:
        return reference
    return min(others, key=lambda s: s.error.mean, default=None)


def _differing(cause: Cause) -> Point:
    """Where the base lies, as far as it is not where the setting is."""
    return tuple(pair for pair in cause.base.point if pair not in cause.setting.point)


def _name(setting: Setting) -> str:
    place = place_words(setting.point)
    return f"{setting.label} at {place}" if place else setting.label
