"""Checkpoints: plain values, and what happens if a file of theirs is damaged, missing or another run's."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from task_cases import Sign

from syncbn.train import checkpoint, train
from syncbn.train.config import ConfigError, config_from_dict
from syncbn.train.plain_state import from_plain, to_plain

BASE = {"gpus": 2, "per_gpu_batch_size": 8, "device": "cpu", "norm": {"name": "sync"}, "optimizer": {"name": "adamw"}}
BASE["budget"] = {"epochs": 6, "checkpoint_every": 1, "select": "best"}
CONFIG = config_from_dict(BASE)


def test_plain_values_come_back() -> None:
    tree = {
        "optimizer": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}, "groups": [{"betas": (0.9, 0.99)}]},
        "numbers": [1, 2.5, 1e-17, math.inf, -0.0, True, None, "text", ["dict"]],
        "empty": [{}, [], (), torch.zeros(0)],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(to_plain(tree, tensors)))
    found = from_plain(plain, tensors)
    assert len(tensors) == 4
    assert repr(found) == repr(tree), "types, order and keys too"
    assert math.isnan(from_plain(json.loads(json.dumps(to_plain(math.nan, {}))), {}))
    with pytest.raises(ValueError, match="unknown kind 'set'"):
        from_plain(["set", 1], {})


class Cut(Exception):
    pass


class _Interrupted(Sign):
    """Ends in the fifth epoch, as a killed run does: two checkpoints are there."""

    calls = 0

    def metrics(self, outputs: Any, targets: Any) -> Any:
        self.calls += 1
        if self.calls == 9:  # validation and test data of four epochs
            raise Cut
        return super().metrics(outputs, targets)


Interrupted = type("Sign", (_Interrupted,), {})  # the name of the task is that of the whole run


@pytest.fixture(scope="module")
def whole() -> Any:
    return train(CONFIG, task=Sign())


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    with pytest.raises(ValueError, match="Cut"):
        train(CONFIG, tmp_path, task=Interrupted())
    assert names(tmp_path) == ["step-00000012", "step-00000016"]
    return tmp_path


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoint").glob("step-*"))


def resumed(out: Path) -> Any:
    return train(CONFIG, out, resume=True, task=Sign())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "a bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
}


@pytest.mark.parametrize("name", [*checkpoint._FILES, "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.fault(
    "file",
    "a file of a checkpoint has a turned bit, is cut off, empty, longer or gone",
    moment="before `--resume`",
    outcome="a warning; the checkpoint before it is used",
    lost="the steps between the two",
)
def test_the_checkpoint_before_a_damaged_one_is_used(
    cut: Path, whole: Any, damage: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](cut / "checkpoint/step-00000016" / name)
    with caplog.at_level(logging.WARNING, "syncbn"):
        result = resumed(cut)
    assert (result.losses, result.test, result.history) == (whole.losses, whole.test, whole.history)
    silent = damage == "nothing" or (name == "manifest.json" and damage == "longer")  # by white space
    warned = [record.getMessage() for record in caplog.records if "goes on from step-00000012" in record.getMessage()]
    assert len(warned) == (0 if silent else 1)
    named = "" if name == "manifest.json" else name  # a flipped bit of it may fall on another file's digest
    assert silent or f"step-00000016/{named}" in warned[0]
    assert names(cut) == ["step-00000016", "step-00000020"], "of the resumed run"


@pytest.mark.fault(
    "file",
    "weights of another seed in a checkpoint",
    moment="before `--resume`",
    outcome="a warning; the checkpoint before it is used",
    lost="the steps between the two",
)
def test_another_runs_weights_are_not_used(cut: Path, whole: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    train(config_from_dict({**BASE, "seed": 1}), other, task=Sign())
    weights = "model.safetensors"
    shutil.copy(other / weights, cut / "checkpoint/step-00000016" / weights)
    assert resumed(cut).losses == whole.losses


@pytest.mark.fault(
    "file",
    "all checkpoints are damaged",
    moment="before `--resume`",
    outcome="one line",
    lost="the run",
)
def test_no_whole_checkpoint(cut: Path) -> None:
    for path in (cut / "checkpoint").glob("step-*/state.json"):
        flip(path)
    with pytest.raises(
        ConfigError, match=r"^out: got '.*/checkpoint', expected a whole checkpoint; use another"
    ) as error:
        resumed(cut)
    assert "step-00000016/state.json is not what was written; step-00000012/state.json is not" in str(error.value)


@pytest.mark.fault(
    "death",
    "the process is killed",
    moment="while a checkpoint is written",
    outcome="the checkpoint before it is used",
    lost="the steps between the two",
)
def test_a_checkpoint_that_was_not_finished(cut: Path, whole: Any) -> None:
    """As a kill leaves it: some files in a folder of another name, newer than the last checkpoint."""
    unfinished = cut / "checkpoint/.step-00000020"
    shutil.copytree(cut / "checkpoint/step-00000016", unfinished)
    flip(unfinished / "state.json")
    assert resumed(cut).losses == whole.losses
    assert not unfinished.exists()


def test_what_kills_have_left_is_removed(cut: Path, whole: Any) -> None:
    """A kill between a checkpoint and its name, and others within writes; a file of the user's stays."""
    (cut / "checkpoint/latest").write_text("step-00000012")
    left = [cut / "checkpoint/.latest.", cut / ".result.json.", cut / ".model.safetensors."]
    left = [path.with_name(path.name + "0123456789abcdef" * 2) for path in left]
    for path in (*left, cut / ".mine"):
        path.write_text("half")
    assert resumed(cut).losses == whole.losses
    assert not any(path.exists() for path in left)
    assert (cut / ".mine").read_text() == "half"
    (cut / "checkpoint/latest").write_text("step-00000012")
    checkpoint.tidy(cut, 16)
    assert (cut / "checkpoint/latest").read_text() == "step-00000016"


def test_a_key_that_is_younger_than_the_run(cut: Path, whole: Any) -> None:
    for path in cut.glob("checkpoint/step-*"):
        config = json.loads((path / "config.json").read_text())
        del config["norm"]["update_per"]
        (path / "config.json").write_text(json.dumps(config))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["config.json"] = checkpoint._digest(path / "config.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert resumed(cut).losses == whole.losses


def test_a_damaged_checkpoint_takes_no_whole_ones_place(cut: Path) -> None:
    """The run goes on from step 12, and saves at 14 what it has: 12 has to stay, though 16 is the newer one."""
    folder, model = cut / "checkpoint", Sign().model()
    flip(folder / "step-00000016/state.json")
    checkpoint.save_checkpoint(folder, 14, model, {}, CONFIG)
    assert names(cut) == ["step-00000012", "step-00000014"]


def test_a_manifest_of_another_version(cut: Path) -> None:
    for path in (cut / "checkpoint").glob("step-*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(ConfigError, match=r"manifest.json is of another version"):
        resumed(cut)


def test_nothing_is_unpickled(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr("pickle.Unpickler", refused)
    assert resumed(cut).status == "ok"
    kinds = {path.suffix for path in (cut / "checkpoint").glob("step-*/*")}
    assert kinds == {".json", ".safetensors"}
