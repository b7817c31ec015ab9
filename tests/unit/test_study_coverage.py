"""Simulated studies: which interval to trust at a few seeds.

As a script, ``PYTHONPATH=. python tests/unit/test_study_coverage.py``, it prints the table in the docstring of
``syncbn.study.analysis.statistics``; a number of studies may follow.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from syncbn.study.analysis.statistics import interval

SCORES = {"normal": stats.norm(), "gamma": stats.gamma(2.0)}
INTERVALS = ("t", "BCa", "percentile", "basic")
BLOCK = 500
"""Studies that share their resamples: scipy draws one set of indices for a whole array."""


def t_interval(scores):
    """What the package computes: low and high, each (studies,), for scores (studies, seeds)."""
    _, low, high = np.array([interval(study) for study in scores]).T
    return low, high


def bootstrap_intervals(scores, resamples, rng):
    """The same for the bootstraps of the mean."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = stats.bootstrap((scores,), np.mean, n_resamples=resamples, axis=-1, method="basic", rng=rng)
        found = {"basic": first}
        for method in ("percentile", "BCa"):
            found[method] = stats.bootstrap(
                (scores,), np.mean, n_resamples=0, bootstrap_result=first, axis=-1, method=method, rng=rng
            )
    return {name: (f.confidence_interval.low, f.confidence_interval.high) for name, f in found.items()}


def held(low, high, truth):
    return (low <= truth) & (truth <= high)


def coverage(kind, seeds, *, studies, resamples, rng):
    """{interval: (share of studies whose 95 % interval holds the true mean, median width)}."""
    hits, widths = {}, {}
    for _ in range(studies // BLOCK):
        scores = SCORES[kind].rvs((BLOCK, seeds), random_state=rng)
        for name, (low, high) in ({"t": t_interval(scores)} | bootstrap_intervals(scores, resamples, rng)).items():
            hits.setdefault(name, []).append(held(low, high, SCORES[kind].mean()))
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
    assert held(*t_interval(columns.T), SCORES[kind].mean()).mean() >= least
    differences = columns[:, 1::4] - columns[:, ::4]
    assert held(*t_interval(differences.T), 0.0).mean() >= 0.93  # their mean is 0, as they are symmetric


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
