"""Simulated studies: false claims stay under 5 % of studies, and planted differences are found.

As a script, ``PYTHONPATH=. python tests/unit/test_study_claims.py``, it prints the tables in the docstring of
``syncbn.study.analysis.statistics``; a number of studies may follow.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats

from syncbn.study.analysis.statistics import ALPHA, difference_p, holm, no_worse_p, sign_flip_p

SCORES = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0, 1.0),
    "gamma": (lambda rng, shape: rng.gamma(2.0, size=shape), 2.0, math.sqrt(2)),
    "log-normal 0.5": (lambda rng, shape: rng.lognormal(0, 0.5, size=shape), math.exp(0.125), 0.604),
    "log-normal 1": (lambda rng, shape: rng.lognormal(0, 1, size=shape), math.exp(0.5), 2.161),
}
"""How each is drawn, its mean and its standard deviation."""
REFERENCES = ("alike", "narrow", "steady")
"""The reference has the same distribution as the settings, a third of its spread, or none; the mean is the same."""
SEEDS, CONTRASTS = (3, 5, 6, 10), (1, 3, 6)
HELD = [
    (kind, reference) for kind in SCORES for reference in REFERENCES if kind != "log-normal 1" or reference == "alike"
]


def drawn(kind, reference, seeds, contrasts, studies, rng):
    """Settings (seeds, studies, contrasts) and the reference (seeds, studies, 1) that all of them are compared with."""
    draw, mean, _ = SCORES[kind]
    scores = draw(rng, (seeds, studies, contrasts + 1))
    scale = {"alike": 1.0, "narrow": 1 / 3, "steady": 0.0}[reference]
    return scores[..., 1:], mean + scale * (scores[..., :1] - mean)


def any_claim(p):
    """The studies (studies,) in which Holm's correction of p (studies, contrasts) leaves a claim."""
    return p.min(axis=-1) * p.shape[-1] <= ALPHA


def false_claims(kind, reference, seeds, studies):
    """Share of studies with a false claim, by the number of contrasts."""
    settings, references = drawn(kind, reference, seeds, max(CONTRASTS), studies, np.random.default_rng(seeds))
    p = difference_p(settings, references)
    return {contrasts: float(any_claim(p[:, :contrasts]).mean()) for contrasts in CONTRASTS}


def plain_false_claims(kind, reference, seeds, studies):
    """The same for Student's t without a floor under the spread."""
    settings, references = drawn(kind, reference, seeds, max(CONTRASTS), studies, np.random.default_rng(seeds))
    p = stats.ttest_1samp(settings - references, 0.0).pvalue
    return {contrasts: float(any_claim(p[:, :contrasts]).mean()) for contrasts in CONTRASTS}


def false_equivalences(kind, reference, seeds, studies):
    """The same for "no worse", where the settings are worse by just the margin."""
    settings, references = drawn(kind, reference, seeds, max(CONTRASTS), studies, np.random.default_rng(seeds))
    margin = 3 * SCORES[kind][2]
    p = no_worse_p(settings + margin, references, margin)
    return {contrasts: float(any_claim(p[:, :contrasts]).mean()) for contrasts in CONTRASTS}


def power(kind, seeds, contrasts, effect, studies):
    """How often a setting that is better by ``effect`` standard deviations is found, the first of several."""
    settings, references = drawn(kind, "alike", seeds, contrasts, studies, np.random.default_rng(seeds))
    settings[..., 0] -= effect * SCORES[kind][2]
    p = difference_p(settings, references)
    return float(np.mean(p[..., 0] * contrasts <= ALPHA))


def bound(studies):
    """ALPHA and three standard errors of the simulation: a rate of ALPHA itself exceeds it once in 700 times."""
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / studies)


def test_the_shortcut_for_any_claim_is_holms():
    p = np.random.default_rng(0).uniform(0, 0.1, (200, 3))
    np.testing.assert_array_equal(any_claim(p), [(holm(row) <= ALPHA).any() for row in p])


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("kind", "reference"), HELD)
def test_false_claims_stay_under_five_percent(kind, reference, seeds):
    assert max(false_claims(kind, reference, seeds, studies=4000).values()) < bound(4000)
    assert max(false_equivalences(kind, reference, seeds, studies=4000).values()) < bound(4000)


def test_the_plain_t_test_would_claim_too_much():
    """Why there is a floor under the spread."""
    assert plain_false_claims("gamma", "steady", 6, studies=4000)[6] > 0.1
    assert false_claims("gamma", "steady", 6, studies=4000)[6] < bound(4000)


@pytest.mark.parametrize("wrong", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_scores_of_few_wrong_images_claim_nothing(wrong, seeds):
    """Test errors are counts: with three seeds, all differences may be the same one image."""
    scores = np.random.default_rng(0).poisson(wrong, (seeds, 4000, 7)) / 1000
    p = difference_p(scores[..., 1:], scores[..., :1], resolution=1 / 1000)
    assert any_claim(p).mean() < bound(4000)


@pytest.mark.parametrize(("seeds", "effect"), [(3, 14.0), (5, 5.0), (6, 4.0), (10, 2.2)])
@pytest.mark.parametrize("kind", ["normal", "gamma"])
def test_planted_differences_are_found(kind, seeds, effect):
    assert power(kind, seeds, 3, effect, studies=1000) > 0.8


def test_planted_differences_do_not_raise_the_false_claims_beside_them():
    settings, references = drawn("gamma", "alike", 6, 3, 2000, np.random.default_rng(0))
    settings[..., 0] += 20
    corrected = np.array([holm(row) for row in difference_p(settings, references)])
    assert np.mean((corrected[:, 1:] <= ALPHA).any(axis=1)) < bound(2000)
    assert np.mean(corrected[:, 0] <= ALPHA) > 0.99


@pytest.mark.parametrize("kind", ["normal", "gamma"])
def test_a_single_sign_flip_test_has_exactly_its_level(kind):
    rng = np.random.default_rng(0)
    settings, references = drawn(kind, "alike", 8, 1, 2000, rng)
    p_values = sign_flip_p(settings[..., 0], references[..., 0], rng=rng)
    level = 12 / 2**8  # the largest even number of 256 flips that is at most 5 % of them
    assert np.mean(p_values <= 0.05) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 2000))


def main(studies):
    for title, rates in (
        ("difference", false_claims),
        ("plain t", plain_false_claims),
        ("no worse", false_equivalences),
    ):
        for kind, reference in itertools.product(SCORES, REFERENCES):
            cells = [
                " / ".join(f"{100 * rate:.1f}" for rate in rates(kind, reference, seeds, studies).values())
                for seeds in SEEDS
            ]
            print(f"| {title} | {kind} | {reference} | " + " | ".join(cells) + " |", flush=True)
    for kind, seeds in itertools.product(("normal", "gamma"), SEEDS):
        cells = [f"{found_effect(kind, seeds, contrasts):.1f}" for contrasts in CONTRASTS]
        print(f"| found | {kind} | {seeds} seeds | " + " / ".join(cells) + " |", flush=True)


def found_effect(kind, seeds, contrasts):
    """The smallest effect that is found in 80 % of studies."""
    return next(effect for effect in np.arange(0.5, 40, 0.1) if power(kind, seeds, contrasts, effect, 4000) >= 0.8)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
