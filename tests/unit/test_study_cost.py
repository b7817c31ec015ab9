"""The plan of a study: what it counts and how it estimates."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import study_fakes
from study_fakes import fake_result, small_study

from syncbn.cli import main
from syncbn.study import commands
from syncbn.study.plan.grid import study_cells, unique_cells
from syncbn.study.run import cost, status
from syncbn.study.run.records import Records
from syncbn.study.run.runner import left_over, repeat_id
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


@pytest.mark.parametrize(("step", "steps"), [(10.0, 6), (0.1, 18), (0.001, 60), (0.0, 60)])
def test_the_longer_training_takes_about_a_second_and_a_half_more(monkeypatch, step, steps):
    asked = []

    def train(config, out):
        asked.append(config.budget.steps)
        return SimpleNamespace(seconds=step * config.budget.steps)

    monkeypatch.setattr(cost, "train", train)
    monkeypatch.setattr(cost, "steps_of", lambda config: 100)
    assert cost.timed(config_from_dict({})) == pytest.approx(100 * step)
    assert asked == [3, steps]


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
    assert "a rough estimate, from a few timed steps: about 24 s of training by one process; with 2 " in printed
    assert "with 2 side by side at best 12 s. Evaluations" in printed
    assert len(clock) == 1 + 2 * 3, "once to warm up, two settings of batch and one of group"


def test_a_finished_study_needs_no_clock(monkeypatch, tmp_path, capsys):
    study = small_study()
    monkeypatch.setattr(cost, "load_study", lambda name: study)
    monkeypatch.setattr(cost, "read_records", lambda out: {cell.key: None for cell in study_cells(study)})
    monkeypatch.setattr(cost, "train", None)
    assert cost.plan_study("small", tmp_path) == 0
    assert "6 done, 0 to do" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["-1", "0"])
def test_a_number_of_workers_that_cannot_be(workers, capsys):
    assert main(["study", "plan", "--config", "quickstart", "--workers", workers]) == 2
    assert capsys.readouterr().err == f"syncbn: error: workers: got {workers}, expected a positive integer\n"


def test_records_of_cells_that_the_study_no_longer_has_are_counted(tmp_path, monkeypatch, capsys):
    study = small_study()
    cells = study_cells(study)
    repeat = repeat_id(study.repeat_distributed, cells)
    records = Records(tmp_path)
    for key in [*(cell.key for cell in cells), repeat, "gone-1"]:
        records.add(key, study_fakes.NOON, 1.0, fake_result(cells[0].config))
    assert left_over(study, cells, [cells[0].key, repeat]) is None
    assert left_over(study, cells, ["gone-1"]) == "1 record belongs to a cell that is no longer in the study"
    records.add("gone-2", study_fakes.NOON, 1.0, fake_result(cells[0].config))
    for module in (cost, status, commands):
        monkeypatch.setattr(module, "load_study", lambda name: study)
    monkeypatch.setattr(commands, "print_table", lambda *arguments: None)
    monkeypatch.setattr(commands, "write_report", lambda *arguments, command, failures: "the page")
    for command in ("plan", "run", "status"):
        assert main(["study", command, "--config", "small", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed.count("2 records belong to cells that are no longer in the study") == 1, command
