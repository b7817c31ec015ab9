"""A study whose runs failed says so, and does not read as one that has not ended."""

from __future__ import annotations

import pytest
from study_fakes import fake_result, small_study

from syncbn.study import commands
from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.tuning import trial_cells
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import print_table

ERRORS = {"batch": 0.4, "sync": 0.03, "iid": 0.02}


def shown(study, failed_arms, tmp_path, capsys, trials=()):
    """The words of the page and of the terminal, where all runs of these arms failed."""
    cells = study_cells(study)
    results = {c.key: fake_result(c.config, ERRORS[c.arm] + 0.01 * c.seed) for c in cells if c.arm not in failed_arms}
    failures = {cell.key: "RuntimeError: no luck" for cell in [*cells, *trials] if cell.arm in failed_arms}
    path = write_report(study, cells, results, tmp_path, command="", failures=failures)
    print_table(study, cells, results, failures)
    return " ".join(path.read_text().split()), " ".join(capsys.readouterr().out.split())


def test_nothing_but_failures(tmp_path, capsys):
    for words in shown(small_study(), ERRORS, tmp_path, capsys):
        assert "No run has a result: 6 of 6 runs failed." in words
        assert "Every run failed of Local BatchNorm (2 runs), SyncBatchNorm (2 runs) and Reference" in words
        assert "No run has a result yet" not in words
        assert "4 runs failed" in words, "of a contrast of two arms"


def test_one_setting_failed(tmp_path, capsys):
    study = small_study(seeds=[0, 1, 2])
    for words in shown(study, ["sync"], tmp_path, capsys):
        assert "Every run failed of SyncBatchNorm (3 runs)." in words
        assert "Nothing is claimed for 1 of 2 contrasts: 6 of 9 runs have a result, and 3 failed." in words
        assert "3 failed" in words


def test_a_sweep_keeps_the_row_of_an_arm_that_failed(tmp_path, capsys):
    sweep = {"values": [2, 4, 8], "global_batch_size": 8}
    study = small_study(base={"data": {"name": "digits"}}, sweep=sweep)
    page, printed = shown(study, ["sync"], tmp_path, capsys)
    for words in (page, printed):
        assert "SyncBatchNorm at 2 images per GPU (2 runs)" in words
    assert page.count("<td>2 failed</td>") >= 3
    assert "SyncBatchNorm 2 2 2 failed failed failed" in printed


def test_nothing_has_run_yet(tmp_path, capsys):
    study = small_study()
    write_report(study, study_cells(study), {}, tmp_path, command="")
    assert "No run has a result yet." in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("tuned", [False, True])
def test_the_commands_of_a_study_that_failed(tmp_path, monkeypatch, capsys, tuned):
    def fails(config, out=None, *, resume=False):
        raise RuntimeError("no luck")

    changes = {"tune": {"optimizer.lr": [0.1, 0.2]}} if tuned else {}
    base = {"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits", "validation_fraction": 0.2}}
    study = small_study(base=base, **changes)
    monkeypatch.setattr(commands, "load_study", lambda _: study)
    monkeypatch.setattr(commands, "train_function", lambda _: fails)
    assert commands.run_study("small", tmp_path, executor="here") == 1
    printed = capsys.readouterr()
    assert "No run has a result yet" not in printed.out
    (tmp_path / "study.yaml").unlink()
    assert commands.report_study("small", tmp_path) == 0
    assert (tmp_path / "study.yaml").exists(), "the folder says which study it holds"
    page = (tmp_path / "report.html").read_text()
    if tuned:
        assert len(trial_cells(study)) == 6
        assert "nothing was run after the tuning, which failed" in printed.err
        assert "No run has a result. Without a choice, as runs of the tuning failed: Local BatchNorm (2 runs)" in page
        assert "none: 2 runs failed" in page
        assert "tuning failed" in page
    else:
        assert "No run has a result: 6 of 6 runs failed." in printed.out
        assert "No run has a result: 6 of 6 runs failed." in page
    assert page.count("RuntimeError: no luck") == 6
