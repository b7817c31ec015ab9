"""What a study's planned contrasts came to: effects with intervals, tests, and a verdict from a short list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from syncbn.study.analysis.statistics import (
    ALPHA,
    MIN_SEEDS,
    SIGN_FLIP_SEEDS,
    SPREAD_FLOOR,
    TEST,
    FloatArray,
    difference_p,
    holm,
    interval,
    no_worse_p,
    sign_flip_p,
    smallest_effect,
)
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.contrasts import Contrast

Verdict = Literal["better", "worse", "no difference shown", "no worse", "too few seeds", "diverged"]
"""``better``, ``worse``: the test shows a difference. ``no worse``: it shows that the difference is smaller than the
margin. ``no difference shown``: it shows neither. ``too few seeds``: fewer than ``MIN_SEEDS``. ``diverged``: a run
diverged, and a comparison of the surviving seeds would favour the setting that loses its worst ones."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One contrast over the seeds that all of its settings finished. Errors are fractions; what is unknown is NaN."""

    contrast: Contrast
    pairs: tuple[tuple[int, float, float], ...]
    """Seed, error of the first setting, error of the second; with ``minus``, the two differences instead."""
    difference: float
    """Mean over the pairs of first minus second: below 0, the first has the lower error. NaN if a run diverged."""
    low: float
    """Lower end of the 95 % interval over seeds (of this contrast alone: not widened for the others)."""
    high: float
    """Upper end of that interval."""
    p: float
    """Of the test that decides, corrected over the planned contrasts; NaN until all planned runs have ended."""
    p_no_worse: float
    """Of the equivalence test, corrected over the same; NaN without a margin."""
    p_sign_flip: float
    """Of the sign-flip test, of this contrast alone; NaN below the six seeds with which it can reach 0.05."""
    smallest_effect: float
    """The smallest true difference that these seeds would show with 80 % power, given the spread of the pairs and the
    number of planned contrasts."""
    test_set_error: float
    """Binomial standard error of the difference from the size of the test set, which the interval does not contain.
    It takes the settings as tested on different images, so it is too large rather than too small."""
    verdict: Verdict | None
    """None until all planned runs of the contrast have ended."""
    diverged: int
    """Runs of the contrast that diverged."""
    missing: int
    """Planned runs of the contrast without a result."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All planned contrasts of a study, in the study's order."""

    items: tuple[Finding, ...]
    test: str
    """The test that decides."""
    spread_floor: float
    """The spread in that test is at least this many times that of the better setting's own errors."""
    contrasts: int
    """Planned contrasts, over which p is corrected."""
    untuned: bool
    """Whether the arms were compared without tuning each one's learning rate and options."""


def findings_of(summary: Summary) -> Findings:
    """Evaluate the planned contrasts of a study.

    Nothing is claimed of a contrast before all its planned runs have ended: to look at a test while runs come in, and
    to stop when it passes, finds differences by chance more often than its level says. Until then a contrast counts in
    the correction of the others as if its p were the largest.
    """
    contrasts = summary.study.contrasts
    scores = [_scores(summary, contrast) for contrast in contrasts]
    ready = [s.missing == s.diverged == 0 and len(s.seeds) >= MIN_SEEDS for s in scores]
    p, p_no_worse = _p_values(contrasts, [s if ok else None for s, ok in zip(scores, ready, strict=True)])
    return Findings(
        items=tuple(map(_finding, contrasts, scores, p, p_no_worse)),
        test=TEST,
        spread_floor=SPREAD_FLOOR,
        contrasts=len(contrasts),
        untuned=True,
    )


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The errors behind a contrast."""

    seeds: tuple[int, ...]
    """That all settings of the contrast finished."""
    first: FloatArray
    """(seeds,): errors of the first setting, or the first differences."""
    second: FloatArray
    resolution: float
    """1 / (test images); 0 if the runs do not say how many there are."""
    test_set_error: float
    contrasts: int
    diverged: int
    missing: int


def _scores(summary: Summary, contrast: Contrast) -> _Scores:
    settings = [summary.settings[place.arm, place.point] for place in contrast.places]
    errors = np.array([setting.errors for setting in settings], dtype=np.float64)
    finished = np.isfinite(errors.sum(axis=0))
    kept = errors[:, finished]
    images = max((run.test_images or 0 for setting in settings for run in setting.runs), default=0)
    return _Scores(
        seeds=tuple(seed for seed, ok in zip(summary.study.seeds, finished, strict=True) if ok),
        first=kept[0] if contrast.minus is None else kept[0] - kept[1],
        second=kept[1] if contrast.minus is None else kept[2] - kept[3],
        resolution=1 / images if images else 0.0,
        test_set_error=_binomial_error(settings, images),
        contrasts=len(summary.study.contrasts),
        diverged=sum(setting.diverged for setting in settings),
        missing=sum(setting.missing for setting in settings),
    )


def _binomial_error(settings: list[Setting], images: int) -> float:
    means = [setting.error.mean for setting in settings]
    return math.sqrt(sum(mean * (1 - mean) for mean in means) / images) if images else math.nan


def _p_values(contrasts: tuple[Contrast, ...], scores: list[_Scores | None]) -> tuple[list[float], list[float]]:
    """Corrected p of the difference and of "no worse" for each contrast; NaN for one without scores."""
    p = [math.nan if s is None else float(difference_p(s.first, s.second, s.resolution)) for s in scores]
    p_no_worse = [
        math.nan if s is None or c.margin is None else float(no_worse_p(s.first, s.second, c.margin, s.resolution))
        for c, s in zip(contrasts, scores, strict=True)
    ]
    # The two hypotheses of a contrast with a margin, "no difference" and "at least the margin", exclude each other.
    bounded = [index for index, value in enumerate(p_no_worse) if not math.isnan(value)]
    corrected = holm(np.array([*p, *(p_no_worse[i] for i in bounded)]), [*range(len(p)), *bounded]).tolist()
    for index, value in zip(bounded, corrected[len(p) :], strict=True):
        p_no_worse[index] = value
    return corrected[: len(p)], p_no_worse


def _finding(contrast: Contrast, scores: _Scores, p: float, p_no_worse: float) -> Finding:
    first, second = scores.first, scores.second
    known = scores.diverged == 0  # else the surviving seeds would speak for the setting that lost its worst ones
    difference, low, high = interval(first - second) if known else (math.nan,) * 3
    flips = not math.isnan(p) and len(first) >= SIGN_FLIP_SEEDS
    # The generator is fixed: a report says the same whenever it is written.
    rng = np.random.default_rng(0)
    return Finding(
        contrast=contrast,
        pairs=tuple(zip(scores.seeds, first.tolist(), second.tolist(), strict=True)),
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_no_worse=p_no_worse,
        p_sign_flip=float(sign_flip_p(first[:, None], second[:, None], rng=rng)[0]) if flips else math.nan,
        smallest_effect=smallest_effect(first, second, ALPHA / scores.contrasts, scores.resolution)
        if known
        else math.nan,
        test_set_error=scores.test_set_error,
        verdict=_verdict(scores, difference, p, p_no_worse),
        diverged=scores.diverged,
        missing=scores.missing,
    )


def _verdict(scores: _Scores, difference: float, p: float, p_no_worse: float) -> Verdict | None:
    if scores.missing:
        return None
    if scores.diverged:
        return "diverged"
    if len(scores.seeds) < MIN_SEEDS:
        return "too few seeds"
    if p_no_worse <= ALPHA:
        return "no worse"
    if p <= ALPHA:
        return "better" if difference < 0 else "worse"
    return "no difference shown"
