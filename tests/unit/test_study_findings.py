"""From planned contrasts to verdicts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from report_fakes import cells_of, grid_study, plain_study, results_of, summary_with
from scipy import stats
from study_fakes import fake_result

from syncbn.study.analysis.findings import VERDICTS, findings_of
from syncbn.study.analysis.statistics import TEST, holm
from syncbn.study.analysis.summary import summary_of
from syncbn.study.api import findings as compare
from syncbn.study.plan.grid import Contrast, Place, study_cells
from syncbn.study.plan.study_file import load_study

REFERENCE = [0.67, 0.82, 0.75, 0.7, 0.78, 0.71, 0.8, 0.69]


def findings(errors, **changes):
    """The findings on arms with these errors by seed, each against ``batch``."""
    study = plain_study(arms=tuple(errors), seeds=len(errors["batch"]), **changes)
    return findings_of(summary_with(study, errors))


def finding(first, second=tuple(REFERENCE), **changes):
    (found,) = findings({"batch": list(second[: len(first)]), "sync": first}, **changes)
    return found


def margin(value):
    return {"contrasts": (Contrast("sync", Place("sync", ()), Place("batch", ()), margin=value),)}


def planted(seeds, effects, spread=0.01):
    """Errors near 0.3, and arms that differ from them by each of the effects."""
    noise = np.random.default_rng(0).normal(0.3, spread, (1 + len(effects), seeds))
    names = ("batch", "sync", "group", "renorm")
    return {n: (row + e).tolist() for n, row, e in zip(names, noise, [0.0, *effects], strict=False)}


def test_three_seeds_that_differ_by_far():
    found = finding([0.015, 0.022, 0.018])
    assert found.verdict == "better"
    assert found.pairs == ((0, 0.015, 0.67), (1, 0.022, 0.82), (2, 0.018, 0.75))
    assert found.difference == pytest.approx(-0.7283, abs=1e-4)
    assert found.low < found.difference < found.high < 0
    assert found.p < 0.05
    assert found.smallest_effect < 0.7283
    assert math.isnan(found.p_sign_flip)
    assert finding(REFERENCE[:3], (0.015, 0.022, 0.018)).verdict == "worse"


def test_a_comparison_in_full():
    errors = planted(10, [-0.2, 0.0])
    lower, none = findings(errors)
    differences = np.array(errors["sync"]) - errors["batch"]
    low, high = stats.t.interval(0.95, 9, differences.mean(), stats.sem(differences))
    assert (lower.difference, lower.low, lower.high) == pytest.approx((differences.mean(), low, high))
    assert (lower.diverged, lower.missing, len(lower.pairs)) == (0, 0, 10)
    assert lower.p_sign_flip == 2 / 2**10
    assert (lower.verdict, none.verdict) == ("better", "no difference shown")
    assert math.isnan(lower.p_no_worse)


def test_p_is_corrected_over_the_planned_contrasts():
    errors = planted(6, [-0.03, 0.0, 0.02])
    alone = [finding(errors[name], errors["batch"]).p for name in ("sync", "group", "renorm")]
    assert [found.p for found in findings(errors)] == pytest.approx(holm(np.array(alone)).tolist())


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds(seeds):
    found = finding([0.1, 0.1][:seeds])
    assert found.verdict == "too few seeds"
    assert math.isnan(found.p)
    assert found.difference == pytest.approx(0.1 - np.mean(REFERENCE[:seeds]))


def test_nothing_is_claimed_before_all_runs_have_ended():
    errors = planted(8, [-0.2, -0.2])
    whole = findings(errors)
    errors["group"][7] = "missing"
    done, running = findings(errors)
    assert (running.verdict, running.missing, len(running.pairs)) == (None, 1, 7)
    assert math.isnan(running.p)
    assert running.low < running.difference < running.high
    assert done.verdict == "better"
    # What is missing counts in the correction as if its p were the largest: to come cannot take the claim back.
    assert done.p >= whole[0].p


def test_a_diverged_run_is_a_result_and_bars_the_comparison():
    errors = planted(8, [0.2, 0.2])
    errors["sync"][3] = "diverged"
    barred, other = findings(errors)
    assert (barred.verdict, barred.diverged, len(barred.pairs)) == ("diverged", 1, 7)
    assert all(math.isnan(value) for value in (barred.difference, barred.low, barred.p, barred.smallest_effect))
    alone = finding(errors["group"], errors["batch"])
    assert other.verdict == "worse"
    assert other.p == pytest.approx(2 * alone.p)  # the family is all that was planned
    missing_too = findings({**errors, "sync": [*errors["sync"][:7], "missing"]})[0]
    assert missing_too.verdict is None


def test_no_worse_is_shown_by_equivalence_alone():
    near = [value + step for value, step in zip(REFERENCE, (0.001, -0.001, 0.002, 0, -0.002, 0.001, 0, 0), strict=True)]
    steady, close = [0.3] * 8, [0.3 + 0.001 * (i % 3) for i in range(8)]
    assert finding(close, steady, **margin(0.5)).verdict == "no worse"
    assert finding(close, steady, **margin(0.05)).verdict != "no worse"
    wide = finding(near, **margin(0.5))
    assert (wide.verdict, wide.p_no_worse > 0.05) == ("no difference shown", True), "rare bad runs may have been missed"
    assert finding([0.1] * 8, **margin(0.5)).verdict == "better"
    far = finding([0.9 + 0.001 * i for i in range(8)], **margin(0.5))
    assert (far.verdict, far.p_no_worse) == ("worse", 1.0)


def test_equal_runs_show_no_difference():
    found = finding([0.3] * 8, [0.3] * 8)
    assert (found.verdict, found.p, found.p_sign_flip, found.difference) == ("no difference shown", 1.0, 1.0, 0.0)


def test_a_difference_of_differences():
    study = grid_study(arms=3, values=2, seeds=4)
    small, large = [(("per_gpu_batch_size", size),) for size in (1, 2)]
    first, second = Place("batch", small), Place("batch", large)
    minus = (Place("sync", small), Place("sync", large))
    study = replace(study, contrasts=(Contrast("more", first, second, minus),))
    cells = cells_of(study)
    results = results_of(cells)
    for cell in cells:
        error = {("batch", small): 0.5, ("batch", large): 0.2, ("sync", small): 0.12, ("sync", large): 0.1}
        value = error.get((cell.arm, cell.point), 0.3) + 0.001 * cell.seed * (cell.point == small)
        results[cell.key] = replace(results[cell.key], status="ok", test={"loss": value, "error": value})
    (found,) = findings_of(summary_of(study, cells, results))
    assert found.pairs[2] == pytest.approx((2, 0.302, 0.022))
    assert found.difference == pytest.approx(0.28)


@pytest.mark.parametrize(
    ("samples", "of_samples", "error"),
    [
        (1000, True, math.sqrt((0.2 * 0.8 + 0.1 * 0.9) / 1000)),
        (0, True, math.nan),
        (1000, False, math.nan),
    ],
)
def test_the_test_set_has_an_error_of_its_own(samples, of_samples, error):
    """It is not known of a metric that does not count samples, such as one of pixels that lie together."""
    study = plain_study(arms=("batch", "sync"), seeds=3)
    summary = summary_with(study, {"batch": [0.2] * 3, "sync": [0.1] * 3})
    sized = {
        place: replace(setting, results=tuple(replace(run, test_samples=samples) for run in setting.results))
        for place, setting in summary.settings.items()
    }
    metric = replace(summary.metric, of_samples=of_samples)
    (found,) = findings_of(replace(summary, settings=sized, metric=metric))
    assert found.test_set_error == pytest.approx(error, nan_ok=True)


def test_what_is_said_of_all_findings():
    study = plain_study(arms=("batch", "sync", "group"), seeds=3)
    found = findings_of(summary_with(study, planted(3, [0.1, 0.2])))
    assert len(found) == 2
    assert "Holm" in TEST
    assert {item.verdict for item in found} <= set(VERDICTS)
    assert findings_of(summary_with(replace(study, contrasts=()), planted(3, [0.1, 0.2]))) == ()


def test_the_quickstart_can_say_what_it_found():
    """Errors of a run of it on one machine: 70 points that every seed shows."""
    study = load_study("quickstart")
    errors = {
        "batch": (0.674, 0.666, 0.818),
        "sync": (0.015, 0.017, 0.022),
        "renorm": (0.065, 0.057, 0.074),
        "group": (0.175, 0.048, 0.062),
        "batch_iid": (0.017, 0.016, 0.017),
    }
    results = {cell.key: fake_result(cell.config, errors[cell.arm][cell.seed]) for cell in study_cells(study)}
    found = {item.contrast.name: item for item in compare(study, results)}
    assert {name: item.verdict for name, item in found.items()} == {
        "batch against batch_iid": "worse",
        "sync against batch": "better",
        "renorm against batch": "better",
        "group against batch": "better",
        "sync against batch_iid": "no worse",
    }
    cost = found["batch against batch_iid"]
    assert (cost.difference, cost.low, cost.high) == pytest.approx((0.703, 0.491, 0.914), abs=0.001)


def test_compare_needs_no_results(tmp_path):
    study = load_study("quickstart")
    for results in ({}, tmp_path, str(tmp_path)):
        found = compare(study, results)
        assert [(item.verdict, item.missing) for item in found] == [(None, 6)] * len(study.contrasts)
