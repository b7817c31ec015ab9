"""The plan of a study: what it counts and how it estimates."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from study_fakes import fake_result, small_study

from syncbn.study import cost
from syncbn.study.plan import study_cells, unique_cells
from syncbn.study.records import Records
from syncbn.train.config_io import config_from_dict


@pytest.fixture
def clock(monkeypatch):
    """Training that takes 3 s to begin and then 0.1 s a step, and 60 steps in a whole run."""
    timed = []

    def train(config, out):
        timed.append((config.norm.name, config.budget.steps))
        return SimpleNamespace(seconds=3 + 0.1 * config.budget.steps)

    monkeypatch.setattr(cost, "train", train)
    monkeypatch.setattr(cost, "steps_of", lambda config: 60)
    return timed


def test_the_beginning_does_not_count(clock):
    assert cost.timed(config_from_dict({})) == pytest.approx(6.0)
    assert [steps for _, steps in clock] == [3, 6]


def test_a_clock_that_runs_backwards(monkeypatch):
    times = iter((2.0, 1.2))
    monkeypatch.setattr(cost, "train", lambda config, out: SimpleNamespace(seconds=next(times)))
    monkeypatch.setattr(cost, "steps_of", lambda config: 60)
    assert cost.timed(config_from_dict({})) == pytest.approx(12.0), "all that the steps took"


def test_a_plan_counts_what_is_done_and_times_each_setting_once(clock, tmp_path, monkeypatch, capsys):
    arms = {name: {"overrides": {"norm": {"name": name}}} for name in ("batch", "group")}
    study = small_study(base={"data": {"name": "digits"}}, arms=arms, sweep={"values": [1, 2], "global_batch_size": 4})
    monkeypatch.setattr(cost, "load_study", lambda name: study)
    cells = unique_cells(study_cells(study))
    assert len(cells) == 6
    records = Records(tmp_path)
    for cell in cells[:2]:
        records.add(cell.key, datetime.now(UTC), 1.0, fake_result(cell.config))
    assert cost.plan_study("small", tmp_path, workers=2) == 0
    printed = capsys.readouterr().out
    assert "per_gpu_batch_size: 1, 2" in printed
    assert "  group: 2 runs for 4 cells, no batch statistics" in printed
    assert "8 cells, 6 different runs: 2 done, 4 to do" in printed
    assert "about 24 s of training by one process; with 2 side by side at best 12 s" in printed
    assert len(clock) == 2 * 3, "two settings of batch and one of group"


def test_a_finished_study_needs_no_clock(monkeypatch, tmp_path, capsys):
    study = small_study()
    monkeypatch.setattr(cost, "load_study", lambda name: study)
    monkeypatch.setattr(cost, "read_records", lambda out: {cell.key: None for cell in study_cells(study)})
    monkeypatch.setattr(cost, "train", None)
    assert cost.plan_study("small", tmp_path) == 0
    assert "6 done, 0 to do" in capsys.readouterr().out
