"""From planned contrasts to verdicts."""

from __future__ import annotations

import math

import pytest
from report_fakes import plain_study, summary_with

from syncbn.study.analysis.findings import findings_of


def finding(first, second):
    """The finding on two arms with these errors by seed."""
    study = plain_study(arms=("batch", "sync"), seeds=len(first))
    (found,) = findings_of(summary_with(study, {"sync": first, "batch": second})).items
    return found


def test_three_seeds_that_differ_by_far():
    found = finding([0.015, 0.022, 0.018], [0.67, 0.82, 0.75])
    assert found.verdict == "better"
    assert found.pairs == ((0, 0.015, 0.67), (1, 0.022, 0.82), (2, 0.018, 0.75))
    assert found.difference == pytest.approx(-0.7283, abs=1e-4)
    assert found.low < found.difference < found.high < 0
    assert found.p < 0.05
    assert math.isnan(found.p_sign_flip)
