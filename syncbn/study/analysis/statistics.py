"""What a few seeds say: pure functions over arrays of test errors whose first axis is the seed.

**Interval.** Student's t. At the few seeds that a study has, bootstraps of the mean fall far short of their nominal
coverage. Share of 20,000 simulated studies whose 95 % interval held the true mean, in percent:

| scores | seeds | Student's t | BCa | percentile | basic |
|---|---|---|---|---|---|
| normal | 3 / 6 / 10 | 95.1 / 94.9 / 95.1 | 72.2 / 85.6 / 90.1 | 75.1 / 85.6 / 90.2 | 75.4 / 85.8 / 90.3 |
| gamma of shape 2 | 3 / 6 / 10 | 92.2 / 91.8 / 92.5 | 70.3 / 84.9 / 88.9 | 72.5 / 83.8 / 88.2 | 71.1 / 82.2 / 86.8 |

**Test.** Student's t of the paired differences, corrected by Holm over the planned contrasts, with a floor under the
spread: the standard deviation is at least ``SPREAD_FLOOR`` = 1.6 times that of the better setting's own scores. Test
errors are skewed to the right, as a run may fail badly but not succeed as much. A setting that looks better may have
such runs that a few seeds have missed, and the plain t test is then wrong too often.

Studies with a false claim among 1 / 3 / 6 contrasts, in percent of 20,000 simulated ones (standard error at most 0.2).
"alike": all settings have the same distribution. "narrow", "steady": the reference has the same mean, and a third of
the spread or none, which makes the differences skewed:

| scores | reference | 3 seeds | 5 seeds | 6 seeds | 10 seeds |
|---|---|---|---|---|---|
| normal | alike | 0.9 / 0.3 / 0.1 | 1.6 / 1.0 / 0.5 | 1.9 / 1.0 / 0.6 | 2.1 / 1.3 / 1.0 |
| normal | steady | 3.6 / 3.5 / 3.5 | 3.3 / 3.1 / 2.9 | 2.8 / 2.8 / 2.8 | 2.8 / 2.7 / 2.6 |
| gamma of shape 2 | alike | 1.2 / 0.5 / 0.2 | 2.1 / 1.0 / 0.7 | 2.7 / 1.5 / 0.8 | 3.4 / 2.4 / 1.8 |
| gamma of shape 2 | narrow | 2.4 / 1.4 / 0.8 | 3.6 / 3.0 / 2.5 | 3.5 / 3.2 / 3.1 | 3.0 / 2.9 / 3.0 |
| gamma of shape 2 | steady | 4.2 / 4.6 / 4.6 | 3.8 / 4.0 / 4.2 | 3.4 / 3.5 / 3.9 | 2.5 / 2.5 / 2.6 |
| log-normal, sigma 0.5 | steady | 4.0 / 3.8 / 4.0 | 3.4 / 3.4 / 3.7 | 3.1 / 3.4 / 3.3 | 2.5 / 2.4 / 2.6 |
| log-normal, sigma 1 | alike | 0.9 / 0.3 / 0.2 | 1.7 / 0.8 / 0.5 | 1.8 / 0.9 / 0.6 | 2.8 / 1.6 / 1.0 |
| the plain t test: | | | | | |
| normal | alike | 4.8 / 4.5 / 4.8 | 5.2 / 4.8 / 4.5 | 5.2 / 4.7 / 4.7 | 5.1 / 4.6 / 4.5 |
| gamma of shape 2 | alike | 4.1 / 3.6 / 3.5 | 4.0 / 3.4 / 3.3 | 4.5 / 3.5 / 2.9 | 4.6 / 3.9 / 3.4 |
| gamma of shape 2 | steady | 7.9 / 9.3 / 9.8 | 8.5 / 11.5 / 13.9 | 8.5 / 11.3 / 14.1 | 7.6 / 10.7 / 13.8 |

No test of a few seeds holds for every distribution (Bahadur and Savage 1956, Annals of Mathematical Statistics 27).
This one does not for the log-normal with sigma 1 against a reference that is not alike: 5 to 10 % with one contrast, up
to 18 % with six (the plain t test: 42 %). It does not guard against a left tail, such as that of errors near chance.

The sign-flip test needs no floor where both settings have the same distribution, but its p is at least 2^(1 - seeds):
below six seeds it cannot reach 0.05. It stands beside the other from six seeds on.

Differences that are found in 80 % of studies, in standard deviations of a setting's scores, with 1 / 3 / 6 contrasts:

| scores (alike) | 3 seeds | 5 seeds | 6 seeds | 10 seeds |
|---|---|---|---|---|
| normal | 5.5 / 9.8 / 13.7 | 2.8 / 3.8 / 4.6 | 2.4 / 3.1 / 3.7 | 1.6 / 2.0 / 2.3 |
| gamma of shape 2 | 5.6 / 10.0 / 13.9 | 2.9 / 4.0 / 4.7 | 2.5 / 3.3 / 3.8 | 1.7 / 2.1 / 2.3 |

``tests/unit/test_study_claims.py`` holds the simulation of the test, ``tests/unit/test_study_coverage.py`` that of the
intervals. Run as scripts they print these tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]

ALPHA = 0.05
"""Chance of any false claim among the planned contrasts of a study."""
MIN_SEEDS = 3
"""Fewer seeds claim nothing."""
SPREAD_FLOOR = 1.6
"""The spread of the differences counts as at least this many times that of the better setting's scores."""
SIGN_FLIP_SEEDS = 6
"""Seeds from which on the sign-flip test of one contrast can reach 0.05."""
POWER = 0.8
ROUNDING = 1e-12
"""The spread counts as at least this: scores that differ by rounding alone are equal."""
TEST = "paired Student t with a floor under the spread, corrected by Holm"
"""The test that decides."""


