"""What surrounds a run is wrong: a launcher's variable, a port, the clock. One line says so, or nothing changes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from task_cases import Sign

import syncbn
from syncbn.cli import main
from syncbn.study.plan.grid import study_cells
from syncbn.study.run import jobs, records
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import run_cells
from syncbn.train import launch, train
from syncbn.train.config import config_from_dict
from tests.unit.study_fakes import fake_result, small_study

RUN = ["train", "--data.name", "synthetic", "--data.synthetic_samples", "32", "--data.image_size", "8", "--gpus", "2"]
RUN += ["--model.width", "4", "--per_gpu_batch_size", "4", "--device", "cpu", "--progress", "false"]
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
VARIABLES: dict[str, tuple[dict[str, str], int, str]] = {
    "`RANK` is no number": ({"RANK": "first"}, 2, "RANK: got 'first', expected an environment variable with a whole"),
    "`WORLD_SIZE` is no number": ({"WORLD_SIZE": "two"}, 2, "WORLD_SIZE: got 'two', expected an environment variable"),
    "`RANK` is not below `WORLD_SIZE`": ({"RANK": "2"}, 2, "RANK: got 2, expected an environment variable below"),
    "`MASTER_ADDR` is not set": ({"MASTER_PORT": "1"}, 2, "MASTER_ADDR: got nothing, expected an environment variable"),
    "`MASTER_PORT` is not set": ({"MASTER_ADDR": "here"}, 2, "MASTER_PORT: got nothing, expected an environment"),
    "`MASTER_PORT` is no port": ({**PLACE, "MASTER_PORT": "http"}, 2, "MASTER_PORT: got 'http', expected an environm"),
    "`MASTER_ADDR` is no host": (
        {**PLACE, "MASTER_ADDR": "nowhere.invalid"},
        1,
        "the processes cannot meet at nowhere.invalid:1 (MASTER_ADDR and MASTER_PORT): The client socket has timed out",
    ),
    "`SYNCBN_TIMEOUT` is no number": (
        {"SYNCBN_TIMEOUT": "soon", "WORLD_SIZE": "1"},
        2,
        "SYNCBN_TIMEOUT: got 'soon', expected an environment variable with a positive number of seconds",
    ),
}


def said(out: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a training run, and its last line."""
    capfd.readouterr()
    code = main([*RUN, "--out", str(out)])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("syncbn: error: ")]
    assert len(lines) == 1
    return code, lines[0].removeprefix("syncbn: error: ")


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of two, and does not wait long for the other."""
    monkeypatch.setattr(launch, "MEETING_SECONDS", 1.0)
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("case", VARIABLES)
@pytest.mark.fault(
    "together",
    "an environment variable is wrong: {case}",
    moment="before the first step",
    outcome="one line that names it",
    lost="nothing",
)
def test_a_launchers_variable_is_wrong(
    case: str,
    tmp_path: Path,
    second_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    variables, code, line = VARIABLES[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = said(tmp_path / "out", capfd)
    assert found[0] == code
    assert found[1].startswith(line)


@pytest.mark.fault(
    "together",
    "the port of the first process is taken",
    moment="before the first step",
    outcome="one line with the address and the reason, and exit code 1",
    lost="nothing",
)
def test_a_port_that_is_taken(
    tmp_path: Path, second_process: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        code, line = said(tmp_path / "out", capfd)
    assert code == 1
    assert "address already in use" in line


@pytest.mark.fault(
    "together",
    "another process of the launcher never starts",
    moment="before the first step",
    outcome="one line after 5 minutes, and exit code 1",
    lost="nothing",
)
def test_a_process_that_does_not_come(
    tmp_path: Path, second_process: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    code, line = said(tmp_path / "out", capfd)
    assert code == 1
    assert line.startswith(f"the processes cannot meet at 127.0.0.1:{port}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the name of a machine, here of a part of it")
@pytest.mark.fault(
    "together",
    "the machine's name cannot be looked up, as in some containers: {how}",
    moment="before the first step",
    outcome="the processes meet at `localhost`",
    lost="nothing",
)
@pytest.mark.parametrize("how", ["torchrun.sh", "accelerate.sh", "parity"])
def test_a_machine_without_a_known_name(how: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {name: synthetic, synthetic_samples: 32, image_size: 8}\nmodel: {width: 4}\ngpus: 2\n")
    words = ["bash", f"launch/{how}", "--out", str(tmp_path / "out")]
    if how == "parity":
        words = [sys.executable, "-m", "syncbn", "parity", "--processes=1,2", "--steps=2", f"--config={config}"]
    done = subprocess.run(
        ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh", *words],
        cwd=Path(syncbn.__file__).parents[1],
        env={**os.environ, "CONFIG": str(config), "NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert ("same (tolerance" if how == "parity" else "on 2 process(es)") in done.stdout


class Backwards(datetime):
    """A clock that goes back a day each time that it is read."""

    reads = 0

    @classmethod
    def now(cls, zone: Any = None) -> datetime:
        cls.reads += 1
        return datetime(2026, 3, 31, 12, tzinfo=UTC) - timedelta(days=cls.reads)


@pytest.mark.fault(
    "together",
    "the clock is set back a day, again and again",
    moment="in a study",
    outcome="each run is done once, and took the seconds that it took",
    lost="nothing",
)
def test_a_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def fake(config: Any, out: Path, *, resume: bool = False) -> None:
        calls.append(out)
        out.mkdir(parents=True)
        fake_result(config).to_json(out / "result.json")

    monkeypatch.setattr(jobs, "datetime", Backwards)
    monkeypatch.setattr(records, "datetime", Backwards)
    cells = study_cells(small_study())
    for _ in range(2):
        outcomes = run_cells(cells, tmp_path, train=fake, executor="here", progress=False)
        assert {outcome.state for outcome in outcomes.values()} == {"done"}
    assert len(calls) == len(cells)
    assert Backwards.reads > len(cells)
    assert all(0 <= record.seconds < 60 for record in read_records(tmp_path).values())


@pytest.mark.fault(
    "together",
    "the clock is set back a day, again and again",
    moment="in a run with checkpoints by the minute",
    outcome="the same result, and no second of training is negative",
    lost="nothing",
)
def test_the_clock_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"epochs": 3, "checkpoint_every_minutes": 1.0}
    config = config_from_dict({"gpus": 2, "per_gpu_batch_size": 8, "device": "cpu", "budget": budget})
    whole = train(config, tmp_path / "whole", task=Sign())
    now = [2e9]

    def back() -> float:
        now[0] -= 86400
        return now[0]

    monkeypatch.setattr("time.time", back)
    result = train(config, tmp_path / "out", task=Sign())
    monkeypatch.undo()
    assert (result.losses, result.history) == (whole.losses, whole.history)
    assert 0 < result.seconds < 60
