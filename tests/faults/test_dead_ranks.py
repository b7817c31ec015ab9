"""One of two ranks dies, or runs out of memory, at a moment of its training: both end, and the run can be resumed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fault_tasks import AtMoment
from scripts import finish, start, workers_of

from syncbn.train import load_config, train
from syncbn.train.config import config_from_dict, save_config
from syncbn.train.parity import TOLERANCE, Trained, compare_runs

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launch scripts are for bash")

HERE = Path(__file__).parent
RUN: dict[str, Any] = {
    "gpus": 2,
    "per_gpu_batch_size": 8,
    "precision": "fp64",
    "device": "cpu",
    "norm": {"name": "sync"},
    "budget": {"epochs": 2, "checkpoint_every_steps": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train(config_from_dict(RUN), out, task=AtMoment())
    return out


def broken(out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Train on two ranks, which end without a result; what they say."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [HERE.parents[1], HERE, HERE.parent])))
    mark = out.parent / "mark"
    task = {"name": "fault_tasks:AtMoment", "options": {**options, "mark": str(mark)}}
    save_config(config_from_dict({**RUN, "task": task}), out.parent / "run.yaml")
    code, output = finish(start("torchrun.sh", out.parent / "run.yaml", out, NPROC="2"), 240)
    assert mark.exists(), "nothing happened"
    assert code == 1
    assert workers_of(out) == []
    assert not [*Path(tempfile.gettempdir()).glob("torchelastic_*")], "torchrun's folder of logs"
    assert not (out / "result.json").exists()
    return output


def check_resumed(out: Path, whole: Path) -> None:
    """The run goes on, as one process, to the numbers of an undisturbed one."""
    train(load_config(out.parent / "run.yaml"), out, resume=True)
    assert compare_runs(Trained.read(whole), Trained.read(out)).largest <= TOLERANCE


@pytest.mark.parametrize(
    ("at", "rank"), [("model", 1), ("loss", 1), ("evaluation", 1), ("checkpoint", 0)], ids=lambda value: str(value)
)
@pytest.mark.fault(
    "death",
    "rank {rank} of two is killed by SIGKILL",
    moment="at its {at}",
    outcome="both ranks end; `--resume` ends with the numbers of an unbroken run",
    lost="the steps since the last checkpoint",
)
def test_a_rank_dies_at_any_moment(
    at: str, rank: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = broken(tmp_path / "out", monkeypatch, at=at, rank=rank)
    assert "Signal 9 (SIGKILL)" in output
    check_resumed(tmp_path / "out", whole)


@pytest.mark.fault(
    "death",
    "one rank of two has no memory left",
    moment="in a loss",
    outcome="one line of that rank, which names the method; both ranks end, and `--resume` goes on",
    lost="the steps since the last checkpoint",
)
def test_a_rank_runs_out_of_memory(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = broken(tmp_path / "out", monkeypatch, at="loss", act="memory")
    said = {line for line in output.splitlines() if line.startswith("syncbn: error: ")}
    assert len(said) == 1
    assert "loss() raised RuntimeError: DefaultCPUAllocator: can't allocate memory" in said.pop()
    check_resumed(tmp_path / "out", whole)
