"""Statistics over seeds, against numpy, scipy and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from syncbn.study.statistics import agreement, recovered, summarize


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


def test_wrong_input():
    with pytest.raises(ValueError, match="infinite"):
        summarize([[math.inf]])
    with pytest.raises(ValueError, match="shapes"):
        summarize([[0.1]], [[True, True]])
    with pytest.raises(ValueError, match="confidence"):
        summarize([[0.1]], confidence=1.0)


def test_recovered_and_agreement():
    assert recovered(0.1, worst=0.4, reference=0.0) == pytest.approx(0.75)
    found = agreement([1.0, 0.5, 0.25], [1.0, 0.5005, 0.3, 9.0])
    assert (found.first, found.largest_step, found.steps_within) == (0.0, 3, 2)
    assert found.largest == pytest.approx(0.05)
    assert agreement([1.0, math.nan], [1.0, 0.5]).largest == math.inf
