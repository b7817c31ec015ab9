"""The comparisons that a study file names."""

from __future__ import annotations

import pytest
from study_fakes import small_study

from syncbn.study.plan.grid import Contrast, Place
from syncbn.study.plan.study_file import available_studies, load_study
from syncbn.train.config import ConfigError

SWEEP = {"values": [1, 2, 4], "global_batch_size": 8}
ARMS = {
    "batch": {"reference": True},
    "sync": {"overrides": {"norm": {"name": "sync"}}, "only": {"per_gpu_batch_size": [1, 2]}},
    "group": {"overrides": {"norm": {"name": "group", "groups": 2}}},
}


def study_with(*contrasts, **changes):
    given = {"contrasts": list(contrasts)} if contrasts else {}
    return small_study(
        base={"data": {"name": "digits"}},
        arms=ARMS,
        sweep=SWEEP,
        axes={"optimizer.lr": [0.1, 0.001]},
        **given,
        **changes,
    )


def at(size, lr=0.1):
    return (("per_gpu_batch_size", size), ("optimizer.lr", lr))


def test_arm_against_arm():
    (found,) = study_with({"arm": "sync", "at": {"per_gpu_batch_size": 2}, "against": {"arm": "batch"}}).contrasts
    assert (found.first, found.second) == (Place("sync", at(2)), Place("batch", at(2)))
    assert (found.minus, found.margin) == (None, None)
    assert found.places == (found.first, found.second)
    assert found.name == "sync per_gpu_batch_size=2 optimizer.lr=0.1 against batch"


def test_value_against_value_along_an_axis():
    entry = {"arm": "batch", "against": {"at": {"per_gpu_batch_size": 4}}, "no_worse_by": 0.5}
    (found,) = study_with(entry).contrasts
    assert found == Contrast(
        "batch per_gpu_batch_size=1 optimizer.lr=0.1 against per_gpu_batch_size=4",
        Place("batch", at(1)),
        Place("batch", at(4)),
        margin=0.5,
    )


def test_a_difference_of_differences():
    entry = {"arm": "batch", "against": {"at": {"per_gpu_batch_size": 2}}, "minus": {"arm": "sync"}}
    (found,) = study_with(entry).contrasts
    assert found.minus == (Place("sync", at(1)), Place("sync", at(2)))
    assert found.places == (Place("batch", at(1)), Place("batch", at(2)), *found.minus)
    assert found.name.endswith("against per_gpu_batch_size=2 minus sync against per_gpu_batch_size=2")


def test_several_arms_are_a_contrast_each():
    study = study_with({"arm": ["sync", "group"], "at": {"optimizer.lr": "1e-3"}, "against": {"arm": "batch"}})
    assert [contrast.first for contrast in study.contrasts] == [
        Place("sync", at(1, 0.001)),
        Place("group", at(1, 0.001)),
    ]
    assert study.comparison_point() == at(1, 0.001)


def test_without_contrasts_each_arm_is_compared_with_the_reference():
    study = study_with()
    pairs = [(contrast.first, contrast.second) for contrast in study.contrasts]
    assert pairs == [(Place(arm, at(1)), Place("batch", at(1))) for arm in ("sync", "group")]
    assert small_study(arms={"a": {}, "b": {"overrides": {"norm": {"name": "sync"}}}}).contrasts == ()


OK = {"arm": "sync", "against": {"arm": "batch"}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sync", r"contrasts\[0\]: got 'sync', expected a mapping"),
        ({"arm": "sync"}, r"contrasts\[0\]: keys: got .* expected the key 'against' too"),
        (
            {**OK, "versus": 1},
            r"contrasts\[0\]: key: got 'versus', expected one of arm, against, at, minus, no_worse_by",
        ),
        ({**OK, "arm": "nobody"}, r"contrasts\[0\].arm: got 'nobody', expected one of the arms \(batch, sync, group\)"),
        ({**OK, "arm": []}, r"contrasts\[0\].arm: got \[\], expected at least one arm"),
        ({**OK, "against": {"arm": "x"}}, r"contrasts\[0\].against.arm: got 'x', expected one of the arms"),
        ({**OK, "against": {"arm": "sync"}}, r"contrasts\[0\].against: got .* expected another arm or another place"),
        ({**OK, "against": "batch"}, r"contrasts\[0\].against: got 'batch', expected a mapping"),
        ({**OK, "minus": {"arm": "sync"}}, r"contrasts\[0\].minus: got .* expected another arm or another place"),
        ({**OK, "minus": None}, r"contrasts\[0\].minus: got nothing, expected a mapping"),
        (
            {**OK, "at": {"lr": 1}},
            r"contrasts\[0\].at: got 'lr', expected an axis of the study \(per_gpu_batch_size, optimizer.lr\)",
        ),
        ({**OK, "at": {"per_gpu_batch_size": 3}}, r"contrasts\[0\].at.per_gpu_batch_size: got 3, expected one of that"),
        ({**OK, "at": {"per_gpu_batch_size": True}}, r"contrasts\[0\].at.per_gpu_batch_size: got True"),
        ({**OK, "at": {"per_gpu_batch_size": "few"}}, r"contrasts\[0\].at.per_gpu_batch_size: got 'few'"),
        ({**OK, "at": {"per_gpu_batch_size": 4}}, r"contrasts\[0\]: got 'sync per_gpu_batch_size=4.* this arm is run"),
        ({**OK, "no_worse_by": 0}, r"contrasts\[0\].no_worse_by: got 0, expected points of test error, above 0"),
        ({**OK, "no_worse_by": True}, r"contrasts\[0\].no_worse_by: got True"),
        ({"arm": "group", "against": {"at": {"per_gpu_batch_size": 2}}}, "got 'group.* whose configurations differ"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(entry, message):
    with pytest.raises(ConfigError, match=message) as caught:
        study_with(entry)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("study: contrasts")


def test_a_contrast_stands_once_and_the_list_is_none_or_some():
    with pytest.raises(ConfigError, match=r"contrasts\[1\]: got 'sync .* against batch', expected each contrast once"):
        study_with(OK, OK)
    for content in ({}, [], "sync"):
        with pytest.raises(ConfigError, match=r"study: contrasts: got .*, expected a list of at least one contrast"):
            small_study(contrasts=content)


@pytest.mark.parametrize("name", available_studies())
def test_studies_of_the_package_name_contrasts(name):
    contrasts = load_study(name).contrasts
    assert len({contrast.name for contrast in contrasts}) == len(contrasts) >= 2
