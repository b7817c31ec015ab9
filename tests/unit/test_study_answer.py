"""The answer of a study: it says what its numbers carry, whatever the reference is, and nothing more."""

from __future__ import annotations

import re

import pytest
from report_fakes import cells_of, grid_study, outcomes_of, plain_study, summary_with

from syncbn.study.analysis.comparisons import comparison_lines, comparisons_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan.contrasts import Contrast, Place
from syncbn.study.report.answer import answer

JITTER = [0.000, 0.002, -0.001, 0.003, 0.001, -0.002, 0.004, -0.003]


def around(centre, seeds=8):
    return [centre + JITTER[i] for i in range(seeds)]


def told(study, errors):
    summary = summary_with(study, errors)
    found = answer(summary, comparisons_of(summary))
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in (found.headline, found.support, found.caveat)]


def test_a_gain_over_an_ill_reference():
    study = plain_study(seeds=8)
    headline, support, caveat = told(study, {"batch": around(0.4), "sync": around(0.1)[::-1], "group": around(0.15)})
    assert headline.startswith(
        "SyncBatchNorm has the lowest error: 10.1 %, 30.0 points (95 % interval 29.8 to 30.2) below"
    )
    assert headline.endswith("below the reference, Local BatchNorm (40.1 %).")
    assert support == "That is shown (p = 0.016, corrected for 2 comparisons); so is GroupNorm (by 25.0)."
    assert "Only differences from the reference were tested" in caveat


def test_a_lower_mean_that_is_not_shown_is_named():
    study = plain_study(seeds=8)
    noisy = [0.0] * 5 + [0.42] * 3  # three of eight differences have the other sign
    headline, support, _ = told(study, {"batch": around(0.4), "sync": around(0.2), "group": noisy})
    assert headline.startswith("SyncBatchNorm has the lowest error of those shown to differ")
    assert "GroupNorm's mean is lower still (15.8 %), but its difference from the reference is not shown." in support


def test_a_loss_against_a_goal():
    study = plain_study(seeds=8, reference="sync")
    errors = {"sync": around(0.1), "batch": around(0.4), "group": around(0.1)[::-1]}
    headline, support, _ = told(study, errors)
    assert headline.startswith(
        "No arm is shown to be below the reference, SyncBatchNorm (10.1 %); GroupNorm has the lowest"
    )
    assert (
        "That difference is not shown (p = 1.00, corrected for 2 comparisons), which does not prove the two equal"
        in support
    )
    assert support.endswith("shown to be above the reference: Local BatchNorm (by 30.0).")
    errors["group"] = around(0.11)
    headline, support, _ = told(study, errors)
    assert "11.1 %, 1.0 points (95 % interval 1.0 to 1.0) above it." in headline
    assert support.startswith("Even that is shown to be above it (p = 0.016")


def test_nothing_shown_is_no_proof_of_equality():
    errors = {"batch": around(0.1), "sync": around(0.1)[::-1], "group": around(0.1)[::-1]}
    headline, support, _ = told(plain_study(seeds=8), errors)
    assert headline == "No arm is shown to differ from the reference, Local BatchNorm (10.1 %)."
    assert "p = 1.00" in support
    assert "does not prove them equal" in support


def test_too_few_seeds_are_described_and_nothing_is_claimed():
    study = plain_study(seeds=3)
    errors = {"batch": around(0.4, 3), "sync": around(0.1, 3)[::-1], "group": around(0.5, 3)}
    headline, support, caveat = told(study, errors)
    assert headline == (
        "Not enough seeds to claim anything: with 3 seeds, none of the 2 comparisons can become significant"
        " (7 are needed)."
    )
    assert support.startswith("Described, not claimed: SyncBatchNorm has the lowest mean, 10.0 %, 30.0 points")
    assert support.endswith("that of the reference, Local BatchNorm (40.0 %); GroupNorm has the highest, 50.0 %.")
    assert not re.search(r"\bshown\b|p =", headline + support)
    assert "Only differences" not in caveat


def test_one_seed():
    study = plain_study(seeds=1)
    headline, support, caveat = told(study, {"batch": [0.4], "sync": [0.1], "group": [0.2]})
    assert "with 1 seed, none of the 2 comparisons" in headline
    assert "SyncBatchNorm has the lowest mean, 10.0 %, 30.0 points below that of the reference" in support
    assert "interval" not in support
    assert caveat == "One seed: how far another would be from it is unknown."


def test_without_a_reference():
    study = plain_study(seeds=3, reference=None)
    errors = {"batch": around(0.4, 3), "sync": around(0.1, 3), "group": around(0.2, 3)}
    headline, support, caveat = told(study, errors)
    assert headline.startswith(
        "SyncBatchNorm has the lowest mean, 10.0 % test error (95 % interval 9.7 to 10.4 %); Local"
    )
    assert "no difference was tested and none is claimed" in support
    assert caveat == "Means over 3 seeds."


