"""The difference of a metric between two evaluations of the same test samples, with a 95 % interval.

Both evaluations see the same samples, so only the samples on which they disagree say anything about the difference.

- For a fraction of samples (an error rate) the interval is that of Agresti and Min 2005 (Simple improved confidence
  intervals for comparing matched proportions, Statistics in Medicine 24, 729-740): Wald's, after adding half a sample
  to each of the four cells of the table of both evaluations. Wald's own interval is empty if they never disagree,
  and too narrow if they seldom do.
- For any other metric it is the paired bootstrap over samples (Efron and Tibshirani 1993, An Introduction to the
  Bootstrap, chapters 6 and 13; Koehn 2004, EMNLP, for metrics of a whole test set): samples are drawn with replacement,
  the same for both evaluations, and the metric is divided anew. Deviations are widened by sqrt(n / (n - 1)), as the
  spread of a resample is that much too small.
- If only the two fractions are known, it is that of two independent test sets (Agresti and Caffo 2000, The American
  Statistician 54, 280-288). That is wider than the paired one if the evaluations agree more often than by
  chance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORMAL_QUANTILE = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""
RESAMPLES = 2000


class Difference(NamedTuple):
    """A difference of two scores on ``samples`` test samples, and its 95 % interval."""

    value: float
    low: float
    high: float
    samples: int


def paired_difference(first: Tensor, second: Tensor, *, of_samples: bool) -> Difference:
    """The metric of ``second`` minus that of ``first``.

    Args:
        first, second: totals and counts of each test sample, float64 (n, 2, K) for K classes, in the same order. The
            metric is the mean over the classes of the sum of totals divided by the sum of counts.
        of_samples: the metric is a fraction of the samples: each has a total from 0 to 1 and a count of 1.
    """
    n = len(first)
    value = float(_means(second.sum(0)) - _means(first.sum(0)))
    if of_samples and first.shape[2] == 1 and bool((first[:, 1] == 1).all() and (second[:, 1] == 1).all()):
        moved = (second - first)[:, 0, 0]
        # One of the four half samples is right in the first evaluation alone, one in the second alone.
        mean = float(moved.sum()) / (n + 2)
        variance = (float(moved.square().sum()) + 1) / (n + 2) - mean**2
        return _wald(value, mean, variance / (n + 2), n)
    if n < 2:
        return Difference(value, -math.inf, math.inf, n)
    deviations = (_resampled(first, second) - value) * math.sqrt(n / (n - 1))
    low, high = deviations.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(value, value + low, value + high, n)


def independent_difference(first: float, second: float, samples: int) -> Difference:
    """The fraction ``second`` minus the fraction ``first``, each of ``samples`` test samples."""
    n = samples + 2
    smoothed = [(fraction * samples + 1) / n for fraction in (first, second)]
    variance = sum(p * (1 - p) / n for p in smoothed)
    return _wald(second - first, smoothed[1] - smoothed[0], variance, samples)


def _wald(value: float, centre: float, variance: float, samples: int) -> Difference:
    margin = NORMAL_QUANTILE * math.sqrt(max(variance, 0.0))
    return Difference(value, max(centre - margin, -1.0), min(centre + margin, 1.0), samples)


def _means(sums: Tensor) -> Tensor:
    """The metric of totals and counts (*, 2, K): (*,). Classes without a count are left out."""
    total, count = sums.unbind(-2)
    return torch.where(count != 0, total / count, torch.nan).nanmean(-1)


def _resampled(first: Tensor, second: Tensor) -> Tensor:
    """The difference of resampled test sets: float64 (resamples,), without those in which nothing is counted."""
    n, found = len(first), []
    generator = torch.Generator().manual_seed(0)
    both = torch.stack((first, second), 1).flatten(1)  # (n, 2 * 2 * K)
    together = max(1, min(RESAMPLES, 2**22 // n))  # resamples at a time, in 32 MiB
    for start in range(0, RESAMPLES, together):
        number = min(together, RESAMPLES - start)
        drawn = torch.randint(n, (number, n), generator=generator)
        times = torch.zeros(number, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(number, n).double())
        scores = _means((times @ both).unflatten(1, (2, 2, -1)))
        found.append(scores[:, 1] - scores[:, 0])
    differences = torch.cat(found)
    return differences[differences.isfinite()]
