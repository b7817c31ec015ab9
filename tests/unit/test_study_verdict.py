"""The verdict of a study says what its numbers carry, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_fakes import cells_of, grid_study, plain_study, results_of, summary_with

from syncbn.study.analysis.findings import findings_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan.grid import Contrast, Place
from syncbn.study.report.format import SPACE, contrast_words
from syncbn.study.report.verdict import verdict

JITTER = [0.000, 0.002, -0.001, 0.003, 0.001, -0.002, 0.004, -0.003]
UNTUNED = "No arm's learning rate was tuned."


def around(centre, seeds=8):
    return [centre + JITTER[i] for i in range(seeds)]


def told(study, errors):
    summary = summary_with(study, errors)
    return verdict(summary, findings_of(summary)).replace(SPACE, " ")


def against(study, *pairs, margin=None):
    """The study with these contrasts (first arm, second arm)."""
    contrasts = tuple(Contrast(f"{a} {b}", Place(a, ()), Place(b, ()), margin=margin) for a, b in pairs)
    return replace(study, contrasts=contrasts)


def test_remedies_against_an_ill_arm():
    study = plain_study(seeds=8)
    errors = {"batch": around(0.4), "sync": around(0.1)[::-1], "group": around(0.15)}
    assert told(study, errors) == (
        "At 4 images per GPU, Local BatchNorm costs 30 points of test error against SyncBatchNorm (95 % interval 30 to"
        f" 30). GroupNorm gives back 25 points. {UNTUNED}"
    )


def test_cost_against_the_reference_and_what_gives_it_back():
    study = plain_study(seeds=3, arms=("batch", "sync", "renorm", "group"), reference="group")
    study = against(study, ("batch", "group"), ("sync", "batch"), ("renorm", "batch"))
    errors = {
        "batch": [0.674, 0.666, 0.818],
        "sync": [0.015, 0.017, 0.022],
        "renorm": [0.065, 0.057, 0.074],
        "group": [0.017, 0.016, 0.017],
    }
    said = told(study, errors)
    assert said.startswith("At 4 images per GPU, Local BatchNorm costs 70 points of test error against GroupNorm (95 %")
    assert "SyncBatchNorm gives all of it back; Local BatchRenorm gives back 65 points." in said
    assert said.endswith(UNTUNED)


def test_costs_against_a_healthy_reference():
    study = plain_study(seeds=8, reference="sync")
    errors = {"sync": around(0.1), "batch": around(0.4), "group": around(0.11)}
    said = told(study, errors)
    assert said.startswith("At 4 images per GPU, Local BatchNorm costs 30 points of test error against SyncBatchNorm")
    errors["group"] = around(0.1)[::-1]
    assert "No difference is shown between GroupNorm and SyncBatchNorm: 0.0 points" in told(study, errors)


def test_nothing_shown_is_one_sentence():
    errors = {"batch": around(0.1), "sync": around(0.101)[::-1], "group": around(0.1)[::-1]}
    assert told(plain_study(seeds=8), errors) == (
        "No difference is shown in 2 contrasts; the largest is between SyncBatchNorm and Local BatchNorm: +0.10 points"
        f" (95 % interval −0.09 to 0.29). {UNTUNED}"
    )


def test_no_worse():
    study = against(plain_study(seeds=8), ("sync", "group"), margin=0.5)
    errors = {"batch": around(0.4), "sync": around(0.1), "group": [0.1 + j / 2 for j in JITTER]}
    said = told(study, errors)
    assert said.startswith("SyncBatchNorm is no worse than GroupNorm by a margin of 0.50 points: +0.03 points (95 %")
    errors["group"] = around(0.1)[::-1]
    study = against(study, ("sync", "group"), margin=0.1)
    assert told(study, errors).startswith(
        "SyncBatchNorm is not shown to be no worse than GroupNorm by a margin of 0.10"
    )


def test_value_against_value_names_the_values():
    study = grid_study(arms=2, values=4, seeds=6)
    first, second = (Place("batch", (("per_gpu_batch_size", size),)) for size in (1, 8))
    study = replace(study, seeds=(0, 2, 3, 5), contrasts=(Contrast("batch", first, second),))
    cells = cells_of(study)
    summary = summary_of(study, cells, results_of(cells))
    said = verdict(summary, findings_of(summary))
    assert said.startswith("At 1 image per GPU, Local BatchNorm costs")
    assert "points of test error against 8 images per GPU (95 % interval" in said


def test_difference_of_differences():
    study = grid_study(arms=2, values=4, seeds=6)
    places = [Place(arm, (("per_gpu_batch_size", size),)) for arm in ("batch", "sync") for size in (2, 8)]
    contrast = Contrast("batch", places[0], places[1], minus=(places[2], places[3]))
    study = replace(study, contrasts=(contrast,))
    cells = cells_of(study)
    summary = summary_of(study, cells, results_of(cells))
    assert verdict(summary, findings_of(summary)).startswith(
        "The difference (Local BatchNorm: 2 images per GPU − 8 images per GPU) −"
        " (SyncBatchNorm: 2 images per GPU − 8 images per GPU) is +"
    )
    across = replace(contrast, first=places[2], second=places[0], minus=(places[3], places[1]))
    assert contrast_words(study, across) == (
        "(SyncBatchNorm − Local BatchNorm at 2 images per GPU) − (SyncBatchNorm − Local BatchNorm at 8 images per GPU)"
    )


def test_too_few_seeds_claim_nothing():
    study = plain_study(seeds=2)
    errors = {"batch": around(0.4, 2), "sync": around(0.1, 2), "group": around(0.5, 2)}
    assert told(study, errors) == f"2 seeds cannot show a difference; 3 are needed. {UNTUNED}"
    one = {name: found[:1] for name, found in errors.items()}
    assert told(plain_study(seeds=1), one).startswith("1 seed cannot show a difference; 3 are needed.")


@pytest.mark.parametrize("reference", ["batch", None])
def test_nothing_run_and_all_diverged(reference):
    study = plain_study(seeds=3, reference=reference)
    assert told(study, {name: ["missing"] * 3 for name in ("batch", "sync", "group")}) == "No run has a result yet."
    said = told(study, {name: ["diverged"] * 3 for name in ("batch", "sync", "group")})
    if reference is None:
        assert said == f"The study plans no contrast, so nothing is compared. {UNTUNED}"
    else:
        assert said == (
            "Diverged, so not compared: SyncBatchNorm in 3 of 3 runs, Local BatchNorm in 3 of 3 runs and GroupNorm in 3"
            f" of 3 runs. {UNTUNED}"
        )


def test_diverged_arm_is_not_compared():
    errors = {"batch": around(0.4), "sync": around(0.1), "group": [*around(0.15)[:7], "diverged"]}
    said = told(plain_study(seeds=8), errors)
    assert "Diverged, so not compared: GroupNorm in 1 of 8 runs." in said
    assert "GroupNorm gives" not in said


def test_running_study_claims_only_what_is_complete():
    errors = {"batch": around(0.4), "sync": [*around(0.1)[:7], "missing"], "group": around(0.2)}
    said = told(plain_study(seeds=8), errors)
    assert said.startswith("At 4 images per GPU, Local BatchNorm costs 20 points of test error against GroupNorm")
    assert "SyncBatchNorm" not in said
    assert "Nothing is claimed for 1 of 2 contrasts: 23 of 24 runs have a result." in said
    errors["batch"] = [*around(0.4)[:7], "missing"]
    assert told(plain_study(seeds=8), errors) == (
        f"Nothing is claimed for 2 of 2 contrasts: 22 of 24 runs have a result. {UNTUNED}"
    )


def test_class_order_is_named():
    study = plain_study(seeds=3, arms=("batch", "sync"))
    cells = cells_of(study)
    results = {}
    for cell in cells:
        found = results_of([cell])[cell.key]
        config = found.config | {"data": found.config["data"] | {"class_skew": 4}}
        error = (0.4 if cell.arm == "batch" else 0.1) + JITTER[cell.seed]
        results[cell.key] = replace(found, config=config, test={"loss": error, "error": error})
    summary = summary_of(study, cells, results)
    assert verdict(summary, findings_of(summary)).startswith(
        "At 4 images per GPU in class order, Local BatchNorm costs"
    )


def test_many_remedies_are_cut_short():
    study = grid_study(arms=11, values=3, seeds=6)
    cells = cells_of(study)
    summary = summary_of(study, cells, results_of(cells))
    said = verdict(summary, findings_of(summary))
    assert said.startswith("At 2 images per GPU, Local BatchNorm costs")
    assert "more in the table" in said
    assert len(said) < 600