@dataclass(frozen=True, kw_only=True)
class Centre:
    """A figure of a setting over its seeds: the mean of the runs that have it; NaN where too few have."""

    mean: float
    sd: float
    """Sample standard deviation, with n - 1 in the denominator; NaN below two runs."""
    low: float
    """Lower end of the 95 % interval of the mean; NaN below two runs."""
    high: float
    """Upper end of that interval."""


def centre_of(values: Sequence[float] | FloatArray) -> Centre:
    """Mean, spread and interval of the values that are not NaN.

    >>> centre_of([0.1, 0.3, float("nan")]).mean
    0.2
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    mean, low, high = interval(known)
    return Centre(mean=mean, sd=float(known.std(ddof=1)) if len(known) > 1 else math.nan, low=low, high=high)


def interval(values: FloatArray) -> tuple[float, float, float]:
    """The mean of ``values`` (n,) and the ends of its 95 % t interval, NaN where there are too few values."""
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = float(special.stdtrit(len(values) - 1, 0.975) * _standard_error(values, 0.0))
    return mean, mean - half, mean + half


def difference_p(first: FloatArray, second: FloatArray, resolution: float = 0.0) -> FloatArray:
    """Two-sided p of the mean of ``first - second``, each (n, ...) with n >= 2: one test a column, (...).

    Args:
        first: errors of one setting by seed.
        second: errors of the other for the same seeds.
        resolution: the step of the scores, 1 / (test images): the spread counts as at least half of it, or scores that
            differ by one image for each of a few seeds would have no spread at all.
    """
    p = 2 * np.minimum(_lower_p(first, second, resolution), _lower_p(second, first, resolution))
    return np.asarray(np.minimum(p, 1.0))


def no_worse_p(first: FloatArray, second: FloatArray, margin: float, resolution: float = 0.0) -> FloatArray:
    """p of the hypothesis that the mean of ``first - second`` is at least ``margin`` away from 0.

    Two one-sided tests (Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15), each at half the level,
    so that "no worse" at 0.05 is the 95 % interval within the margin. A small p shows that the settings are equivalent
    up to the margin. Arguments as in :func:`difference_p`.
    """
    p = 2 * np.maximum(_lower_p(first - margin, second, resolution), _lower_p(second - margin, first, resolution))
    return np.asarray(np.minimum(p, 1.0))


class Effect(NamedTuple):
    """A difference of two means, with its 95 % interval and its two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def welch(first: FloatArray, second: FloatArray, resolution: float = 0.0) -> Effect:
    """The mean of ``first`` (n,) minus that of ``second`` (m,), which have no seeds in common; n and m at least 2.

    Welch's t (1947, Biometrika 34). It does not take the spreads as equal, which nothing says of two studies: Student's
    pooled test claims too much if the smaller sample has the larger spread (Delacre, Lakens and Leys 2017,
    International Review of Social Psychology 30). ``resolution`` is that of :func:`difference_p`.
    """
    least = max(resolution / 2, ROUNDING)
    parts = [max(float(scores.std(ddof=1)), least) ** 2 / len(scores) for scores in (first, second)]
    error = math.sqrt(sum(parts))
    pairs = zip(parts, (first, second), strict=True)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(scores) - 1) for part, scores in pairs)  # Satterthwaite's
    difference = float(first.mean() - second.mean())
    half = float(special.stdtrit(freedom, 0.975)) * error
    p = 2 * float(special.stdtr(freedom, -abs(difference) / error))
    return Effect(difference, difference - half, difference + half, p)


