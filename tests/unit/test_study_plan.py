"""From a study's file to its cells."""

from __future__ import annotations

import pytest
from study_fakes import small_study

from syncbn.study import commands
from syncbn.study.analysis.statistics import MIN_SEEDS
from syncbn.study.plan.grid import parity_cell, study_cells, unique_cells
from syncbn.study.plan.study_file import available_studies, load_study
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


def test_words_are_no_part_of_a_key():
    keys = [c.key for c in study_cells(small_study())]
    words = small_study(title="Another title", question="And another?", notes="A note.")
    assert [c.key for c in study_cells(words)] == keys


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
    assert (study.parity.arm, study.parity.processes) == ("sync", (1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast": []}, r"study: key: got 'contrast', expected one of name, .*; did you mean contrasts\?"),
        ({"arms": {"a": {"lable": "A"}}}, r"arms.a: key: got 'lable', expected .*; did you mean label\?"),
        ({"tune": {"halvng": True}}, r"tune: key: got 'halvng', expected .* or one of seeds, .* mean halving\?"),
        ({"base": {"model": {"widht": 4}}}, r"model.widht: got 4, expected a known key; did you mean model.width\?"),
        ({"axes": {"model.widht": [4]}}, r"axes: axis: got 'model.widht', .* configuration; did you mean model.width"),
        ({"base": {}, "sweep": {"values": [1]}}, "sweep.global_batch_size: got nothing, expected a positive integer"),
        (
            {"base": {"gpus": None}, "sweep": {"values": [1], "global_batch_size": 4}},
            "study: base: gpus: got nothing, expected no such key here, as the sweep sets it",
        ),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"notes": 3}, "notes: got 3, expected a text"),
        ({"seeds": [-1]}, r"study: seeds: got \[-1\], expected integers from 0 to 2\^31 - 1"),
        ({"seeds": [0, 2**31]}, r"study: seeds: got .*, expected integers from 0 to"),
        ({"base": 3}, "study: base: got 3, expected a mapping"),
        ({"base": {"optimizer": None}}, "study: arm batch: optimizer: got nothing, expected a mapping"),
        ({"base": {"data": 3}}, "study: arm batch: data: got 3, expected a mapping"),
        ({"base": {"data": 3}, "axes": {"data.class_skew": [1, 2]}}, "study: base: data: got 3, expected a mapping"),
        ({"arms": {"a": {"overrides": {"norm": None}}}}, "study: arm a: norm: got nothing, expected a mapping"),
        ({"arms": {"a": {"overrides": None}}}, "study: arms.a.overrides: got nothing, expected a mapping"),
        ({"arms": {}}, "arms"),
        ({"arms": {"a": {"label": "A", "overrides": {"nrm": {"name": "sync"}}}}}, "nrm"),
        ({"arms": {"a": {"label": "A", "overrides": {"norm": {"name": "ghost"}}}}}, "ghost_batch_size"),
        ({"parity": {"arm": "sync", "processes": [1, 3]}}, r"parity.processes: got \[3\], expected divisors of the 4"),
        (
            {"parity": {"arm": "sync", "processes": [1]}},
            r"parity.processes: got \[1\], expected a list of at least two",
        ),
        ({"parity": {"arm": "sync", "steps": 0}}, "parity.steps: got 0, expected a positive integer"),
        ({"parity": {"arm": "nobody"}}, "parity.arm: got 'nobody', expected one of the arms"),
        ({"parity": {"processes": [1, 2]}}, "parity: keys: .* the key 'arm' too"),
        ({"extra": 1}, "extra"),
    ],
    ids=str,
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        small_study(**changes)
    assert "\n" not in str(caught.value)


SWEEP = {"values": [1, 2, 4], "global_batch_size": 8}
HELD = {"kind": "coupled", "values": [1], "hold": ["epochs", "steps"], "steps": 9}


def swept(**changes):
    base = {"data": {"name": "digits"}}
    arms = {name: {"overrides": {"norm": {"name": name}}} for name in ("batch", "sync", "group")}
    return small_study(**{"base": base, "arms": arms, "sweep": SWEEP, **changes})


