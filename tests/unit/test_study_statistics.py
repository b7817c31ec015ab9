"""Statistics over seeds, against numpy, scipy and hand-made cases."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import stats

from syncbn.study.analysis.statistics import (
    SPREAD_FLOOR,
    centre_of,
    difference_p,
    holm,
    interval,
    no_worse_p,
    sign_flip_p,
    smallest_effect,
)


def test_against_numpy_and_scipy():
    for scores in np.random.default_rng(0).normal(0.1, 0.02, (6, 3)).T:
        found = centre_of(scores)
        low, high = stats.t.interval(0.95, 5, scores.mean(), stats.sem(scores))
        expected = (scores.mean(), scores.std(ddof=1), low, high)
        np.testing.assert_allclose((found.mean, found.sd, found.low, found.high), expected, rtol=1e-12)


def test_runs_without_a_score_are_never_averaged():
    nan = math.nan
    assert centre_of([0.1, 0.3, nan]).mean == pytest.approx(0.2)
    alone, none = centre_of([nan, 0.5, nan]), centre_of([nan, nan])
    assert alone.mean == 0.5
    assert all(map(math.isnan, (alone.sd, alone.low, alone.high, none.mean, none.sd, none.low, none.high)))


def brute_force_p(differences):
    """In exact arithmetic, over all flips."""
    exact = [Fraction(repr(float(difference))) for difference in differences]
    sums = [abs(sum(d * s for d, s in zip(exact, signs, strict=True))) for signs in product((1, -1), repeat=len(exact))]
    return sum(total >= abs(sum(exact)) for total in sums) / len(sums)


@pytest.mark.parametrize("seeds", [2, 5, 8])
def test_sign_flips_against_enumeration(seeds):
    rng = np.random.default_rng(0)
    scores = rng.normal(0.3, 1.0, (seeds, 7))
    found = sign_flip_p(scores, np.zeros_like(scores), rng=rng)
    np.testing.assert_allclose(found, [brute_force_p(column) for column in scores.T], rtol=1e-12)


@pytest.mark.parametrize("offset", [0, 90, 100_000])
def test_sums_that_ought_to_tie_do(offset):
    # Hundredths, of which sums coincide all the time, and neither they nor their differences are exact.
    rng = np.random.default_rng(0)
    differences = rng.integers(-4, 7, (8, 20))
    references = offset + rng.integers(0, 9, (8, 20))
    found = sign_flip_p((references + differences) / 100, references / 100, rng=rng)
    np.testing.assert_allclose(found, [brute_force_p(column) for column in differences.T], rtol=1e-12)


def test_drawn_flips_agree_with_all_of_them():
    scores = np.random.default_rng(1).normal(0.5, 1.0, (13, 4))
    exact = sign_flip_p(scores, np.zeros_like(scores), rng=np.random.default_rng(2))
    drawn = sign_flip_p(scores, np.zeros_like(scores), resamples=8_000, rng=np.random.default_rng(2))
    again = sign_flip_p(scores, np.zeros_like(scores), resamples=8_000, rng=np.random.default_rng(2))
    np.testing.assert_allclose(drawn, exact, atol=4 * 0.5 / math.sqrt(8_000))  # 4 standard errors
    np.testing.assert_array_equal(drawn, again)
    assert (drawn != exact).any()


def test_holm_by_hand():
    # Sorted .005, .01, .03, .04, without a test: times 5, 4, 3, 2, and none below the one before it.
    found = holm(np.array([0.01, 0.04, math.nan, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.04, 0.09, math.nan, 0.09, 0.025])
    np.testing.assert_array_equal(holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert holm(np.array([])).size == 0


def test_hypotheses_that_exclude_each_other_count_once():
    # Sorted .01 (group 0), .02 (1), .03 (0), .4 (1): two groups are left at the first three, then one.
    found = holm(np.array([0.01, 0.4, 0.03, 0.02]), [0, 1, 0, 1])
    np.testing.assert_allclose(found, [0.02, 0.4, 0.06, 0.04])


def test_a_difference_against_scipy():
    # Here the spread of the differences is above the floor, so the test is Student's.
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.1, 0.001, 6), rng.normal(0.2, 0.1, 6)
    expected = stats.ttest_rel(first, second)
    assert expected.statistic < 0, "the first is the better one"
    assert difference_p(first, second) == pytest.approx(expected.pvalue, rel=1e-12)
    assert difference_p(second, first) == pytest.approx(expected.pvalue, rel=1e-12)
    columns = difference_p(np.stack([first, second], axis=1), np.stack([second, first], axis=1))
    np.testing.assert_allclose(columns, expected.pvalue, rtol=1e-12)


def test_the_spread_counts_as_that_of_the_better_setting_at_least():
    better, other = np.array([0.01, 0.02, 0.03]), np.array([0.11, 0.12, 0.13])
    t = 0.1 / (SPREAD_FLOOR * 0.01 / math.sqrt(3))
    assert difference_p(better, other) == pytest.approx(2 * stats.t.sf(t, 2), rel=1e-9)


def test_scores_without_spread():
    same, image = np.full(3, 0.3), 0.001
    assert difference_p(same, same) == 1
    assert difference_p(same, same + 0.2) < 1e-9
    assert difference_p(same + 0.1 + 0.2, same + 0.3) == pytest.approx(1, abs=0.01), "equal but for rounding"
    assert difference_p(same, same + image, resolution=image) > 0.05  # all three differ by one image
    assert difference_p(same, same + 9 * image, resolution=image) < 0.05
    assert no_worse_p(same, same, 0.01) < 1e-9
    assert no_worse_p(same + 0.02, same, 0.01) == 1


def test_no_worse_is_an_interval_within_the_margin():
    rng = np.random.default_rng(0)
    for _ in range(20):
        spread = rng.normal(0.0, 0.02, 6)
        first, second = 0.1 + spread, 0.1 - spread  # differences spread twice as far, beyond the floor
        _, low, high = interval(first - second)
        at = max(abs(low), abs(high))
        assert no_worse_p(first, second, at * 1.01) < 0.05
        assert no_worse_p(first, second, at * 0.99) > 0.05


def test_the_smallest_effect_is_shown_with_its_power():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.0, 0.3, (6, 20_000)), np.full((6, 1), 0.0)
    spread = np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    spread *= 0.3 / spread.std(ddof=1)
    # The floor concerns the better setting only: here the steady one is better.
    effect = smallest_effect(np.zeros(6), 100 + spread, alpha=0.02)
    assert np.mean(difference_p(second, first + effect) <= 0.02) == pytest.approx(0.8, abs=0.01)
    assert math.isnan(smallest_effect(np.zeros(1), np.ones(1), alpha=0.05))