def smallest_effect(first: FloatArray, second: FloatArray, alpha: float, resolution: float = 0.0) -> float:
    """The smallest true difference that :func:`difference_p` shows at level ``alpha`` with 80 % power.

    The number of seeds and the spread are those of ``first`` and ``second`` (n,); NaN below two seeds.
    """
    n = len(first)
    if n < 2:
        return math.nan
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    # In standard errors: the noncentrality at which t exceeds its critical value with this power.
    distance = float(special.nctdtrinc(n - 1, 1 - POWER, critical))
    better, other = (first, second) if first.mean() < second.mean() else (second, first)
    return distance * float(_standard_error(better - other, _floor(better, resolution)))


def sign_flip_p(
    first: FloatArray, second: FloatArray, *, resamples: int = 9_999, rng: np.random.Generator
) -> FloatArray:
    """Two-sided p of the mean difference of paired scores, each (n, k) with n >= 2: one test a column, (k,).

    Fisher's randomization test: if it makes no difference which of a pair is called the first, each difference is as
    likely with the other sign. p is the share of sign flips whose mean difference is at least as far from zero: of all
    2^n if ``resamples`` allows, otherwise of that many drawn ones and the observed.
    """
    n = len(first)
    # Sums that ought to tie may differ in their last bits, which decides p at these sizes. With the scores scaled to 1
    # at most, this is what subtraction and summation may have cost.
    unit = np.maximum(np.abs(first), np.abs(second)).max(axis=0)
    differences = (first - second) / np.where(unit > 0, unit, 1.0)
    least = np.abs(differences.mean(axis=0)) - 100 * np.finfo(np.float64).eps
    if 2**n <= resamples:
        signs = 1.0 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return np.asarray((np.abs(signs @ differences) / n >= least).mean(axis=0))
    signs = rng.choice([-1.0, 1.0], size=(resamples, n))
    return np.asarray(((np.abs(signs @ differences) / n >= least).sum(axis=0) + 1) / (resamples + 1))


def holm(p_values: FloatArray, groups: Sequence[int] | None = None) -> FloatArray:
    """Holm's (1979, Scandinavian Journal of Statistics 6) correction of (m,) p values, at most 1.

    Args:
        p_values: NaN stands for a comparison without a test: it stays NaN, and counts as if its p were the largest.
        groups: one number for each hypothesis. Of the hypotheses with the same number at most one can be true, so they
            count as one (Shaffer 1986, Journal of the American Statistical Association 81). All differ by default.

    >>> holm(np.array([0.01, 0.04])).tolist()
    [0.02, 0.04]
    """
    numbers = np.arange(len(p_values)) if groups is None else np.asarray(groups)
    order = np.argsort(p_values)  # NaN comes last
    left = np.array([len(set(numbers[order[step:]].tolist())) for step in range(len(p_values))])
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * left), 1.0)
    return corrected


def _lower_p(better: FloatArray, other: FloatArray, resolution: float) -> FloatArray:
    """One-sided p of the claim that the mean of ``better`` is the lower one."""
    differences = better - other
    error = _standard_error(differences, _floor(better, resolution))
    return np.asarray(special.stdtr(len(differences) - 1, differences.mean(axis=0) / error))


def _floor(better: FloatArray, resolution: float) -> FloatArray:
    return np.asarray(np.maximum(SPREAD_FLOOR * better.std(axis=0, ddof=1), max(resolution / 2, ROUNDING)))


def _standard_error(differences: FloatArray, floor: FloatArray | float) -> FloatArray:
    return np.asarray(np.maximum(differences.std(axis=0, ddof=1), floor) / math.sqrt(len(differences)))