def test_a_decoupled_sweep_cuts_the_same_batch_otherwise():
    cells = [c for c in study_cells(swept()) if c.seed == 0]
    assert [(c.arm, dict(c.point)["per_gpu_batch_size"]) for c in cells] == [
        (arm, size) for arm in ("batch", "sync", "group") for size in (1, 2, 4)
    ]
    assert {c.config.global_batch_size for c in cells} == {8}
    assert [c.config.normalization_batch_size for c in cells] == [1, 2, 4, 8, 8, 8, None, None, None]
    assert len({c.config.optimizer.lr for c in cells}) == 1
    # GroupNorm does not see the cut: three cells, one run.
    assert len({c.key for c in cells if c.arm == "group"}) == 1
    assert len(unique_cells(cells)) == 7


def test_a_sweep_of_sync_groups_and_of_ghost_batches():
    base = {"data": {"name": "digits"}, "gpus": 8, "per_gpu_batch_size": 4}
    groups = study_cells(swept(base=base, sweep={"vary": "sync_group_size", "values": [1, 2, 8]}))
    sizes = {(c.arm, dict(c.point)["sync_group_size"]): c.config.normalization_batch_size for c in groups}
    assert [sizes["sync", k] for k in (1, 2, 8)] == [4, 8, 32]
    assert [sizes["batch", k] for k in (1, 2, 8)] == [4, 4, 4]
    arms = {"ghost": {"overrides": {"norm": {"name": "ghost"}}}, "group": {"overrides": {"norm": {"name": "group"}}}}
    ghosts = study_cells(swept(base=base, arms=arms, sweep={"vary": "ghost_batch_size", "values": [1, 2]}))
    assert [c.config.norm.ghost_batch_size for c in ghosts if c.seed == 0] == [1, 2, None, None]


def test_a_coupled_sweep_takes_batch_and_learning_rate_along():
    sweep = {"kind": "coupled", "values": [2, 8], "hold": ["epochs", "steps"], "steps": 30}
    base = {"data": {"name": "digits"}, "gpus": 4, "budget": {"epochs": 3}}
    cells = [c for c in study_cells(swept(base=base, sweep=sweep)) if (c.arm, c.seed) == ("group", 0)]
    assert [tuple(dict(c.point).values()) for c in cells] == [(2, "epochs"), (2, "steps"), (8, "epochs"), (8, "steps")]
    assert [c.config.global_batch_size for c in cells] == [8, 8, 32, 32]
    assert {c.config.optimizer.lr_scaling for c in cells} == {"linear"}
    assert [(c.config.budget.epochs, c.config.budget.steps) for c in cells] == [(3, None), (None, 30)] * 2
    assert len({c.key for c in cells}) == 4


def test_values_are_spelled_as_in_the_file(monkeypatch, capsys):
    axes = {"sync_group_size": [None, 2], "optimizer.nesterov": [True, False]}
    study = small_study(
        axes=axes,
        arms={"sync": {"overrides": {"norm": {"name": "sync"}}}},
        contrasts=[{"arm": "sync", "against": {"at": {"sync_group_size": 2}}}],
    )
    assert study_cells(study)[0].label == "sync, sync_group_size null, optimizer.nesterov true, seed 0"
    expected = "sync sync_group_size=null optimizer.nesterov=true against sync_group_size=2"
    assert study.contrasts[0].name == expected
    monkeypatch.setattr(commands, "load_study", lambda _: study)
    commands.plan_study("small")
    assert "sync_group_size: null, 2\noptimizer.nesterov: true, false\n" in capsys.readouterr().out


def test_axes_multiply_and_only_restricts():
    arms = {"batch": {"reference": True}, "half": {"only": {"optimizer.lr": [0.1], "per_gpu_batch_size": [4, 2]}}}
    study = swept(arms=arms, axes={"optimizer.lr": [0.1, 0.2]})
    assert study.axes == {"per_gpu_batch_size": (1, 2, 4), "optimizer.lr": (0.1, 0.2)}
    points = [tuple(dict(point).values()) for point in study.points(study.arms[1])]
    assert points == [(2, 0.1), (4, 0.1)]
    assert {c.config.optimizer.lr for c in study_cells(study) if c.arm == "batch"} == {0.1, 0.2}
    assert dict(study.comparison_point()) == {"per_gpu_batch_size": 1, "optimizer.lr": 0.1}


def test_an_axis_stands_in_for_the_base():
    base = {"data": {"name": "digits"}, "optimizer": {"lr": 0.4}}
    cells = study_cells(swept(base=base, axes={"optimizer.lr": [0.1, 0.2]}))
    assert {c.config.optimizer.lr for c in cells} == {0.1, 0.2}


