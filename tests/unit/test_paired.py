"""Differences between evaluations of the same test samples: the intervals cover, and noise is not claimed."""

from __future__ import annotations

import math

import pytest
import torch

from syncbn.train.paired import RESAMPLES, independent_difference, paired_difference
from syncbn.train.task import Sum


def fractions(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return torch.stack((values, torch.ones_like(values)), 1).unsqueeze(2)


def test_the_interval_of_matched_proportions_by_hand():
    """Agresti and Min's: 100 samples, 12 right in the second alone, 3 in the first alone."""
    first = fractions([1] * 40 + [0] * 45 + [1] * 3 + [0] * 12)
    second = fractions([1] * 40 + [0] * 45 + [0] * 3 + [1] * 12)
    found = paired_difference(first, second, of_samples=True)
    centre = (12.5 - 3.5) / 102
    margin = 1.959964 * math.sqrt(12.5 + 3.5 - 9**2 / 102) / 102
    assert found.value == pytest.approx(0.09)
    assert (found.low, found.high) == pytest.approx((centre - margin, centre + margin), abs=1e-7)
    assert found.samples == 100
    other = paired_difference(second, first, of_samples=True)
    assert (other.value, other.low, other.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_the_same_difference_of_few_and_of_many_samples():
    """Five points better on 40 samples may be noise; on 4,000 it is not."""
    few = paired_difference(fractions([1] * 30 + [0] * 10), fractions([1] * 32 + [0] * 8), of_samples=True)
    many = paired_difference(fractions([1] * 3000 + [0] * 1000), fractions([1] * 3200 + [0] * 800), of_samples=True)
    assert few.value == many.value == pytest.approx(0.05)
    assert few.low < 0 < many.low


def test_evaluations_that_agree_on_every_sample_still_have_an_interval():
    same = fractions([1, 0, 1, 1])
    found = paired_difference(same, same, of_samples=True)
    assert found.low < 0 == found.value < found.high


def test_scores_alone_give_the_wider_interval_of_two_test_sets():
    values = torch.tensor([1.0] * 160 + [0.0] * 40)
    moved = values.clone()
    moved[160:176] = 1.0
    paired = paired_difference(fractions(values), fractions(moved), of_samples=True)
    alone = independent_difference(0.8, 0.88, 200)
    assert paired.value == pytest.approx(alone.value)
    assert alone.low < paired.low < paired.high < alone.high
    assert paired.low > 0


@pytest.mark.parametrize("n", [20, 60, 400])
def test_noise_is_claimed_in_at_most_one_of_forty(n):
    """Two evaluations that are right equally often: the interval lies above zero in 2.5 %, to sampling."""
    generator = torch.Generator().manual_seed(n)
    disagree, better, repeats = 0.1, 0.5, 3000
    claims = covered = 0
    for _ in range(repeats):
        apart = torch.rand(n, generator=generator) < disagree
        second_is_right = torch.rand(n, generator=generator) < better
        first = (~apart | ~second_is_right).double()
        second = (~apart | second_is_right).double()
        found = paired_difference(fractions(first), fractions(second), of_samples=True)
        claims += found.low > 0
        covered += found.low <= 0 <= found.high
    assert claims / repeats < 0.025 + 3 * math.sqrt(0.025 * 0.975 / repeats)
    assert covered / repeats > 0.94


def dice(n, generator, shift=0.0):
    """Overlaps and sizes of two classes, correlated between evaluations by the sizes: (n, 2, 2)."""
    sizes = 20 + 30 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    quality = (0.7 + shift + 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return torch.stack((sizes * quality, sizes), 1)


def test_the_bootstrap_is_that_of_the_whole_metric():
    """Against resamples by hand: the mean over classes of sums of totals over sums of counts."""
    generator = torch.Generator().manual_seed(1)
    first, second = dice(50, generator), dice(50, generator, 0.05)
    found = paired_difference(first, second, of_samples=False)
    assert found.value == pytest.approx(Sum(*second.sum(0)).mean() - Sum(*first.sum(0)).mean())
    by_hand = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(50, (50,), generator=generator)
        by_hand.append(Sum(*second[drawn].sum(0)).mean() - Sum(*first[drawn].sum(0)).mean())
    spread = torch.tensor(by_hand).std()
    # Both have a sampling error of some 2 % of the spread.
    assert (found.high - found.low) / (2 * 1.96 * spread * math.sqrt(50 / 49)) == pytest.approx(1, abs=0.1)
    assert found.low < found.value < found.high


def test_the_bootstrap_covers():
    generator = torch.Generator().manual_seed(2)
    claims = sum(
        paired_difference(dice(40, generator), dice(40, generator), of_samples=False).low > 0 for _ in range(200)
    )
    assert claims <= 13  # of 5 expected; more have a probability below 0.001


def test_classes_that_a_resample_lacks_and_single_samples():
    rare = torch.tensor([[[1.0, 2.0], [2.0, 4.0]], [[1.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]]]).double()
    found = paired_difference(rare, rare * torch.tensor([[1.2], [1.0]]), of_samples=False)
    assert all(map(math.isfinite, found))
    alone = paired_difference(rare[:1], rare[:1], of_samples=False)
    assert (alone.low, alone.high) == (-math.inf, math.inf)
