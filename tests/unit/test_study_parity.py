"""The parity check of a study: run once for its cell, and kept whole."""

from __future__ import annotations

import json

import pytest
from study_fakes import small_study

from syncbn.study import commands
from syncbn.study.plan.grid import study_cells
from syncbn.study.run import parity
from syncbn.study.run.parity import check_parity
from syncbn.train.launch_error import LaunchError


@pytest.fixture
def checks(monkeypatch):
    """The checks that were run; one with more than four steps finds a difference."""
    run = []

    def run_parity(config, processes, steps, say):
        run.append((config.norm.name, config.seed, config.evaluation.population_samples, processes, steps))
        say(f"{steps} steps")
        return steps <= 4

    monkeypatch.setattr(parity, "run_parity", run_parity)
    return run


def test_a_check_is_run_once_for_its_cell(checks, tmp_path):
    study = small_study(parity={"arm": "sync", "processes": [1, 4], "steps": 4})
    cells = study_cells(study)
    said = []
    assert check_parity(study, cells, tmp_path, said.append)
    assert checks == [("sync", 0, [], (1, 4), 4)]
    found = json.loads((tmp_path / "parity.json").read_text())
    cell = {"key": cells[1].key, "arm": "sync", "processes": [1, 4], "steps": 4}
    assert found == {**cell, "lines": ["4 steps"], "agrees": True}
    assert check_parity(study, cells, tmp_path, said.append)
    assert (len(checks), said) == (1, ["4 steps"])
    other = small_study(parity={"arm": "sync", "processes": [1, 4], "steps": 5})
    assert not check_parity(other, cells, tmp_path, said.append)
    assert not check_parity(other, cells, tmp_path, said.append), "a difference is kept, too"
    assert len(checks) == 2
    assert json.loads((tmp_path / "parity.json").read_text())["agrees"] is False


def test_a_study_without_a_check_agrees(checks, tmp_path):
    study = small_study()
    assert check_parity(study, study_cells(study), tmp_path)
    assert not checks
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "code"), [(4, 0), (5, 1), (None, 1)])
def test_a_difference_and_a_failure_are_in_the_exit_code(checks, tmp_path, monkeypatch, capsys, steps, code):
    study = small_study(parity={"arm": "sync", "steps": steps or 1})

    def fails(*arguments):
        raise LaunchError("2 processes ended with exit code 1; see the log\nline\nline")

    if steps is None:
        monkeypatch.setattr(parity, "run_parity", fails)
    monkeypatch.setattr(commands, "load_study", lambda name: study)
    monkeypatch.setattr(commands, "run_cells", lambda *arguments, **options: {})
    monkeypatch.setattr(commands, "write_report", lambda *arguments, **options: "the page")
    monkeypatch.setattr(commands, "print_table", lambda *arguments: None)
    assert commands.run_study("small", tmp_path) == code
    said = capsys.readouterr()
    assert said.out.endswith("report: the page\n")
    lost = "parity check: failed: 2 processes ended with exit code 1; see the log\n"
    assert said.err == (lost if steps is None else "")
    assert (tmp_path / "parity.json").exists() == (steps is not None)
