"""From a study's file to its cells."""

from __future__ import annotations

import pytest
from study_fakes import small_study

from syncbn.study.plan import study_cells
from syncbn.study.study_file import available_studies, load_study
from syncbn.train.config import ConfigError


def test_seeds_are_paired_and_keys_tell_cells_apart():
    cells = study_cells(small_study())
    assert [(c.arm, c.seed) for c in cells] == [(a, s) for s in (0, 1) for a in ("batch", "sync", "iid")]
    assert all(c.config.seed == c.seed for c in cells)
    assert len({c.key for c in cells}) == len(cells)


def test_a_key_is_a_function_of_the_resolved_configuration():
    cells = study_cells(small_study())
    spelled_out = {"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits", "class_skew": 1}, "precision": "fp32"}
    assert [c.key for c in study_cells(small_study(base=spelled_out))] == [c.key for c in cells]
    changed = study_cells(small_study(base={**spelled_out, "optimizer": {"lr": 0.2}}))
    assert not {c.key for c in changed} & {c.key for c in cells}


def test_quickstart_is_packaged_and_is_what_it_says():
    assert "quickstart" in available_studies()
    study = load_study("quickstart")
    cells = study_cells(study)
    assert {(c.config.gpus, c.config.per_gpu_batch_size, c.config.global_batch_size) for c in cells} == {(16, 4, 64)}
    assert {c.config.optimizer.lr for c in cells} == {0.1}
    assert {c.arm: c.config.normalization_batch_size for c in cells} == {
        "batch": 4,
        "sync": 64,
        "renorm": 4,
        "group": None,
        "batch_iid": 4,
    }
    assert {c.config.data.class_skew for c in cells if c.arm != "batch_iid"} == {4}
    assert study.reference.name == "batch_iid"
    assert study.seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"arms": {}}, "arms"),
        ({"arms": {"a": {"label": "A", "overrides": {"nrm": {"name": "sync"}}}}}, "nrm"),
        ({"arms": {"a": {"label": "A", "overrides": {"norm": {"name": "ghost"}}}}}, "ghost_batch_size"),
        ({"repeat_distributed": {"arm": "sync", "seed": 0, "processes": 3}}, "processes"),
        ({"repeat_distributed": {"arm": "nobody", "seed": 0, "processes": 2}}, "nobody"),
        ({"extra": 1}, "extra"),
    ],
    ids=str,
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_study(**changes)


def test_an_unknown_study_names_those_there_are():
    with pytest.raises(ConfigError, match=r"quickstrat.*quickstart"):
        load_study("quickstrat")
