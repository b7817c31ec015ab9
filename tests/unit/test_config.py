"""Configuration: what is read is what was written, and a mistake is one line with a key, a value and a remedy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import yaml

from syncbn.cli import main
from syncbn.train.config import (
    ConfigError,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    config_from_dict,
    config_to_dict,
    known_keys,
    load_config,
    save_config,
)
from syncbn.train.result import RunResult


def test_round_trip(tmp_path):
    config = config_from_dict(
        {
            "gpus": 4,
            "sync_group_size": 2,
            "norm": {"name": "sync", "momentum": None},
            "optimizer": {"betas": [0.8, 0.9], "step_milestones": [0.25]},
            "model": {"name": "resnet18", "options": {"zero_init_residual": True}},
        }
    )
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("gpus: 4\nnorm: {name: batch, momentum: 0.2}\n")
    config = load_config(tmp_path / "c.yaml", {"norm.momentum": 0.05, "data.class_skew": 4})
    assert (config.gpus, config.norm.momentum, config.data.class_skew) == (4, 0.05, 4)
    assert config.norm.name == "batch"


def test_words_win_over_the_file(tmp_path, capsys):
    """Only what is given counts: an option's default does not replace the file's value."""
    (tmp_path / "c.yaml").write_text("gpus: 4\nnorm: {name: ghost, momentum: 2e-1}\nbudget: {epochs: null, steps: 3}\n")
    words = ["--config", str(tmp_path / "c.yaml"), "--norm.ghost_batch_size", "8", "--model.options.dropout", "0.5"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *words, "--model.name", "vgg11", "--print-config"])
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "printed.yaml")
    assert (config.gpus, config.norm.ghost_batch_size, config.norm.momentum, config.budget.steps) == (4, 8, 0.2, 3)
    assert config.model.options == {"dropout": 0.5}
    assert config == load_config(
        tmp_path / "c.yaml", {"norm.ghost_batch_size": 8, "model.name": "vgg11", "model.options": {"dropout": 0.5}}
    )


def test_every_field_has_a_docstring_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in known_keys():
        kind = {f.name: f.type for f in dataclasses.fields(RunConfig)}.get(key, "")
        assert f"--{key} " in text, key
        assert str(kind).endswith("Config") or f"--{key} (type" not in text, f"{key} has no docstring"


MISTAKES = [
    (["--gpus", "x"], "gpus: got 'x', expected an integer"),
    (["--gpus", "2.5"], "gpus: got '2.5', expected an integer"),
    (["--gpus=two"], "gpus: got 'two', expected an integer"),
    (["--gpus", "0"], "gpus: got 0, expected an integer of at least 1"),
    (["--norm.momentum", "abc"], "norm.momentum: got 'abc', expected a finite number or null"),
    (["--norm.momentum", "1.5"], "norm.momentum: got 1.5, expected a number from 0 to 1, or null"),
    (["--norm.name", "foo"], "norm.name: got 'foo', expected one of 'none', 'batch'"),
    (["--norm.affine", "maybe"], "norm.affine: got 'maybe', expected true or false"),
    (["--optimizer.betas", "0.9"], "optimizer.betas: got '0.9', expected a list of 2, each item a finite number"),
    (["--model.options", "dropout"], "model.options: got 'dropout', expected a mapping"),
    (["--nrm.name", "x"], "nrm.name: got 'x', expected an option of syncbn train; did you mean --norm.name"),
    (["--data.nam", "digits"], "data.nam: got 'digits', expected an option of syncbn train; did you mean --data.name"),
    (["--data.nam=digits"], "data.nam: got 'digits', expected an option of syncbn train; did you mean --data.name"),
    (["--zzz"], "zzz: got nothing, expected an option of syncbn train\n"),
    (["-v"], "train: got '-v', expected options alone, which begin with -- (see syncbn train --help)"),
    (["gpus", "4"], "train: got 'gpus', expected options alone"),
    (["--resume=yes"], "resume: got 'yes', expected no value"),
    (["--gpus", "--seed", "3"], "gpus: got nothing, expected an integer"),
    (["--progress", "perhaps"], "progress: got 'perhaps', expected true or false"),
    (["--gpus", "4", "--sync_group_size", "3"], "sync_group_size: got 3, expected a divisor of gpus (4), or null"),
    (["--sync_group_size", "1"], "sync_group_size: got 1, expected null with norm.name batch"),
    (["--norm", "{nam: x}"], "norm.nam: got 'x', expected a known key; did you mean norm.name?"),
    (["--model", "{options: {a: 1}, widht: 3}"], "model.widht: got 3, expected a known key; did you mean model.width?"),
    (["--norm", "x"], "norm: got 'x', expected a mapping"),
    (["--norm.name", "ghost"], "norm.ghost_batch_size: got nothing, expected a number of samples"),
    (["--norm.name=ghost", "--norm.ghost_batch_size=5"], "norm.ghost_batch_size: got 5, expected a divisor of per_gpu"),
    (["--norm.name", "renorm", "--norm.r_ramp_end", "10"], "norm.r_ramp_end: got 10, expected at least norm.warmup"),
    (["--budget.steps", "5"], "budget.steps: got 5, expected exactly one of"),
    (["--optimizer.lr", "-1"], "optimizer.lr: got -1.0, expected a positive number"),
    (["--model.name", "resnt50"], "model.name: got 'resnt50', expected"),
    (["--data.train_samples", "9999"], "data.train_samples: got 9999, expected at most"),
    (["--norm.name", "group", "--norm.groups", "7"], "norm.groups: got 7, expected a divisor"),
    (["--config", "/nowhere.yaml"], "config: got '/nowhere.yaml', expected a file that can be read"),
    (["--resume"], "resume: got True, expected --out with it"),
    (["--out"], "out: got nothing, expected a path"),
    (["--out", "nothing-there", "--resume"], "out: got 'nothing-there', expected the folder of a run"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resumes = "nothing-there" in words  # with options of a run, it would be started there
    assert main(["train", *([] if resumes else ["--data.name", "digits", "--device", "cpu"]), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"syncbn: error: {message}"), error
    assert error.count("\n") == 1


def test_a_tracker_whose_package_is_missing_is_no_silence(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    words = ["--out", str(tmp_path / "out"), "--trackers", "[wandb]"]
    assert main(["train", "--data.name", "digits", "--device", "cpu", *words]) == 2
    expected = "trackers: got 'wandb', expected a tracker whose package is installed: pip install wandb\n"
    assert capsys.readouterr().err == f"syncbn: error: {expected}"


def test_an_option_may_be_given_in_each_form(capsys):
    """A value after a space or an equals sign, empty, negative, or with an exponent; an item of a mapping."""
    words = ["--gpus=2", "--data.root=", "--optimizer.lr", "1e-3", "--model.options.dropout", "0.5"]
    words += ["--model.options.width_mult=0.25", "--norm.momentum", "null", "--optimizer.betas", "[0.8, 0.9]"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *words, "--model.name", "mobilenet_v2", "--print-config"])
    assert stop.value.code == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["gpus"], values["data"]["root"], values["optimizer"]["lr"]) == (2, "", 0.001)
    assert (values["norm"]["momentum"], values["optimizer"]["betas"]) == (None, [0.8, 0.9])
    assert values["model"]["options"] == {"dropout": 0.5, "width_mult": 0.25}


RUN = ["--data.name", "synthetic", "--data.synthetic_samples", "32", "--data.image_size", "8", "--model.width", "4"]
RUN += ["--gpus", "2", "--per_gpu_batch_size", "4", "--budget.epochs", "1", "--device", "cpu", "--progress", "false"]


def test_a_run_is_resumed_with_its_own_configuration(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", *RUN, "--seed", "3", "--out", out, "--resume"]) == 0, "with options, it is started"
    assert "nothing to resume" in capsys.readouterr().out
    losses = RunResult.from_json(tmp_path / "run" / "result.json").losses
    (tmp_path / "run" / "result.json").unlink()  # as if it had been cut off
    assert main(["train", "--out", out, "--resume", "--progress", "false"]) == 0
    assert RunResult.from_json(tmp_path / "run" / "result.json").losses == losses
    assert main(["train", "--out", out, "--resume", "--seed", "3"]) == 0, "options that agree"
    capsys.readouterr()
    # Whether it has finished, has a checkpoint, or was cut off before the first one.
    for gone in ((), ("result.json",)):
        for name in gone:
            (tmp_path / "run" / name).unlink()
        for words in (["--seed", "4"], ["--config", "other.yaml"]):
            (tmp_path / "other.yaml").write_text("{seed: 4}")
            words = [str(tmp_path / word) if word.endswith("yaml") else word for word in words]
            assert main(["train", *(RUN if "--config" in words else []), *words, "--out", out, "--resume"]) == 2
            said = capsys.readouterr().err
            expected = "seed: got 4, expected 3, the value of the run that was started in"
            assert said.startswith(f"syncbn: error: {expected}"), said
            assert said.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_resumed_run_says_from_where_it_goes_on(tmp_path, capsys):
    out = str(tmp_path)
    words = ["2" if word == "1" else word for word in RUN]  # epochs: the first ends with a checkpoint
    assert main(["train", *words, "--out", out]) == 0
    assert "goes on" not in capsys.readouterr().err
    (tmp_path / "result.json").unlink()
    for _ in range(2):
        assert main(["train", "--out", out, "--resume", "--progress", "false"]) == 0
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if "goes on" in line]
        assert said == ["syncbn: note: the run goes on from step 4 of 8"]
        assert "nothing to resume" not in printed.out
        (tmp_path / "result.json").unlink()


def test_a_remark_on_a_run_is_one_line(tmp_path):
    """The command line in a process of its own, as pytest has its own handling of warnings."""
    command = [sys.executable, "-m", "syncbn", "train", *RUN, "--gpus", "64", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    step = "an optimizer step has 256 samples, but there are only 32 training samples: each epoch is one smaller step"
    idle = "and 56 of the 64 logical GPUs have none of them"
    assert f"syncbn: warning: per_gpu_batch_size: {step}, {idle}" in done.stderr.splitlines()


def test_a_folder_that_cannot_be_and_an_unknown_tracker(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--out", str(tmp_path / "file")], f"{tmp_path / 'file'}: File exists"),
        (["--out", str(tmp_path / "out"), "--trackers", "[nonsense]"], "trackers: got 'nonsense', expected one of"),
    ):
        assert main(["train", "--data.name", "digits", "--device", "cpu", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"syncbn: error: {message}"), error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm: {nam: x}", "norm.nam: got 'x', expected a known key; did you mean norm.name"),
        ("gpuss: 3", "gpuss: got 3, expected a known key; did you mean gpus"),
        ("norm: {eps: -1}", "norm.eps: got -1.0, expected a positive number"),
        ("norm: [", "config: got 'c.yaml', expected a file in YAML (line 1: expected the node content"),
        ("norm: {eps: x}", "norm.eps: got 'x', expected a finite number"),
        ("data: 3", "data: got 3, expected a mapping"),
    ],
)
def test_a_mistake_in_a_file(text, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", "c.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"syncbn: error: {message}")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"precision": "fp8"}, "precision"),
        ({"data": {"augment": "x"}}, "data.augment"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"data": {"name": "imagefolder", "root": ""}}, "data.root"),
        ({"gpus": "4"}, "gpus"),
        ({"seed": True}, "seed"),
        ({"data": {"root": 3}}, "data.root"),
        ({"optimizer": {"betas": [0.9, 0.95, 0.99]}}, "optimizer.betas"),
    ],
    ids=str,
)
def test_values_are_checked_without_a_parser_too(values, key):
    with pytest.raises(ConfigError) as error:
        config_from_dict(values)
    assert error.value.key == key
    sections = {"data": DataConfig, "optimizer": OptimizerConfig}
    with pytest.raises(ConfigError) as error:
        RunConfig(**{k: sections[k](**v) if k in sections else v for k, v in values.items()})
    assert error.value.key == key


def test_processes_must_divide_gpus(capsys):
    assert main(["parity", "--gpus", "4", "--processes", "1,3"]) == 2
    assert "gpus: got 4, expected a multiple of the number of processes (3)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="processes"):
        RunConfig(gpus=4).check_processes(8)


def test_normalization_batch_size():
    def size(**norm):
        k = norm.pop("sync_group_size", None)
        base = {"gpus": 4, "per_gpu_batch_size": 8, "sync_group_size": k}
        return config_from_dict({**base, "norm": norm}).normalization_batch_size

    assert size(name="batch") == 8
    assert size(name="sync") == 32
    assert size(name="sync", sync_group_size=2) == 16
    assert size(name="ghost", ghost_batch_size=2) == 2
    assert size(name="ghost", ghost_batch_size=2, sync=True) == 8
    assert size(name="renorm", sync=True) == 32
    assert size(name="group") is None
