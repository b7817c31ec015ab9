"""Training loops of other people's frameworks, from `examples/loops/`, in one process and in two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from example_loops import FOUR_OF_TWO, LOOPS, cases, check_loop, check_script, example

from syncbn.study.run.own_loop import OwnLoop
from syncbn.train.config import config_from_dict
from syncbn.train.result import Metric, RunResult

TESTS = Path(__file__).resolve().parents[1]
ACCURACY = Metric("accuracy", higher_is_better=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is downloaded, and what a framework writes goes to a folder of the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "arm"), cases(ecosystem=True))
def test_loop(name: str, arm: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    check_loop(name, arm, out)
    assert [path.name for path in tmp_path.iterdir() if path != out and path.name != "hub"] == [], "it stays in `out`"


@pytest.mark.parametrize("name", sorted({name for name, _ in cases(ecosystem=True)}))
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check_script(name, tmp_path, monkeypatch, capsys)


@pytest.mark.works_with(
    "lightning", "a LightningModule with its Trainer on 2 processes, with local and with synchronized layers"
)
@pytest.mark.works_with("transformers", "ResNet with the Trainer on 2 processes, synchronized")
@pytest.mark.parametrize(
    ("name", "norm"), [("lightning_module", "batch"), ("lightning_module", "sync"), ("transformers_trainer", "sync")]
)
def test_two_processes(name: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train one model, whose statistics are shared if the arm synchronizes."""
    folders = [str(TESTS / "ecosystem"), *(path for path in sys.path if path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    task = {"name": "loop_jobs:watched", "options": {"loop": name, "steps": 4}}
    content = {**FOUR_OF_TWO, "device": "cpu", "norm": {"name": norm}, "optimizer": {"lr": 0.001}, "task": task}
    OwnLoop(run=task["name"], metric=ACCURACY, processes=2)(config_from_dict(content), tmp_path / "run")
    result = RunResult.from_json(tmp_path / "run" / "result.json")
    assert result.processes == result.test["world"] == 2
    assert 0 <= result.score <= 1
    assert result.test["differs"] == 0
    assert result.test["shares"] == (norm == "sync")


@pytest.mark.works_with("gymnasium", "CrossQ's critic with batch renormalization learns")
@pytest.mark.parametrize(
    ("name", "lr", "steps", "learnt"),
    [
        ("crossq_critic", 0.001, 1200, -5.5),  # it begins with -6.7
        ("lightning_module", 0.003, 100, 0.7),  # of ten digits
        ("transformers_trainer", 0.003, 100, 0.5),
    ],
)
def test_a_run(name: str, lr: float, steps: int, learnt: float, tmp_path: Path) -> None:
    """It learns, has a curve, and is the same for the same seed."""
    loop = LOOPS[name]
    results = []
    for folder in ("first", "second"):
        task = {"name": f"{name}:run", "options": {"steps": steps}}
        content = {**loop.base, "device": "cpu", "optimizer": {"lr": lr}, "task": task}
        done = OwnLoop(run=example(name).run, metric=Metric(loop.metric, higher_is_better=True, percent=False))
        done(config_from_dict(content), tmp_path / folder)
        results.append(RunResult.from_json(tmp_path / folder / "result.json"))
    assert results[0].score > learnt
    assert len(results[0].history) > 1
    assert results[0].test == results[1].test
    assert results[0].history == results[1].history
