"""Statistics over seeds, against numpy, scipy and hand-made cases."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import stats

from syncbn.study.analysis.statistics import compare, holm, interval, seeds_needed, sign_flip_p, summarize


def test_against_numpy_and_scipy():
    scores = np.random.default_rng(0).normal(0.1, 0.02, (6, 3))
    found = summarize(scores)
    np.testing.assert_allclose(found.mean, scores.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sd, scores.std(0, ddof=1), rtol=1e-12)
    low, high = stats.t.interval(0.95, 5, scores.mean(0), stats.sem(scores, axis=0))
    np.testing.assert_allclose(found.interval_low, low, rtol=1e-12)
    np.testing.assert_allclose(found.interval_high, high, rtol=1e-12)
    assert found.finished.tolist() == [6, 6, 6]


def test_diverged_and_missing_runs_are_counted_and_never_averaged():
    nan = math.nan
    found = summarize([[0.1, nan, nan], [0.3, 0.5, nan], [nan, nan, nan]], [[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    assert found.finished.tolist() == [2, 1, 0]
    assert found.diverged.tolist() == [0, 2, 2]
    assert found.missing.tolist() == [1, 0, 1]
    assert found.mean[:2].tolist() == pytest.approx([0.2, 0.5])
    assert math.isnan(found.mean[2])
    assert math.isnan(found.sd[1])


def test_the_centre_is_the_mean_unless_the_interquartile_mean_is_asked_for():
    scores = np.random.default_rng(0).gamma(2.0, size=(10, 3))
    mean, iqm = summarize(scores), summarize(scores, centre="iqm")
    np.testing.assert_array_equal(mean.centre, mean.mean)
    np.testing.assert_array_equal(iqm.mean, mean.mean)
    np.testing.assert_allclose(iqm.centre, stats.trim_mean(scores, 0.25), rtol=1e-12)


def test_tukey_mclaughlin_interval_by_hand():
    # Of 6 values 1 is trimmed at each end: 2, 3, 4, 7 stay, and 2, 2, 3, 4, 7, 7 are the winsorized ones, with mean
    # 25/6 and sum of squares 131 - 625/6 = 161/6 about it; 4 kept values leave 3 degrees of freedom.
    centre, low, high = interval(np.array([4.0, 100.0, 3.0, 2.0, 7.0, -50.0]), centre="iqm")
    half = stats.t.ppf(0.975, 3) * math.sqrt(161 / 6 / (4 * 3))
    assert (centre, low, high) == pytest.approx((4.0, 4.0 - half, 4.0 + half))


def test_where_nothing_is_trimmed_the_interquartile_mean_is_the_mean():
    values = np.array([0.3, 0.1, 0.7])
    assert interval(values, centre="iqm") == interval(values)
    assert interval(values[:1], centre="iqm") == pytest.approx((0.3, math.nan, math.nan), nan_ok=True)


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


def test_seeds_needed():
    assert [seeds_needed(comparisons) for comparisons in (1, 2, 4, 10)] == [6, 7, 8, 9]
    assert seeds_needed(1, alpha=2 / 2**5) == 5  # reached exactly


def verdicts(scores, pairs, ran=None):
    return [found.verdict for found in compare(scores, ran, pairs, rng=np.random.default_rng(0))]


def planted(seeds, effects, spread=0.01):
    """(seeds, 1 + effects): a reference near 0, then settings that differ from it by each of the effects."""
    noise = np.random.default_rng(0).normal(0.0, spread, (seeds, 1 + len(effects)))
    return noise + np.array([0.0, *effects])


def test_a_comparison_in_full():
    scores = planted(10, [-1.0, 0.0])
    lower, none = compare(scores, None, [(1, 0), (2, 0)], rng=np.random.default_rng(0))
    differences = scores[:, 1] - scores[:, 0]
    low, high = stats.t.interval(0.95, 9, differences.mean(), stats.sem(differences))
    assert (lower.difference, lower.low, lower.high) == pytest.approx((differences.mean(), low, high))
    assert (lower.setting, lower.reference, lower.pairs, lower.diverged) == (1, 0, 10, (0, 0))
    assert (lower.p, lower.p_corrected, lower.seeds_needed) == (2 / 2**10, 4 / 2**10, 7)
    assert (lower.verdict, none.verdict) == ("lower", "not shown")
    assert none.p_corrected == none.p == pytest.approx(brute_force_p(scores[:, 2] - scores[:, 0]))
    assert verdicts(scores, [(0, 1)]) == ["higher"]


def test_five_seeds_show_nothing_and_six_do():
    assert verdicts(planted(5, [1.0]), [(1, 0)]) == ["not enough seeds"]
    assert verdicts(planted(6, [1.0]), [(1, 0)]) == ["higher"]
    assert verdicts(planted(6, [1.0, 0.0]), [(1, 0), (2, 0)]) == ["not enough seeds"] * 2
    assert verdicts(planted(1, [1.0]), [(1, 0)]) == ["not enough seeds"]


def test_seeds_suffice_where_another_comparison_that_is_shown_leaves_room():
    # Holm asks the second of two for alpha, no longer for alpha / 2: 6 seeds can show it once 10 have shown the first.
    ran = np.ones((10, 3), dtype=bool)
    ran[6:, 2] = False
    assert verdicts(planted(10, [1.0, 1.0]), [(1, 0), (2, 0)], ran) == ["higher", "higher"]
    assert verdicts(planted(10, [0.0, 1.0]), [(1, 0), (2, 0)], ran) == ["not shown", "not enough seeds"]


def test_a_diverged_run_is_a_result_and_bars_the_comparison():
    scores = planted(10, [1.0, 1.0])
    scores[3, 1] = math.nan
    first, second, third = compare(scores, None, [(1, 0), (2, 1), (2, 0)], rng=np.random.default_rng(0))
    assert (first.verdict, first.diverged, first.pairs) == ("diverged", (1, 0), 9)
    assert (second.verdict, second.diverged) == ("diverged", (0, 1))
    assert all(math.isnan(value) for value in (first.difference, first.low, first.high, first.p, first.p_corrected))
    assert (third.verdict, third.p_corrected) == ("higher", 3 * third.p)  # the family is all that was asked for


def test_missing_runs():
    scores, ran = planted(10, [1.0, 1.0]), np.ones((10, 3), dtype=bool)
    ran[1:, 1] = False
    ran[7:, 2] = False
    few, enough = compare(scores, ran, [(1, 0), (2, 0)], rng=np.random.default_rng(0))
    assert (few.verdict, few.pairs, math.isnan(few.difference)) == ("missing", 1, True)
    assert (enough.verdict, enough.pairs) == ("higher", 7)
    scores[5, 1] = math.nan  # of a run that has not ended: missing, not diverged
    assert verdicts(scores, [(1, 0)], ran) == ["missing"]


def test_ties_and_equal_scores():
    scores = np.full((8, 3), 0.1 + 0.2)
    scores[:, 2] = 0.0
    same, constant = compare(scores, None, [(1, 0), (2, 0)], rng=np.random.default_rng(0))
    assert (same.verdict, same.p, same.difference, same.low) == ("not shown", 1.0, 0.0, 0.0)
    assert (constant.verdict, constant.p) == ("lower", 2 / 2**8)
    assert verdicts(np.zeros((8, 2)), [(1, 0)]) == ["not shown"]


def test_the_interquartile_mean_never_contradicts_what_is_tested():
    # One seed far below decides the mean, most of the others the interquartile mean; here p is 1 - 4 / 2^10.
    scores = np.zeros((10, 2))
    scores[:, 1] = [-12.0, -1.0, *[1.0] * 8]
    (found,) = compare(scores, None, [(1, 0)], centre="iqm", alpha=0.999, rng=np.random.default_rng(0))
    assert found.difference == 1.0
    assert found.verdict == "not shown"
    assert compare(scores, None, [(1, 0)], alpha=0.999, rng=np.random.default_rng(0))[0].verdict == "lower"


def test_many_seeds_and_many_comparisons():
    scores, pairs = planted(20, [1.0, 0.0]), [(1, 0), (2, 0)] * 6
    found = compare(scores, None, pairs, alpha=0.001, rng=np.random.default_rng(0))
    # The 9,999 flips that are drawn otherwise give a p of 0.0001 at best, and 12 comparisons make that 0.0012.
    assert [comparison.verdict for comparison in found] == ["higher", "not shown"] * 6
    assert compare(scores, None, [], rng=np.random.default_rng(0)) == []


def test_wrong_input():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="infinite"):
        summarize([[math.inf]])
    with pytest.raises(ValueError, match="shapes"):
        summarize([[0.1]], [[True, True]])
    with pytest.raises(ValueError, match=r"confidence: got 1\.0, expected a number between 0 and 1"):
        summarize([[0.1]], confidence=1.0)
    with pytest.raises(ValueError, match=r"centre: got 'median', expected one of mean, iqm"):
        summarize([[0.1]], centre="median")
    with pytest.raises(ValueError, match="shapes"):
        compare([0.1], None, [], rng=rng)
    with pytest.raises(ValueError, match="alpha: got 5, expected a number between 0 and 1"):
        compare([[0.1, 0.2]], None, [(0, 1)], alpha=5, rng=rng)
    for pair in ((0, 0), (0, 2), (-1, 0), (0,)):
        with pytest.raises(ValueError, match=r"pairs: got \(.*\), expected two different columns, each from 0 to 1"):
            compare([[0.1, 0.2]], None, [pair], rng=rng)
    with pytest.raises(ValueError, match="comparisons: got 0, expected at least 1"):
        seeds_needed(0)
