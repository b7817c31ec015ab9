"""Keys that count steps and lie beyond the end of a study's runs are remarked on, once for each arm."""

from __future__ import annotations

import pytest
from study_fakes import fake_result, small_study

from syncbn.cli import main
from syncbn.study.plan.beyond import beyond_lines
from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.study_file import available_studies, load_study
from syncbn.study.stages import stages
from syncbn.train.config import DataConfig
from syncbn.train.data.datasets import load_data, training_size
from syncbn.train.result import write_atomically
from syncbn.train.yaml_file import yaml_text

RENORM = {"name": "renorm", "warmup_steps": 10, "r_ramp_end": 60, "d_ramp_end": 40}
ARMS = {"batch": {"overrides": {"norm": {"name": "batch"}}}, "renorm": {"overrides": {"norm": RENORM}}}


def base(**changes):
    return {"gpus": 4, "per_gpu_batch_size": 4, "budget": {"epochs": None, "steps": 50}, **changes}


def lines(study, results=None):
    trials, cells = stages(study, results or {})
    return beyond_lines([*trials, *cells], results or {})


def test_one_line_for_an_arm():
    assert lines(small_study(base=base(), arms=ARMS)) == [
        "arm renorm: norm.r_ramp_end 60: beyond the end of all runs at step 50"
    ]
    warm = base(optimizer={"warmup_steps": 50, "schedule": "constant"})
    assert [line.split(":")[:2] for line in lines(small_study(base=warm, arms=ARMS))] == [
        ["arm batch", " optimizer.warmup_steps 50"],
        ["arm renorm", " optimizer.warmup_steps 50; norm.r_ramp_end 60"],
    ]
    assert not lines(small_study(base=base(budget={"epochs": None, "steps": 60}), arms=ARMS))


def test_values_that_the_study_varies():
    arms = {"renorm": {"overrides": {"norm": {"name": "renorm", "warmup_steps": 10, "d_ramp_end": 40}}}}
    study = small_study(base=base(), arms=arms, axes={"norm.r_ramp_end": [50, 60, 70]})
    assert lines(study) == ["arm renorm: norm.r_ramp_end 60, 70: beyond the end of 4 of 6 runs at step 50"]


def test_the_shorter_runs_of_halving():
    data = {"name": "digits", "train_samples": 320, "validation_fraction": 0.2}
    tune = {"optimizer.lr": [0.1, 0.2, 0.4, 0.8], "halving": 2}
    study = small_study(base=base(data=data, budget={"epochs": 4}), arms=ARMS, tune=tune)
    assert lines(study) == [
        "arm renorm: norm.r_ramp_end 60; norm.d_ramp_end 40: beyond the end of shorter runs of the tuning at step 34"
    ]


def test_epochs_are_steps_when_the_data_are_known():
    """Those of the package's data sets before a run, and those of a task after one."""
    digits = small_study(base=base(data={"name": "digits"}, budget={"epochs": 1}, per_gpu_batch_size=16), arms=ARMS)
    assert lines(digits) == [
        "arm renorm: norm.r_ramp_end 60; norm.d_ramp_end 40: beyond the end of all runs at step 23"
    ]
    canvas = {"name": "segmentation", "options": {"samples": {"train": 64}}}
    drawn = small_study(base=base(task=canvas, budget={"epochs": 11}), arms=ARMS)
    assert lines(drawn) == ["arm renorm: norm.r_ramp_end 60: beyond the end of all runs at step 44"]
    files = {"name": "segmentation", "options": {"data": "masks", "root": "nowhere"}}
    assert lines(small_study(base=base(task=files, budget={"epochs": 11}), arms=ARMS)) == []
    task = small_study(base=base(task={"name": "mine:Task"}, budget={"epochs": 20}), arms=ARMS)
    assert lines(task) == []
    first = study_cells(task)[0]
    assert "at step 20" in lines(task, {first.key: fake_result(first.config)})[0], "8 samples: one step an epoch"


@pytest.mark.parametrize("name", ["synthetic", "digits", "mnist5k"])
@pytest.mark.parametrize("changes", [{}, {"train_samples": 331, "validation_fraction": 0.15}])
def test_the_size_of_a_training_set_is_known_without_reading_it(name, changes):
    config = DataConfig(name=name, image_size=4, **changes)
    assert training_size(config) == len(load_data(config, 0).train)
    assert training_size(DataConfig(name="imagefolder", root="nowhere")) is None


@pytest.mark.parametrize("name", available_studies())
def test_the_packaged_studies(name):
    assert lines(load_study(name)) == []


def test_the_commands_say_it_once(tmp_path, capsys):
    data = {"name": "synthetic", "synthetic_samples": 32, "synthetic_classes": 2, "image_size": 8}
    content = {"name": "few", "title": "Few", "question": "What?", "seeds": [0, 1]}
    content |= {"base": base(data=data, model={"width": 2}, budget={"epochs": 1}, device="cpu")}
    content |= {"arms": {"renorm": ARMS["renorm"]}}
    write_atomically(tmp_path / "few.yaml", yaml_text(content))
    words = ["--config", str(tmp_path / "few.yaml"), "--out", str(tmp_path / "out")]
    said = (
        "warning: arm renorm: norm.warmup_steps 10; norm.r_ramp_end 60; norm.d_ramp_end 40: beyond the end of all runs"
    )
    for command in ("plan", "run", "plan"):
        assert main(["study", command, *words, *(["--workers", "1"] if command == "run" else [])]) == 0
        assert capsys.readouterr().out.count(said) == 1
