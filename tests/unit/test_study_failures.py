"""A study whose runs failed says so, and does not read as one that has not ended."""

from __future__ import annotations

import pytest
import study_fakes
from study_fakes import fake_result, small_study

from syncbn.study import Study, commands
from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.tuning import trial_cells
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import print_table
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import run_cells
from syncbn.train.config import LocalError

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
    assert page.count("RuntimeError: no luck") == 1
    assert "seed 1000 and 5 others alike: RuntimeError: no luck" in page or tuned is False
    assert printed.err.count("RuntimeError: no luck") == 1
    assert f"and 5 others alike: RuntimeError: no luck (log: {tmp_path / 'logs'}" in printed.err
    assert "[2/6] " in printed.out
    assert printed.out.count("failed like batch, ") == 5
    assert "stopped" not in printed.err, "it may be the machine: the others are tried"


# ---- a mistake of the user's


def begun(tmp_path):
    return len(list((tmp_path / "logs").glob("*.log")))


def mistaken(is_wrong=lambda config: True, error=LocalError):
    """A task's mistake, with the traceback in a file of each run's own; what is right is done."""

    def train(config, out=None, *, resume=False):
        if is_wrong(config):
            raise error(f"task mine:Task: loss() raised KeyError: 'mask' (traceback: {out / 'error-0.log'})")
        study_fakes.train(config, out)

    return train


def commanded(study, monkeypatch, tmp_path, train):
    monkeypatch.setattr(commands, "load_study", lambda _: study)
    monkeypatch.setattr(commands, "train_function", lambda _: train)
    return commands.run_study("my study.yaml", tmp_path, executor="here")


def test_a_mistake_that_all_runs_meet_stops_the_study_early(tmp_path, monkeypatch, capsys):
    study = small_study(seeds=[0, 1, 2, 3])
    assert commanded(study, monkeypatch, tmp_path, mistaken()) == 1
    printed = capsys.readouterr()
    assert begun(tmp_path) == 3
    assert printed.err.count("loss() raised KeyError") == 1
    assert "failed: batch, seed 0 and 2 others alike: TaskError" not in printed.err
    assert "failed: batch, seed 0 and 2 others alike: LocalError: task mine:Task" in printed.err
    command = f"syncbn study run --config 'my study.yaml' --out {tmp_path}"
    words = "stopped: the first runs failed alike and none is done, so the other 9 were not done; when it is mended: "
    assert words + command in printed.err
    assert "0 runs in" in printed.out
    assert "0 kept from before, 3 failed" in printed.out
    assert commanded(study, monkeypatch, tmp_path, mistaken()) == 1
    assert begun(tmp_path) == 6, "others come first, then what failed"
    assert commanded(study, monkeypatch, tmp_path, mistaken(lambda _: False)) == 0
    assert len(read_records(tmp_path)) == 12


def test_a_mistake_in_a_tuning_stops_it_too(tmp_path, monkeypatch, capsys):
    base = {"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits", "validation_fraction": 0.2}}
    study = small_study(base=base, tune={"optimizer.lr": [0.1, 0.2]})
    assert commanded(study, monkeypatch, tmp_path, mistaken()) == 1
    assert begun(tmp_path) == 3
    error = capsys.readouterr().err
    assert "so the other 9 were not done" in error, "three of six trials, and six runs"
    assert "nothing was run after the tuning" not in error


@pytest.mark.parametrize(
    "is_wrong",
    [
        lambda config: config.norm.name == "sync",
        lambda config: config.per_gpu_batch_size == 1,
    ],
    ids=["one arm", "one place"],
)
def test_what_may_be_the_mistake_of_some_runs_stops_nothing(tmp_path, is_wrong):
    cells = study_cells(small_study(base={}, sweep={"global_batch_size": 4, "values": [1, 2, 4]}))
    for each in (cells, [cell for cell in cells if cell.arm != "iid"]):
        out = tmp_path / str(len(each))
        wrong = {cell.key for cell in each if is_wrong(cell.config)}
        outcomes = run_cells(each, out, train=mistaken(is_wrong), executor="here", progress=False)
        assert {key for key, outcome in outcomes.items() if outcome.state == "failed"} == wrong
        assert all(outcome.state in ("failed", "done") for outcome in outcomes.values())


def test_nothing_stops_a_study_of_which_a_run_is_done(tmp_path):
    cells = study_cells(small_study(seeds=[0, 1, 2]))
    run_cells(cells[:1], tmp_path, train=study_fakes.train, executor="here")
    outcomes = run_cells(cells, tmp_path, train=mistaken(), executor="here")
    assert [outcome.state for outcome in outcomes.values()].count("failed") == 8


def test_workers_stop_too_and_a_study_from_python_says_so(tmp_path):
    study = Study(
        run="own_loops:without_validation",
        metric={"name": "no_such_metric"},
        arms={"batch": {"overrides": {"norm": {"name": "batch"}}}},
        seeds=range(8),
    )
    with pytest.raises(RuntimeError, match=r"runs failed; the first, .*; the first runs failed alike and none is done"):
        study.run(tmp_path, workers=2, progress=False)
    assert begun(tmp_path) < 8
