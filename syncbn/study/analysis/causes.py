"""Training or estimation: where the cost of small batches comes from.

A batch-normalized model is tested with running statistics, an average over the last steps of training. If its error is
high with them and low with population statistics recomputed from training images with the weights as they are, the
weights are good and only the estimate is not (Wu and Johnson 2021, arXiv 2105.07576, section 3). If it is high with
both and lower with the statistics of the test batch itself, the model reads something from the batch that no fixed
statistics can give it. What stays with all of them is at most what small batches have done to the weights: the error
with a test batch's own statistics has the noise of that batch in it.

Batch renormalization maps a test batch's statistics back to the running ones, so there the division rests on running
and population statistics alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from syncbn.study.analysis.evaluations import FAMILIES, Evaluated, Kind, evaluated, is_renorm
from syncbn.study.analysis.statistics import interval
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.grid import Point
from syncbn.study.report.words import SPACE, percent, place_words, plural, points, some

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

    worse: bool = False
    """Whether the error with population statistics is higher, by more than the scatter of the seeds."""
    renorm: bool = False
    """Whether the test batch's own statistics are none to evaluate with."""

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

        ``none``: there is none to speak of. ``estimation``: population statistics bring it back. ``mismatch``: they do
        not, but the test batch's own statistics bring back most or a part, which fixed statistics cannot give.
        ``training``: no statistics bring it back. ``both``: population statistics bring back a part. Where one of the
        two was not evaluated, ``statistics`` (those of the test batch bring it back; whether others do is unknown) and
        ``not estimation`` (population statistics do not bring it back; whether the batch's own would is unknown).
        """
        if self.cost < MIN_COST or self.low <= 0:
            return "none"
        own = self.back(self.batch) / self.cost  # NaN where that was not evaluated
        if self.population is None:
            return "statistics" if own >= RECOVERED else "training" if own <= KEPT else "both"
        fixed = self.back(self.population[1]) / self.cost
        if fixed >= RECOVERED:
            return "estimation"
        if math.isnan(own):
            return "not estimation" if fixed <= KEPT else "both"
        if own >= RECOVERED or (fixed <= KEPT and own > KEPT):
            return "mismatch"
        return "training" if fixed <= KEPT else "both"


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
        worse=population is not None and _is_higher([line[1] - line[0] for line in lines]),
        renorm=any(is_renorm(run) for run in setting.runs),
    )


def _is_higher(differences: Sequence[float]) -> bool:
    middle, low, _ = interval(np.array(differences))
    return middle >= MIN_COST and low > 0


def causes_of(summary: Summary, items: Mapping[tuple[str, Point], Evaluated]) -> list[Cause]:
    """The causes of each arm's cost, the largest cost first.

    At its smallest normalization batch that has results and where arms are compared; with further axes, in the panel of
    that place.
    """
    shown = summary.study.comparison_point()
    panel = summary.layout.panel_of(shown)
    found = []
    for arm in summary.study.arms:
        here = [items[arm.name, s.point] for _, s in summary.across(arm.name, panel) if (arm.name, s.point) in items]
        smallest = min(here, key=lambda i: (_size(i.setting), i.setting.point != shown), default=None)
        chosen = [item for item in here if item is smallest or item.setting.point == shown]
        found += [cause for item in chosen if (cause := cause_of(summary, item)) is not None]
    return sorted(found, key=lambda cause: -cause.cost)


def cause_words(causes: Sequence[Cause]) -> list[tuple[str, str]]:
    """A line for each setting with a cost, and one for those without: what it is about, and the sentence."""
    words = [_cost_words(cause) for cause in causes if cause.verdict != "none"]
    free = [_name(cause.setting) for cause in causes if cause.verdict == "none"]
    if free:
        least = f"less than {100 * MIN_COST:g}{SPACE}points, or no more than the scatter of the seeds"
        words.append(("No cost to divide", f"{some(free, 8)} ({least})."))
    worse = [
        f"{_name(cause.setting)} ({percent(cause.population[1])} against {percent(cause.running)})"
        for cause in causes
        if cause.population is not None and cause.worse
    ]
    if worse:
        words.append(("Population statistics worse than the running ones", f"{some(worse, 8)}."))
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
    name, verdict = _name(cause.setting), cause.verdict
    title, why = {
        "estimation": ("the estimate", _estimation),
        "mismatch": ("the mismatch of training and inference", _mismatch),
        "training": ("the training", _training),
        "statistics": ("the statistics", _statistics),
        "not estimation": ("not the estimate", _not_estimation),
        "both": ("both", _both),
    }[verdict]
    if verdict == "mismatch" and _in_weights(cause) > KEPT * cause.cost:
        title += ", and the training"
    words = why(cause)
    if cause.renorm:
        words += (
            " This rests on running and population statistics only: batch renormalization maps the test batch's own"
            " statistics back to the running ones."
        )
    return f"{name}: {title}", words


def _estimation(cause: Cause) -> str:
    assert cause.population is not None
    kind, error = cause.population
    return (
        f"{_part(cause, error)} come back with {kind_words(kind)}, the weights as they are: {_becomes(cause, error)}."
    )


def _mismatch(cause: Cause) -> str:
    assert cause.population is not None
    words = (
        f"{_part(cause, cause.batch)} come back with {kind_words(_BATCH)} ({_becomes(cause, cause.batch)}), but "
        f"population statistics leave {percent(cause.population[1])}: the model reads something from the batch itself "
        "that fixed statistics cannot give."
    )
    if _in_weights(cause) > KEPT * cause.cost:
        words += f" At most {points(_in_weights(cause))} points are in the weights; {_NOISE}."
    return words


def _training(cause: Cause) -> str:
    kind, error = cause.best
    part = "All" if cause.back(error) <= 0 else f"{points(_in_weights(cause))} of"
    why = f"{part} the {_lost(cause)} stay with the best statistics, {kind_words(kind)}: {_becomes(cause, error)}."
    return f"{why} The weights themselves are worse, unless the noise of small test batches hides what they would give."


def _statistics(cause: Cause) -> str:
    return (
        f"{_part(cause, cause.batch)} come back with {kind_words(_BATCH)}: {_becomes(cause, cause.batch)}. Population "
        "statistics, which would tell a bad estimate from a model that reads its batch, were not evaluated."
    )


def _not_estimation(cause: Cause) -> str:
    assert cause.population is not None
    kind, error = cause.population
    part = "All" if cause.back(error) <= 0 else f"{points(cause.cost - cause.back(error))} of"
    return (
        f"{part} the {_lost(cause)} stay with {kind_words(kind)}: {_becomes(cause, error)}. The estimate is not to "
        "blame; worse weights and weights that rely on their own batch cannot be told apart here."
    )


def _both(cause: Cause) -> str:
    if cause.population is None:
        return (
            f"{_part(cause, cause.batch)} come back with {kind_words(_BATCH)} ({_becomes(cause, cause.batch)}); at "
            f"most {points(_in_weights(cause))} are in the weights."
        )
    kind, error = cause.population
    back = cause.back(error)
    words = f"Of {_lost(cause)}, {points(back)} come back with {kind_words(kind)} ({_becomes(cause, error)})"
    if math.isnan(cause.batch):
        return (
            f"{words}; the other {points(cause.cost - back)} are in the weights, or in what they take from their batch."
        )
    more = cause.back(cause.batch) - back
    if more >= MIN_COST:
        words += f", {points(more)} more with {kind_words(_BATCH)} ({percent(cause.batch)}), which no fixed ones give"
    return f"{words}; at most {points(_in_weights(cause))} are in the weights."


_NOISE = "less, as far as the noise of the test batches is in that error"


def _in_weights(cause: Cause) -> float:
    """What no statistics bring back."""
    return max(cause.cost - cause.back(cause.best[1]), 0.0)


def _lost(cause: Cause) -> str:
    base = place_words(_differing(cause)) if cause.base.arm == cause.setting.arm else cause.base.label
    return f"{points(cause.cost)} points lost against {base} ({percent(cause.running - cause.cost)})"


def _part(cause: Cause, error: float) -> str:
    """ "All the 40.0 points lost against ...", or how many of them, are gone at an error."""
    return ("All" if cause.back(error) >= cause.cost else f"{points(cause.back(error))} of") + f" the {_lost(cause)}"


def _becomes(cause: Cause, error: float) -> str:
    return f"{percent(cause.running)} becomes {percent(error)}"


def _base(summary: Summary, setting: Setting) -> Setting | None:
    """What a setting's cost is measured against.

    The same arm with the largest normalization batch beside it; where it has none that is larger, the reference at
    the same place if it is better, or else the best arm there.
    """
    size = _size(setting)
    panel = summary.layout.panel_of(setting.point)
    beside = [s for _, s in summary.across(setting.arm, panel) if s.finished and _size(s) > size]
    if beside:
        return max(beside, key=_size)
    others = [s for s in summary.at(setting.point) if s.finished and s.arm != setting.arm]
    reference = next((s for s in others if s.reference), None)
    if reference is not None and reference.error.mean < setting.error.mean:
        return reference
    return min(others, key=lambda s: s.error.mean, default=None)


def _size(setting: Setting) -> int:
    return setting.normalization_batch_size or 0


def _differing(cause: Cause) -> Point:
    """Where the base lies, as far as it is not where the setting is."""
    return tuple(pair for pair in cause.base.point if pair not in cause.setting.point)


def _name(setting: Setting) -> str:
    place = place_words(setting.point)
    return f"{setting.label} at {place}" if place else setting.label
