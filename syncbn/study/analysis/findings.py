"""What a study's planned contrasts came to: effects with intervals, tests, and a verdict from a short list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from syncbn.study.analysis.statistics import (
    ALPHA,
    MIN_SEEDS,
    SIGN_FLIP_SEEDS,
    TEST,
    FloatArray,
    equivalence_p,
    holm,
    interval,
    paired_t_p,
    sign_flip_p,
    smallest_effect,
)
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.contrasts import Contrast

Verdict = Literal["better", "worse", "no difference shown", "no worse", "too few seeds", "diverged"]
"""``better``, ``worse``: the test shows a difference. ``no worse``: the test shows that the difference is smaller than
the margin. ``no difference shown``: it shows neither. ``too few seeds``: fewer than ``MIN_SEEDS``. ``diverged``: a run
diverged, and a comparison of the surviving seeds would favour the setting that loses its worst ones."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One contrast over the seeds that all of its settings finished. Errors are fractions; what is unknown is NaN."""

    contrast: Contrast
    pairs: tuple[tuple[int, float, float], ...]
    """Seed, error of the first setting, error of the second; with ``minus``, the two differences instead."""
    difference: float
    """Mean over the pairs of first minus second: below 0, the first has the lower error."""
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
    """The smallest true difference that these seeds would show with 80 % power, given the spread of the pairs."""
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
    p = [paired_t_p(s.differences) if ok else math.nan for s, ok in zip(scores, ready, strict=True)]
    bounded = [index for index, contrast in enumerate(contrasts) if contrast.margin is not None]
    p_bounded = [
        equivalence_p(scores[i].differences, contrasts[i].margin or 0.0) if ready[i] else math.nan for i in bounded
    ]
    # The two hypotheses of a contrast with a margin, "no difference" and "at least the margin", exclude each other.
    corrected = holm(np.array([*p, *p_bounded]), [*range(len(contrasts)), *bounded])
    p_no_worse = dict(zip(bounded, corrected[len(contrasts) :], strict=True))
    return Findings(
        items=tuple(
            _finding(summary, contrast, s, (float(corrected[i]), float(p_no_worse.get(i, math.nan))))
            for i, (contrast, s) in enumerate(zip(contrasts, scores, strict=True))
        ),
        test=TEST,
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
    diverged: int
    missing: int

    @property
    def differences(self) -> FloatArray:
        return self.first - self.second


def _scores(summary: Summary, contrast: Contrast) -> _Scores:
    settings = _settings(summary, contrast)
    errors = np.array([setting.errors for setting in settings], dtype=np.float64)
    finished = np.isfinite(errors.sum(axis=0))
    kept = errors[:, finished]
    pair = (kept[0], kept[1]) if contrast.minus is None else (kept[0] - kept[1], kept[2] - kept[3])
    return _Scores(
        seeds=tuple(seed for seed, ok in zip(summary.study.seeds, finished, strict=True) if ok),
        first=pair[0],
        second=pair[1],
        diverged=sum(setting.diverged for setting in settings),
        missing=sum(setting.missing for setting in settings),
    )


def _finding(summary: Summary, contrast: Contrast, scores: _Scores, p: tuple[float, float]) -> Finding:
    differences, contrasts = scores.differences, len(summary.study.contrasts)
    known = scores.diverged == 0
    difference, low, high = interval(differences) if known else (math.nan,) * 3
    return Finding(
        contrast=contrast,
        pairs=tuple(zip(scores.seeds, scores.first.tolist(), scores.second.tolist(), strict=True)),
        difference=difference,
        low=low,
        high=high,
        p=p[0],
        p_no_worse=p[1],
        p_sign_flip=_sign_flip_p(scores) if not math.isnan(p[0]) else math.nan,
        smallest_effect=smallest_effect(differences, ALPHA / contrasts) if known else math.nan,
        test_set_error=_test_set_error(_settings(summary, contrast)),
        verdict=_verdict(scores, difference, p),
        diverged=scores.diverged,
        missing=scores.missing,
    )


def _sign_flip_p(scores: _Scores) -> float:
    if len(scores.seeds) < SIGN_FLIP_SEEDS:
        return math.nan
    rng = np.random.default_rng(0)  # fixed: a report says the same whenever it is written
    return float(sign_flip_p(scores.first[:, None], scores.second[:, None], rng=rng)[0])


def _verdict(scores: _Scores, difference: float, p: tuple[float, float]) -> Verdict | None:
    if scores.missing:
        return None
    if scores.diverged:
        return "diverged"
    if len(scores.seeds) < MIN_SEEDS:
        return "too few seeds"
    if p[1] <= ALPHA:
        return "no worse"
    if p[0] <= ALPHA:
        return "better" if difference < 0 else "worse"
    return "no difference shown"


def _test_set_error(settings: Sequence[Setting]) -> float:
    """NaN where the runs do not say how many images they were tested on."""
    images = max((run.test_images or 0 for setting in settings for run in setting.runs), default=0)
    if not images:
        return math.nan
    return math.sqrt(sum(s.error.mean * (1 - s.error.mean) for s in settings) / images)


def _settings(summary: Summary, contrast: Contrast) -> list[Setting]:
    return [summary.settings[place.arm, place.point] for place in contrast.places]
