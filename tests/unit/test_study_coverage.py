"""Simulated studies: which interval to trust at a handful of seeds, and that the claims hold up.

As a script, ``PYTHONPATH=. python tests/unit/test_study_coverage.py``, it prints the table in the docstring of
``syncbn.study.analysis.statistics``; a number of studies may follow.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from scipy import stats

from syncbn.study.analysis.statistics import compare, sign_flip_p, summarize

SCORES = {"normal": stats.norm(), "gamma": stats.gamma(2.0)}
INTERVALS = ("t", "iqm", "BCa", "percentile", "basic", "studentized")
BLOCK = 500
"""Studies that share their resamples: scipy draws one set of indices for a whole array."""


def t_intervals(scores):
    """What the package computes: {name: (low, high)}, each (studies,), for scores (studies, seeds)."""
    mean, iqm = summarize(scores.T), summarize(scores.T, centre="iqm")
    return {"t": (mean.interval_low, mean.interval_high), "iqm": (iqm.interval_low, iqm.interval_high)}


def bootstrap_intervals(scores, resamples, rng):
    """The same for the bootstraps of the mean."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = stats.bootstrap((scores,), np.mean, n_resamples=resamples, axis=-1, method="basic", rng=rng)
        found = {"basic": first}
        for method in ("percentile", "BCa"):
            found[method] = stats.bootstrap(
                (scores,), np.mean, n_resamples=0, bootstrap_result=first, axis=-1, method=method, rng=rng
            )
    intervals = {name: (f.confidence_interval.low, f.confidence_interval.high) for name, f in found.items()}
    return {**intervals, "studentized": studentized_interval(scores, resamples, rng)}


def studentized_interval(scores, resamples, rng):
    """Bootstrap-t; a resample without spread has t = +-inf, and at three seeds one in nine has none."""
    seeds = scores.shape[-1]
    drawn = scores[:, rng.integers(seeds, size=(resamples, seeds))]
    spread = drawn.std(axis=-1, ddof=1)
    spread[np.ptp(drawn, axis=-1) == 0] = 0  # which rounding may have left at 1e-17
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (drawn.mean(axis=-1) - scores.mean(axis=-1, keepdims=True)) / (spread / np.sqrt(seeds))
    low, high = np.quantile(t, (0.975, 0.025), axis=-1, method="inverted_cdf")
    error = stats.sem(scores, axis=-1)
    return scores.mean(axis=-1) - low * error, scores.mean(axis=-1) - high * error


def held(low, high, truth):
    return (low <= truth) & (truth <= high)


def coverage(kind, seeds, *, studies, resamples, rng):
    """{interval: (share of studies whose 95 % interval holds the true centre, median width)}."""
    mean, (lower, upper) = SCORES[kind].mean(), SCORES[kind].ppf([0.25, 0.75])
    iqm = SCORES[kind].expect(lb=lower, ub=upper, conditional=True)
    hits, widths = {}, {}
    for _ in range(studies // BLOCK):
        scores = SCORES[kind].rvs((BLOCK, seeds), random_state=rng)
        for name, (low, high) in (t_intervals(scores) | bootstrap_intervals(scores, resamples, rng)).items():
            truth = iqm if name == "iqm" else mean
            hits.setdefault(name, []).append(held(low, high, truth))
            widths.setdefault(name, []).append(high - low)
    return {name: (float(np.mean(hits[name])), float(np.median(widths[name]))) for name in hits}


@pytest.mark.parametrize("seeds", [3, 6, 10])
@pytest.mark.parametrize("kind", SCORES)
def test_no_bootstrap_covers_as_well_as_students_t(kind, seeds):
    found = coverage(kind, seeds, studies=1000, resamples=999, rng=np.random.default_rng(0))
    shortfall = {name: 0.95 - share for name, (share, _) in found.items()}
    assert all(shortfall["t"] < shortfall[name] for name in ("BCa", "percentile", "basic"))


def seed_matched(kind, rng, shape):
    """Scores (studies, seeds, settings), half of whose variance is the seed's, the same in all settings."""
    seed = (*shape[:-1], 1)
    if kind == "normal":
        return (rng.normal(size=seed) + rng.normal(size=shape)) / np.sqrt(2)
    return rng.gamma(1.0, size=seed) + rng.gamma(1.0, size=shape)  # of shape 2 together


@pytest.mark.parametrize(("kind", "least"), [("normal", 0.93), ("gamma", 0.90)])
@pytest.mark.parametrize("seeds", [6, 10])
def test_intervals_cover(kind, least, seeds):
    scores = seed_matched(kind, np.random.default_rng(0), (1000, seeds, 4))
    columns = scores.transpose(1, 0, 2).reshape(seeds, -1)
    assert held(*t_intervals(columns.T)["t"], SCORES[kind].mean()).mean() >= least
    differences = columns[:, 1::4] - columns[:, ::4]
    for centre in ("mean", "iqm"):  # both are 0, as the differences are symmetric
        found = summarize(differences, centre=centre)
        assert held(found.interval_low, found.interval_high, 0.0).mean() >= 0.93


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("seeds", "settings"), [(6, 2), (10, 5)])
def test_false_claims_are_fewer_than_alpha(kind, seeds, settings):
    """In no more than 5 % of studies a claim anywhere among all pairs of settings (one and ten) that are alike."""
    rng = np.random.default_rng(0)
    pairs = list(itertools.combinations(range(settings), 2))
    false = 0
    for study in seed_matched(kind, rng, (1000, seeds, settings)):
        found = {comparison.verdict for comparison in compare(study, None, pairs, rng=rng)}
        assert found <= {"lower", "higher", "not shown"}
        false += found != {"not shown"}
    assert 0 < false / 1000 < 0.05


@pytest.mark.parametrize("kind", SCORES)
def test_a_single_test_has_exactly_its_level(kind):
    rng = np.random.default_rng(0)
    scores = seed_matched(kind, rng, (2000, 8, 2))
    p_values = sign_flip_p(scores[..., 0].T, scores[..., 1].T, rng=rng)
    level = 12 / 2**8  # the largest even number of 256 flips that is at most 5 % of them
    assert np.mean(p_values <= 0.05) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 2000))


@pytest.mark.parametrize("kind", SCORES)
def test_planted_differences_are_claimed_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    scores = seed_matched(kind, rng, (1000, 10, 5)) + np.array([0.0, 2.0, -2.0, 0.0, 0.0])
    pairs = [(1, 0), (2, 0), (3, 0), (4, 0)]
    claims = np.array([[found.verdict for found in compare(study, None, pairs, rng=rng)] for study in scores])
    assert np.mean(claims[:, 0] == "higher") > 0.8
    assert np.mean(claims[:, 1] == "lower") > 0.8
    assert not (claims[:, :2] == ["lower", "higher"]).any()
    # Holm leaves nearly all of alpha to these two, hence the allowance of two standard errors of 1,000 studies.
    assert np.mean((claims[:, 2:] != "not shown").any(axis=1)) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000)


def main(studies):
    print("| scores | seeds | " + " | ".join(INTERVALS) + " |")
    print("|---" * (2 + len(INTERVALS)) + "|")
    for kind in SCORES:
        for seeds in (3, 6, 10):
            found = coverage(kind, seeds, studies=studies, resamples=1999, rng=np.random.default_rng(seeds))
            cells = [f"{100 * found[name][0]:.1f} ({found[name][1]:.2f})" for name in INTERVALS]
            print(f"| {kind} | {seeds} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
