"""The examples of a task and its study are what the README says: one file of a user's, and a study that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.study_file import load_study
from syncbn.train.config import config_from_dict, config_to_dict
from syncbn.train.loop import train

ROOT = Path(__file__).resolve().parents[2]


def test_the_task_is_small():
    code = [line for line in (ROOT / "examples/discs/task.py").read_text().splitlines() if line.strip()]
    assert len(code) < 40


def test_its_study_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(ROOT / "examples/discs/study.yaml")
    assert study.tune is not None
    cell = next(cell for cell in study_cells(study) if cell.arm == "sync")
    values = config_to_dict(cell.config)
    values["evaluation"] = {"batch": False, "population_samples": []}
    result = train(config_from_dict(values))
    assert result.metric.name == "dice"
    assert result.test_samples == 128
    assert result.score > 0.8