@pytest.mark.parametrize("reference", ["batch", None])
def test_nothing_run_and_all_diverged(reference):
    study = plain_study(seeds=2, reference=reference)
    nothing = {name: ["missing"] * 2 for name in ("batch", "sync", "group")}
    assert told(study, nothing) == ["No run has a result yet.", "", "Incomplete: 6 of 6 runs have no result."]
    headline, _, caveat = told(study, {name: ["diverged"] * 2 for name in nothing})
    assert headline == "Every run diverged: 6 runs of 3 arms."
    assert caveat == "6 of 6 runs diverged; they are counted, and no part of any mean."


def test_diverged_arm_and_missing_runs_are_in_the_words():
    study = plain_study(seeds=8)
    group = [0.05, *around(0.15)[1:7], "diverged"]
    errors = {"batch": around(0.4), "sync": [*around(0.1)[:7], "missing"], "group": group}
    headline, support, caveat = told(study, errors)
    assert headline.startswith("Interim, nothing is claimed: for 1 of the 2 comparisons 7 of 8 planned pairs")
    assert "No claim where runs diverged: GroupNorm (1 of 8)." in support
    assert "1 of 23 runs diverged; they are counted, and no part of any mean." in caveat
    assert "Incomplete: 1 of 24 runs have no result." in caveat
    summary = summary_with(study, errors)
    lines = {line.arm: line for line in comparison_lines(comparisons_of(summary))}
    assert (lines["group"].difference, lines["group"].verdict) == ("–", "no claim: diverged in 1 run")


def test_nothing_is_claimed_before_all_planned_runs_have_ended():
    study = plain_study(seeds=8)
    sync = [0.1] * 7  # the reference's mean over these seeds is 40.1 %, over all 8 it would be 45.1 %
    reference = [*around(0.4)[:7], 0.8]
    errors = {"batch": reference, "sync": [*sync, "missing"], "group": around(0.2)}
    headline, support, caveat = told(study, errors)
    # The other comparison is complete; the one that is not counts as the least clear in its correction.
    assert headline.startswith("GroupNorm has the lowest error of those shown to differ so far: 20.1 %")
    assert "p = 0.016, corrected for 2 comparisons" in support
    assert "SyncBatchNorm's mean is lower still (10.0 %), but runs of it are missing." in support
    assert caveat.startswith("Means over 7 to 8 seeds of 8 planned, each paired")
    lines = {line.arm: line for line in comparison_lines(comparisons_of(summary_with(study, errors)))}
    assert lines["sync"].verdict.replace("\N{NO-BREAK SPACE}", " ") == (
        "interim, no claim: 7 of 8 pairs of runs; the reference's mean over these seeds is 40.1 %"
    )
    assert (lines["sync"].p, lines["sync"].p_corrected) == ("–", "–")
    assert lines["group"].verdict == "lower error"
    headline, support, _ = told(study, {**errors, "batch": [*reference[:7], "missing"]})
    assert headline == (
        "Interim, nothing is claimed: for 2 of the 2 comparisons 7 of 8 planned pairs of runs have a result."
    )
    assert support.startswith("Described, not claimed: SyncBatchNorm has the lowest mean, 10.0 %, 30.1 points")
    assert "that of the reference, Local BatchNorm (40.1 %)" in support
    assert "Means are over the pairs that finished." in support
    assert support.endswith("finds differences by chance more often than it says.")


def test_a_difference_that_is_shown_beside_an_interval_with_0_is_explained():
    study = plain_study(seeds=8, arms=("batch", "sync"))
    errors = {"batch": [0.11] * 7 + [0.9], "sync": [0.1] * 8}  # all differences have one sign, one is far out
    _, support, _ = told(study, errors)
    assert "p = 0.008; by the sign-flip test of the mean difference: Student's t interval is another" in support
    (line,) = comparison_lines(comparisons_of(summary_with(study, errors)))
    assert line.verdict == (
        "lower error: shown by the sign-flip test of the mean difference; Student's t, another method, leaves 0 "
        "possible"
    )


def test_diverged_reference_leaves_nothing_to_measure():
    study = plain_study(seeds=8)
    errors = {"batch": [*around(0.4)[:6], "diverged", "diverged"], "sync": around(0.1), "group": around(0.2)}
    headline, support, _ = told(study, errors)
    assert headline == ("The reference, Local BatchNorm, diverged in 2 of 8 runs; no run of any other arm did.")
    assert support.startswith(
        "The lowest mean of those without a diverged run is that of SyncBatchNorm, 10.1 % test error"
    )
    assert "no difference from it is tested" in support
    headline, _, _ = told(study, {**errors, "batch": ["missing"] * 8})
    assert headline == "The reference, Local BatchNorm, has no result yet, so nothing is compared."


def test_an_arm_that_was_not_compared_is_not_passed_over():
    study = plain_study(seeds=8, contrasts=(Contrast("group", Place("group", ()), Place("batch", ())),))
    headline, _, _ = told(study, {"batch": around(0.4), "sync": around(0.1), "group": around(0.2)[::-1]})
    assert headline.startswith("GroupNorm has the lowest error of the arms compared: 20.1 %")


def test_the_place_is_named():
    study = grid_study(arms=3, values=3, seeds=8)
    cells = cells_of(study)
    summary = summary_of(study, cells, {key: o.result for key, o in outcomes_of(cells).items()})
    found = answer(summary, comparisons_of(summary))
    assert found.headline.startswith("At 2 images a GPU, SyncBatchNorm has the lowest error")
