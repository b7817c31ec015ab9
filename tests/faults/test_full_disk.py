"""A disk that is full, read-only or not ours: one line with the path, and the checkpoint before it stays whole."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_disks import SmallDisk
from task_cases import Sign
from torch import nn

from syncbn.cli import main
from syncbn.study.plan.grid import study_cells
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import run_cells
from syncbn.study.run.status import study_outcomes
from syncbn.train import checkpoint, metrics, train
from syncbn.train.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoint
from syncbn.train.config import config_from_dict
from syncbn.train.result import RunResult
from syncbn.train.tasks.named import TaskError
from tests.unit.study_fakes import fake_result, small_study

CONFIG = config_from_dict(
    {
        "gpus": 2,
        "per_gpu_batch_size": 8,
        "device": "cpu",
        "optimizer": {"name": "adamw"},
        "budget": {"epochs": 4, "checkpoint_every": 1},
    }
)
RUN = ["--data.name", "synthetic", "--data.synthetic_samples", "32", "--data.image_size", "8", "--model.width", "4"]
RUN += ["--gpus", "2", "--per_gpu_batch_size", "4", "--budget.epochs", "3", "--device", "cpu", "--progress", "false"]
PARITY_KILOBYTES = 128
"""Room for the logs of ``parity`` and the files with which a run begins, and none for its weights."""
Mount = Callable[[int], SmallDisk]


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Each of these is called while a checkpoint is written. With the last ones, the checkpoint is there already.
WRITES = {
    "the folder": ("pathlib.Path.mkdir", 1),
    "the weights": ("syncbn.train.checkpoint.save_model_tensors", 1),
    "the state": ("syncbn.train.checkpoint.save_tensors", 1),
    "a text": ("pathlib.Path.write_text", 1),
    "the manifest": ("syncbn.train.checkpoint._digest", 1),
    "the name": ("pathlib.Path.rename", 1),
    "latest": ("pathlib.Path.replace", 2),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.fault(
    "disk",
    "no space is left",
    moment="while a checkpoint is written: {write}",
    outcome="the error names the checkpoint; a whole one is kept",
    lost="the steps since the last checkpoint",
)
def test_whatever_fails_the_last_good_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    model, target, (place, left) = Sign().model(), tmp_path / "checkpoint", WRITES[write]
    save_checkpoint(target, 1, model, {"at": 1}, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            save_checkpoint(target, 2, model, {"at": 2}, CONFIG)
    assert str(caught.value.filename) == str(target / ("latest" if left == 2 else "step-00000002"))
    assert left == 2 or "step-00000001, the one before, is kept" in str(caught.value)
    assert load_checkpoint(target, Sign().model(), CONFIG) == {"at": left}
    assert [path.name for path in target.glob(".*")] == [], "what could not be finished gives its room back"
    save_checkpoint(target, 3, model, {"at": 3}, CONFIG)
    assert load_checkpoint(target, Sign().model(), CONFIG) == {"at": 3}


def test_a_copy_of_a_checkpoint_is_the_users(tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("step-00000009.bak", "step-00000001 (copy)", "step-x")]
    for copy in copies:
        copy.mkdir()
    (tmp_path / "step-00000005").write_text("a file")
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, Sign().model(), {}, CONFIG)
    assert all(copy.is_dir() for copy in copies)
    assert whole_checkpoint(tmp_path) == tmp_path / "step-00000004"


@pytest.mark.fault(
    "disk",
    "a run fills the disk",
    moment="at its third checkpoint",
    outcome="the second one is kept; with room, `--resume` ends as an undisturbed run",
    lost="the steps since the last checkpoint",
)
def test_a_run_fills_a_disk_and_goes_on_when_there_is_room(tmp_path: Path, small_disk: Mount) -> None:
    """The third checkpoint does not fit beside the other two. The run ends, and later it is as if nothing had been."""
    disk = small_disk(1024)
    out = disk.path / "run"
    with pytest.raises(OSError, match="No space left on device; this checkpoint could not be written") as caught:
        train(CONFIG, out, task=Sign(width=4096))
    assert caught.value.filename == str(out / "checkpoint/step-00000012")
    assert whole_checkpoint(out / "checkpoint") == out / "checkpoint/step-00000008"
    assert [path.name for path in (out / "checkpoint").glob(".*")] == []
    disk.change("size=8m")
    resumed = train(CONFIG, out, task=Sign(width=4096), resume=True)
    whole = train(CONFIG, tmp_path / "whole", task=Sign(width=4096))
    assert (resumed.losses, resumed.test, resumed.history) == (whole.losses, whole.test, whole.history)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO], ids=os.strerror)
@pytest.mark.fault(
    "disk",
    "a checkpoint cannot be written: {id}",
    moment="at the second checkpoint",
    outcome="exit code 1 and one line; the first one is kept",
    lost="the steps since the last checkpoint",
)
def test_the_command_ends_with_1_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    calls, save = [], checkpoint.save_model_tensors

    def fails_later(model: nn.Module, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        save(model, path)

    monkeypatch.setattr(checkpoint, "save_model_tensors", fails_later)
    assert main(["train", *RUN, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    target = tmp_path / "checkpoint/step-00000008"
    what = f"{os.strerror(number)}; this checkpoint could not be written; step-00000004, the one before, is kept"
    assert error == f"syncbn: error: {target}: {what}"
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 8, "it does not train on without checkpoints"
    monkeypatch.undo()
    assert main(["train", "--out", str(tmp_path), "--resume", "--progress", "false"]) == 0


@pytest.mark.fault(
    "disk",
    "the disk is full, then read-only",
    moment="before the first step",
    outcome="exit code 1 and one line with the path",
    lost="the run",
)
def test_a_disk_that_is_full_or_read_only_from_the_start(small_disk: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    disk = small_disk(16)
    assert main(["train", *RUN, "--out", str(disk.path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"syncbn: error: {disk.path / 'run'}/"), error
    assert "No space left on device" in error
    disk.change("ro")
    for words in (["--out", str(disk.path / "new")], ["--out", str(disk.path / "run"), "--resume"]):
        assert main(["train", *RUN, *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"syncbn: error: {words[1]}"), error
        assert error.endswith("Read-only file system\n"), error
        assert error.count("\n") == 1


@pytest.mark.fault(
    "disk",
    "no space is left",
    moment="when metrics are written",
    outcome="the error names `metrics.jsonl`",
    lost="the steps since the last checkpoint",
)
def test_metrics_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_lines", lambda records: full() if records else "")
    with pytest.raises(OSError, match="No space left on device") as caught:
        train(CONFIG, tmp_path, task=Sign())
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


@pytest.mark.fault(
    "disk",
    "no space is left for TensorBoard's files",
    moment="when its writer starts",
    outcome="exit code 1 and one line; no traceback of its thread",
    lost="the steps since the last checkpoint",
)
def test_a_trackers_files_do_not_fit(tmp_path: Path, small_disk: Mount, capfd: pytest.CaptureFixture[str]) -> None:
    disk, out, hook = small_disk(4), tmp_path / "out", threading.excepthook
    out.mkdir()
    (out / "syncbn").symlink_to(disk.path)
    assert main(["train", *RUN, "--out", str(out), "--trackers", "[tensorboard]"]) == 1
    error = capfd.readouterr().err
    assert f"syncbn: error: {out}: No space left on device; a tracker could not write its files\n" in error
    assert "Traceback" not in error
    assert threading.excepthook is hook
    assert main(["train", "--out", str(out), "--resume", "--progress", "false"]) == 0


@pytest.mark.fault(
    "disk",
    "no space is left in the folder for temporary files",
    moment="while `syncbn parity` trains",
    outcome="exit code 1 and one line, as with `train`; the folder that it names is kept",
    lost="the check",
    keeps=["syncbn-parity-*"],
)
def test_parity_on_a_full_disk(
    small_disk: Mount, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk(PARITY_KILOBYTES).path))
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    assert main(["parity", *RUN[:-2], "--processes", "1,2", "--steps", "4"]) == 1
    (error,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("syncbn: error: "))
    assert "No space left on device" in error


@pytest.mark.fault(
    "disk",
    "no space is left for a traceback",
    moment="after an error in a task",
    outcome="the task's error is the one that is told",
    lost="the traceback",
)
def test_a_tasks_own_error_is_not_lost_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Sign):
        def loss(self, outputs: Any, targets: Any) -> Any:
            monkeypatch.setattr(Path, "write_text", full)
            raise RuntimeError("no luck")

    with pytest.raises(TaskError, match=r"loss\(\) raised RuntimeError: no luck$"):
        train(CONFIG, tmp_path, task=Wrong())


@pytest.mark.fault(
    "disk",
    "a study fills the disk",
    moment="when a run ends",
    outcome="what does not fit is `failed`, and what was recorded is kept",
    lost="the runs that do not fit",
)
def test_a_study_on_a_full_disk_says_so_of_each_run_and_goes_on_later(small_disk: Mount) -> None:
    def fake(config: Any, out: Path, *, resume: bool = False) -> RunResult:
        out.mkdir(parents=True, exist_ok=True)
        result = fake_result(config, losses=[0.5] * 1000)
        result.to_json(out / "result.json")
        return result

    disk, cells = small_disk(96), study_cells(small_study())
    first = run_cells(cells, disk.path, train=fake, executor="here", progress=False)
    states = [outcome.state for outcome in first.values()]
    assert set(states) == {"done", "failed"}, states
    for outcome in first.values():
        assert outcome.state == "done" or "No space left on device: " in outcome.message
        assert str(disk.path) in outcome.message or outcome.state == "done"
    done = [key for key, outcome in first.items() if outcome.state == "done"]
    assert set(done) <= read_records(disk.path).keys()
    disk.change("size=8m")
    second = run_cells(cells, disk.path, train=fake, executor="here", progress=False)
    assert {outcome.state for outcome in second.values()} == {"done"}
    assert not any(second[key].ran for key in done), "a run that was recorded is not run again"
    disk.change("ro")
    third = run_cells(cells, disk.path, train=fake, executor="here", progress=False)
    assert {outcome.state for outcome in third.values()} == {"done"}, "to look at a study, nothing is written"
    assert {outcome.state for outcome in study_outcomes(cells, disk.path).values()} == {"done"}
    assert not any(outcome.job.held() for outcome in third.values())
