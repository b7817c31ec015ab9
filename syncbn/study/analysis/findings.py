"""What a study's planned contrasts came to: effects with intervals, tests, and a verdict from a short list."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from syncbn.study.analysis import statistics
from syncbn.study.analysis.summary import Summary
from syncbn.study.plan.grid import Contrast
from syncbn.train.result import Metric

Verdict = Literal["better", "worse", "no difference shown", "no worse", "too few seeds", "diverged"]
"""``better``, ``worse``: the test shows a difference. ``no worse``: it shows that the difference is smaller than the
margin. ``no difference shown``: it shows neither. ``too few seeds``: fewer than ``MIN_SEEDS``. ``diverged``: a run
diverged, and a comparison of the surviving seeds would favour the setting that loses its worst ones."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One contrast over the seeds that all of its settings finished. Scores and differences of them are as the task
    gives them, so those of a metric in percent are fractions; what is unknown is NaN."""

    contrast: Contrast
    metric: Metric
    """What the settings are compared by."""
    pairs: tuple[tuple[int, float, float], ...]
    """Seed, score of the first setting, score of the second; with ``minus``, the two differences instead."""
    difference: float
    """Mean over the pairs of first minus second, NaN if a run diverged. Below 0 the first is the better one if a lower
    score is better, and above 0 if a higher one is."""
    low: float
    """Lower end of the 95 % interval over seeds (of this contrast alone: not widened for the others)."""
    high: float
    """Upper end of that interval."""
    margin: float | None
    """The contrast's margin, in the unit of the difference."""
    p: float
    """Of the test that decides, corrected over the planned contrasts; NaN until all planned runs have ended."""
    p_no_worse: float
    """Of the equivalence test, corrected over the same; NaN without a margin."""
    p_sign_flip: float
    """Of the sign-flip test, of this contrast alone; NaN below the six seeds with which it can reach 0.05."""
    smallest_effect: float
    """The smallest true difference that these seeds show with 80 % power, for this spread and number of contrasts."""
    test_set_error: float
    """Binomial standard error of the difference from the size of the test set, which the interval does not contain.
    It takes the settings as tested on different samples, so it is too large rather than too small. NaN for a metric
    that is no fraction of the samples."""
    verdict: Verdict | None
    """None until all planned runs of the contrast have ended."""
    diverged: int
    """Runs of the contrast that diverged."""
    missing: int
    """Planned runs of the contrast without a result."""

    @property
    def cost(self) -> float:
        """The difference, above 0 if the first setting is the worse one."""
        return self.metric.sign * self.difference


def findings_of(summary: Summary) -> tuple[Finding, ...]:
    """Evaluate the planned contrasts of a study, in its order.

    Nothing is claimed of a contrast before all its planned runs have ended: to look at a test while runs come in, and
    to stop when it passes, finds differences by chance more often than its level says. Until then a contrast counts in
    the correction of the others as if its p were the largest.
    """
    found = [_uncorrected(summary, contrast) for contrast in summary.study.contrasts]
    # The two hypotheses of a contrast with a margin, "no difference" and "at least the margin", exclude each other.
    bounded = [index for index, finding in enumerate(found) if not math.isnan(finding.p_no_worse)]
    p_values = [finding.p for finding in found] + [found[index].p_no_worse for index in bounded]
    p = statistics.holm(np.array(p_values), [*range(len(found)), *bounded]).tolist()
    found = [replace(finding, p=p[index]) for index, finding in enumerate(found)]
    for index, p_no_worse in zip(bounded, p[len(found) :], strict=True):
        found[index] = replace(found[index], p_no_worse=p_no_worse)
    return tuple(replace(finding, verdict=_verdict(finding)) for finding in found)


def _uncorrected(summary: Summary, contrast: Contrast) -> Finding:
    """A finding without a verdict, with the p values of this contrast alone."""
    study, metric = summary.study, summary.metric
    settings = [summary.settings[place.arm, place.point] for place in contrast.places]
    scores = np.array([setting.scores for setting in settings], dtype=np.float64)
    finished = np.isfinite(scores.sum(axis=0))
    kept = scores[:, finished]
    first, second = kept[:2] if contrast.minus is None else (kept[0] - kept[1], kept[2] - kept[3])
    seeds = [seed for seed, ok in zip(study.seeds, finished, strict=True) if ok]
    samples = max((run.test_samples or 0 for setting in settings for run in setting.runs), default=0)
    samples = samples if metric.of_samples else 0
    resolution = 1 / samples if samples else 0.0
    variance = sum(setting.score.mean * (1 - setting.score.mean) for setting in settings)
    margin = contrast.margin / 100 if contrast.margin is not None and metric.percent else contrast.margin
    diverged, missing = sum(setting.diverged for setting in settings), sum(setting.missing for setting in settings)
    known = diverged == 0  # else the surviving seeds would speak for the setting that lost its worst ones
    ready = known and missing == 0 and len(seeds) >= statistics.MIN_SEEDS
    difference, low, high = statistics.interval(first - second) if known else (math.nan,) * 3
    p = p_no_worse = p_sign_flip = smallest = math.nan
    signed = metric.sign * first, metric.sign * second  # the tests take the lower score for the better one
    if ready:
        p = float(statistics.difference_p(*signed, resolution))
    if ready and margin is not None:
        p_no_worse = float(statistics.no_worse_p(*signed, margin, resolution))
    if ready and len(seeds) >= statistics.SIGN_FLIP_SEEDS:
        # The generator is fixed: a report says the same whenever it is written.
        p_sign_flip = float(statistics.sign_flip_p(first[:, None], second[:, None], rng=np.random.default_rng(0))[0])
    if known:
        smallest = statistics.smallest_effect(*signed, statistics.ALPHA / len(study.contrasts), resolution)
    return Finding(
        contrast=contrast,
        metric=metric,
        pairs=tuple(zip(seeds, first.tolist(), second.tolist(), strict=True)),
        difference=difference,
        low=low,
        high=high,
        margin=margin,
        p=p,
        p_no_worse=p_no_worse,
        p_sign_flip=p_sign_flip,
        smallest_effect=smallest,
        test_set_error=math.sqrt(variance / samples) if samples else math.nan,
        verdict=None,
        diverged=diverged,
        missing=missing,
    )


def _verdict(finding: Finding) -> Verdict | None:
    if finding.missing:
        return None
    if finding.diverged:
        return "diverged"
    if len(finding.pairs) < statistics.MIN_SEEDS:
        return "too few seeds"
    if finding.p_no_worse <= statistics.ALPHA:
        return "no worse"
    if finding.p <= statistics.ALPHA:
        return "better" if finding.cost < 0 else "worse"
    return "no difference shown"
