"""Configuration: what is read is what was written, and a mistake is one line with a key, a value and a remedy."""

from __future__ import annotations

import dataclasses

import pytest

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
    (["--gpus", "x"], "gpus: Expected a <class 'int'>. Got value: x"),
    (["--gpus", "2.5"], "gpus: Expected a <class 'int'>. Got value: 2.5"),
    (["--gpus", "0"], "gpus: got 0, expected an integer of at least 1"),
    (["--norm.momentum", "abc"], "norm.momentum: Does not validate against any of the Union subtypes"),
    (["--norm.momentum", "1.5"], "norm.momentum: got 1.5, expected a number from 0 to 1, or null"),
    (["--norm.name", "foo"], "norm.name: Expected a typing.Literal['none', 'batch'"),
    (["--norm.affine", "maybe"], "norm.affine: Expected a <class 'bool'>. Got value: maybe"),
    (["--nrm.name", "x"], "train: unrecognized arguments: --nrm.name x (see syncbn train --help)"),
    (["--data.nam", "digits"], "train: unrecognized arguments: --data.nam digits (see"),
    (["--gpus", "4", "--sync_group_size", "3"], "sync_group_size: got 3, expected a divisor of gpus (4), or null"),
    (["--sync_group_size", "1"], "sync_group_size: got 1, expected null with norm.name batch"),
    (["--norm.name", "ghost"], "norm.ghost_batch_size: got None, expected a number of samples"),
    (["--norm.name=ghost", "--norm.ghost_batch_size=5"], "norm.ghost_batch_size: got 5, expected a divisor of per_gpu"),
    (["--norm.name", "renorm", "--norm.r_ramp_end", "10"], "norm.r_ramp_end: got 10, expected at least norm.warmup"),
    (["--budget.steps", "5"], "budget.steps: got 5, expected exactly one of"),
    (["--optimizer.lr", "-1"], "optimizer.lr: got -1.0, expected a positive number"),
    (["--model.name", "resnt50"], "model.name: got 'resnt50', expected"),
    (["--data.train_samples", "9999"], "data.train_samples: got 9999, expected at most"),
    (["--norm.name", "group", "--norm.groups", "7"], "norm.groups: got 7, expected a divisor"),
    (["--config", "/nowhere.yaml"], "config: got '/nowhere.yaml', expected a file that can be read"),
    (["--resume"], "resume: got True, expected --out with it"),
    (["--out"], "train: argument --out: expected one argument (see"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data.name", "digits", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"syncbn: error: {message}"), error
    assert error.count("\n") == 1


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
        ("norm: {nam: x}", "norm.nam: got 'x', expected a known key, such as norm.name"),
        ("gpuss: 3", "gpuss: got 3, expected a known key, such as gpus"),
        ("norm: {eps: -1}", "norm.eps: got -1.0, expected a positive number"),
        ("norm: [", "config: got 'c.yaml', expected a file in YAML (while parsing"),
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