def test_a_number_that_yaml_takes_for_a_text():
    study = swept(
        axes={"optimizer.lr": ["1e-3", "2E-1"], "optimizer.nesterov": [True, False]},
        contrasts=[{"arm": "sync", "at": {"optimizer.lr": "2e-1"}, "against": {"arm": "batch"}}],
    )
    assert study.axes["optimizer.lr"] == (0.001, 0.2)
    assert dict(study.comparison_point())["optimizer.lr"] == 0.2
    assert {c.config.optimizer.lr for c in study_cells(study)} == {0.001, 0.2}


def test_keys_that_a_file_merges_may_be_replaced(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: a\ntitle: a\nquestion: a\nseeds: [0]\n"
        "base: &base\n  gpus: 2\n  data: &data {name: digits, class_skew: 2}\n"
        "arms:\n"
        "  one: &one\n    overrides: &plain\n      <<: *base\n      data: {<<: *data, class_skew: 1}\n"
        "  two:\n    <<: *one\n    overrides:\n      <<: *plain\n      gpus: 4\n"
    )
    found = {c.arm: (c.config.gpus, c.config.data.class_skew) for c in study_cells(load_study(path))}
    assert found == {"one": (2, 1), "two": (4, 1)}


def test_the_cell_of_the_parity_check():
    study = swept(parity={"arm": "sync"})
    assert (study.parity.processes, study.parity.steps) == ((1, 2), 8)
    cells = study_cells(study)
    assert parity_cell(study.parity, cells) is next(c for c in cells if c.arm == "sync")
    at = {"per_gpu_batch_size": 4}
    study = swept(parity={"arm": "batch", "processes": [2, 1], "steps": 3, "at": at})
    cell = parity_cell(study.parity, study_cells(study))
    assert (cell.arm, cell.seed, dict(cell.point)) == ("batch", 0, at)
    assert swept().parity is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"axes": {"optimizer.lrr": [0.1]}},
            r"axes: axis: got 'optimizer.lrr', expected .*; did you mean optimizer.lr",
        ),
        ({"axes": {"optimizer.lr": []}}, r"axes.optimizer.lr: got \[\], expected a list of at least one value"),
        ({"axes": {"optimizer.lr": [0.1, 0.1]}}, "values that differ"),
        ({"axes": {"optimizer.lr": [1, 1.0]}}, "values that differ"),
        ({"axes": {"optimizer.lr": ["1e-3", 0.001]}}, "values that differ"),
        ({"axes": {"optimizer.nesterov": [True, 1]}}, "optimizer.nesterov 1: optimizer.nesterov: got"),
        (
            {"axes": {"norm.name": ["batch"]}},
            "arms.batch.overrides: norm.name: got 'batch', .* the axis norm.name sets",
        ),
        (
            {"arms": {"a": {"overrides": {"data": 3}}}, "axes": {"data.class_skew": [1]}},
            "arms.a.overrides: data: got 3, expected .* the axis data.class_skew sets it",
        ),
        ({"axes": {"norm": [1]}}, "arms.batch.overrides: norm.name: .* the axis norm sets"),
        (
            {"axes": {"data.class_skew": [1], "data": [1]}},
            "axis: got 'data', .* the axis data.class_skew sets the same",
        ),
        ({"axes": {"gpus": [1]}}, "axes: axis: got 'gpus', expected no such axis, as the sweep sets it"),
        ({"base": {"gpus": 8}}, "base: gpus: got 8, expected no such key here, as the sweep sets it"),
        ({"arms": {"a": {"overrides": {"per_gpu_batch_size": 2}}}}, "arms.a.overrides: per_gpu_batch_size: got 2"),
        (
            {"base": {"sync_group_size": 2}, "sweep": {"vary": "sync_group_size", "values": [1]}},
            "base: sync_group_size: got 2",
        ),
        (
            {"base": {"norm": {"ghost_batch_size": 2}}, "sweep": {"vary": "ghost_batch_size", "values": [1]}},
            "base: norm.ghost_batch_size: got 2",
        ),
        ({"base": {"per_gpu_batch_size": 2}, "sweep": {"kind": "coupled", "values": [1]}}, "base: per_gpu_batch_size"),
        ({"axes": {"optimizer.lr_scaling": ["sqrt"]}, "sweep": {"kind": "coupled", "values": [1]}}, "axis: got 'opt"),
        ({"axes": {"budget.epochs": [1]}, "sweep": HELD}, "axis: got 'budget.epochs'"),
        ({"axes": {"budget.steps": [1]}, "sweep": HELD}, "axis: got 'budget.steps'"),
        ({"base": {"budget": {"epochs": None, "steps": 5}}, "sweep": HELD}, "base: budget.steps: got 5"),
        ({"base": {"budget": {"epochs": 5}}, "sweep": {**HELD, "hold": "steps"}}, "base: budget.epochs: got 5"),
        (
            {"base": {"budget": {"epochs": None, "steps": 5}}, "sweep": {"kind": "coupled", "values": [1]}},
            "arm batch, per_gpu_batch_size 1: budget.epochs: got nothing, expected a number of epochs",
        ),
        ({"axes": {"per_gpu_batch_size": [1]}}, "an axis that the sweep does not vary already"),
        ({"axes": {"seed": [1]}}, "axis: got 'seed'"),
        ({"axes": {"optimizer.lr": ["high"]}}, r"arm batch, .*optimizer.lr high: optimizer.lr: got"),
        ({"sweep": {"values": [3], "global_batch_size": 8}}, r"values: got \[3\], expected divisors of"),
        ({"sweep": {"values": []}}, "sweep.values: got"),
        ({"sweep": {"values": [1]}}, "global_batch_size: got nothing, expected a positive integer"),
        ({"sweep": {"values": [0], "global_batch_size": 8}}, "expected positive integers"),
        ({"sweep": {**SWEEP, "vary": "weight"}}, "sweep.vary: got 'weight', expected one of per_gpu_batch_size"),
        ({"sweep": {**SWEEP, "kind": "both"}}, "decoupled or coupled"),
        ({"sweep": {**SWEEP, "kind": "coupled"}}, "global_batch_size: got 8, expected none"),
        ({"sweep": {"kind": "coupled", "values": [1], "hold": "steps"}}, "sweep.steps: got nothing"),
        ({"sweep": {"kind": "coupled", "values": [1], "hold": ["time"]}}, "epochs, steps or both"),
        ({"sweep": {**SWEEP, "hold": "epochs"}}, "none with a decoupled sweep"),
        ({"sweep": {**SWEEP, "steps": 3}}, "sweep.steps: got 3"),
        (
            {"arms": {"a": {"only": {"per_gpu_batch_size": [3]}}}},
            r"only.per_gpu_batch_size: got 3, expected one of that axis's values",
        ),
        ({"arms": {"a": {"only": {"gpus": [3]}}}}, "only: got 'gpus', expected an axis of the study"),
        ({"contrasts": [{"arm": "nobody", "against": {"arm": "batch"}}]}, r"contrasts\[0\].arm: got 'nobody'"),
        (
            {"contrasts": [{"arm": "batch", "at": {"per_gpu_batch_size": 9}, "against": {"arm": "sync"}}]},
            r"contrasts\[0\].at.per_gpu_batch_size: got 9",
        ),
        (
            {"parity": {"arm": "sync", "at": {"gpus": 1}}},
            "parity.at: got 'gpus', expected an axis of the study",
        ),
        (
            {
                "arms": {"a": {"only": {"per_gpu_batch_size": [1]}}},
                "parity": {"arm": "a", "at": {"per_gpu_batch_size": 2}},
            },
            "parity.at: got .* expected a place at which the arm is run",
        ),
    ],
    ids=str,
)
def test_mistakes_in_a_grid_are_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        swept(**changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("study")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"expected a file in YAML \(line 1: expected the node content"),
        ("- 1", "a file that holds keys with their values, not a list"),
        ("name: a\nname: b", "'name.*is given twice"),
        ("base: &b {gpus: 1, gpus: 2}\nname: {<<: *b}", "'gpus.*is given twice"),
        ("name: 2024-13-45", "the key 'title' too"),
        ("[" * 100_000, "nested too deeply"),
        ("", "the key 'name' too"),
        ("name: a", "the key 'title' too"),
    ],
)
def test_malformed_files_are_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["nbs_sweep", "non_iid", "coupled", "sync_group", "cifar10_nbs", "imagenet_resnet50", "imagenet_mabn"]
)
def test_reference_studies_can_reach_their_claims(name):
    """As many seeds as the planned comparisons need, but where a seed costs days."""
    study = load_study(name)
    assert study.contrasts
    enough = len(study.seeds) >= MIN_SEEDS
    assert enough == (not name.startswith("imagenet"))


def test_an_unknown_study_names_those_there_are():
    with pytest.raises(ConfigError, match=r"quickstrat.*quickstart"):
        load_study("quickstrat")
