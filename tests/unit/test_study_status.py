"""How long a study takes, from its finished runs; what a plan and a status count."""

from __future__ import annotations

import pytest
import study_fakes
from study_fakes import fake_result, small_study

from syncbn.cli import main
from syncbn.study import commands
from syncbn.study.plan.grid import study_cells, unique_cells
from syncbn.study.run.records import Records, read_records
from syncbn.study.run.status import left_over, seconds_left


def finish(out, cells, *seconds):
    records = Records(out)
    for cell, took in zip(cells, seconds, strict=True):
        records.add(cell.key, study_fakes.NOON, took, fake_result(cell.config))


def test_a_run_takes_as_long_as_the_others_of_its_arm(tmp_path):
    study = small_study(seeds=[0, 1, 2, 3])
    cells = study_cells(study)
    assert seconds_left(cells, {}) is None, "nothing to estimate from"
    batch = [cell for cell in cells if cell.arm == "batch"]
    sync = [cell for cell in cells if cell.arm == "sync"]
    finish(tmp_path, batch[:3] + sync[:1], 10, 12, 50, 4)
    # One run of batch (median 12), three of sync (4 each), four of iid (median of all, 11).
    assert seconds_left(cells, read_records(tmp_path)) == 12 + 3 * 4 + 4 * 11
    assert seconds_left(batch[:3], read_records(tmp_path)) == 0


def test_a_run_that_serves_several_cells_counts_once(tmp_path):
    arms = {name: {"overrides": {"norm": {"name": name}}} for name in ("batch", "group")}
    study = small_study(base={"data": {"name": "digits"}}, arms=arms, sweep={"values": [1, 2], "global_batch_size": 4})
    cells = study_cells(study)
    finish(tmp_path, [cells[0]], 3)
    assert (len(cells), len(unique_cells(cells))) == (8, 6)
    assert seconds_left(cells, read_records(tmp_path)) == 5 * 3


def test_a_plan_counts_what_is_done_and_estimates_the_rest(tmp_path, monkeypatch, capsys):
    arms = {name: {"overrides": {"norm": {"name": name}}} for name in ("batch", "group")}
    changes = {"sweep": {"values": [1, 2], "global_batch_size": 4}, "parity": {"arm": "batch"}}
    study = small_study(base={"data": {"name": "digits"}}, arms=arms, **changes)
    monkeypatch.setattr(commands, "load_study", lambda name: study)
    assert commands.plan_study("small", tmp_path) == 0
    assert capsys.readouterr().out.endswith("0 done, 6 to do\n" + PARITY + NO_ESTIMATE)
    finish(tmp_path, unique_cells(study_cells(study))[:2], 6, 6)
    assert commands.plan_study("small", tmp_path, workers=2) == 0
    printed = capsys.readouterr().out
    assert "per_gpu_batch_size: 1, 2" in printed
    assert "  group: 2 runs for 4 cells, no batch statistics" in printed
    assert "8 cells, 6 different runs: 2 done, 4 to do" in printed
    assert "about 24 s left, one run at a time, 12 s with 2 side by side, from the runs that have finished" in printed


PARITY = "parity check: batch, 8 steps under 1, 2 processes\n"
NO_ESTIMATE = "no estimate before the first run has finished\n"


def test_a_finished_study_needs_no_estimate(monkeypatch, tmp_path, capsys):
    study = small_study()
    cells = study_cells(study)
    monkeypatch.setattr(commands, "load_study", lambda name: study)
    finish(tmp_path, cells, *[1] * len(cells))
    assert commands.plan_study("small", tmp_path) == 0
    assert capsys.readouterr().out.endswith("6 done, 0 to do\n")
    assert commands.print_status("small", tmp_path) == 0
    assert capsys.readouterr().out.endswith("nothing is left to do\n")


@pytest.mark.parametrize("workers", ["-1", "0"])
def test_a_number_of_workers_that_cannot_be(workers, capsys):
    assert main(["study", "plan", "--config", "quickstart", "--workers", workers]) == 2
    assert capsys.readouterr().err == f"syncbn: error: workers: got {workers}, expected a positive integer\n"


def test_records_of_cells_that_the_study_no_longer_has_are_counted(tmp_path, monkeypatch, capsys):
    study = small_study()
    cells = study_cells(study)
    records = Records(tmp_path)
    for key in [*(cell.key for cell in cells), "gone-1"]:
        records.add(key, study_fakes.NOON, 1.0, fake_result(cells[0].config))
    assert left_over(cells, [cells[0].key]) is None
    assert left_over(cells, ["gone-1"]) == "1 record belongs to a cell that is no longer in the study"
    records.add("gone-2", study_fakes.NOON, 1.0, fake_result(cells[0].config))
    monkeypatch.setattr(commands, "load_study", lambda name: study)
    monkeypatch.setattr(commands, "print_table", lambda *arguments: None)
    monkeypatch.setattr(commands, "write_report", lambda *arguments, **options: "the page")
    for command in ("plan", "run", "status"):
        assert main(["study", command, "--config", "small", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed.count("2 records belong to cells that are no longer in the study") == 1, command
