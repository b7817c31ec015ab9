"""Running a study: each cell once, whatever is killed or started twice."""

from __future__ import annotations

import collections
import errno
import multiprocessing
import os
import re
import signal
import sys
import time

import pytest
import study_fakes
from study_fakes import fake_result, small_study

from syncbn.cli import main
from syncbn.study import commands
from syncbn.study.plan.grid import state_of, study_cells
from syncbn.study.run.jobs import attempt, load_result, study_jobs
from syncbn.study.run.logs import failure, note_failure
from syncbn.study.run.records import Records, read_records
from syncbn.study.run.runner import run_cells
from syncbn.study.run.status import study_outcomes
from syncbn.train.checkpoint import try_lock
from syncbn.train.config import ConfigError

STUDY = small_study()
CELLS = study_cells(STUDY)
JOBS = 6


def run(out, train=study_fakes.train, workers=2, **options):
    return run_cells(CELLS, out, workers=workers, train=train, **options)


def ends(outcomes):
    """The states in which runs ended, and whether they ended in this call."""
    return {(outcome.state, outcome.ran) for outcome in outcomes.values()}


def calls(out):
    return collections.Counter((out / "calls.txt").read_text().split())


def test_each_cell_once_and_then_never_again(tmp_path):
    first = run(tmp_path)
    assert ends(first) == {("done", True)}
    assert sorted(calls(tmp_path).values()) == [1] * JOBS
    records = read_records(tmp_path)
    assert {key: o.result for key, o in first.items()} == {key: r.result for key, r in records.items()}
    # A file for each worker, and a record is what it says: wall time, in the order of the clock.
    assert {path.stem for path in (tmp_path / "records").iterdir()} == {r.worker for r in records.values()}
    assert all(0.1 < r.seconds < 5 for r in records.values())
    assert all(abs((r.ended - r.started).total_seconds() - r.seconds) < 0.1 for r in records.values())
    second = run(tmp_path)
    assert ends(second) == {("done", False)}
    assert {k: o.result for k, o in second.items()} == {k: o.result for k, o in first.items()}
    assert sorted(calls(tmp_path).values()) == [1] * JOBS


def test_results_of_the_trainer_are_recorded_without_running_again(tmp_path):
    """Killed between the result and the record; what is half-written is run."""
    done, half = CELLS[0], CELLS[1]
    fake = fake_result(done.config, 0.123)
    for cell in (done, half):
        (tmp_path / "runs" / cell.key).mkdir(parents=True)
    fake.to_json(tmp_path / "runs" / done.key / "result.json")
    (tmp_path / "runs" / half.key / "result.json").write_text('{"status": "ok", "test_er')
    assert load_result(tmp_path / "runs" / half.key) is None
    outcomes = run(tmp_path)
    assert (outcomes[done.key].state, outcomes[done.key].ran) == ("done", False)
    assert outcomes[done.key].result == fake
    record = read_records(tmp_path)[done.key]
    assert record.seconds == fake.seconds
    assert (record.ended - record.started).total_seconds() == pytest.approx(fake.seconds, abs=0.01)
    assert calls(tmp_path)[done.key] == 0
    assert calls(tmp_path)[half.key] == 1
    # The records are what counts from then on.
    (tmp_path / "runs" / done.key / "result.json").unlink()
    assert run(tmp_path)[done.key].result == fake


@pytest.mark.parametrize("change", [('"steps"', '"paces"'), ('"status": "ok",', '"status": "ok", "more": 1,'), None])
@pytest.mark.fault(
    "file",
    "a run's result is of another version",
    moment="before the study goes on",
    outcome="one line; the file stays as it is",
    lost="nothing",
)
def test_a_result_of_another_version_is_kept_and_named(tmp_path, change):
    path = tmp_path / "runs" / CELLS[0].key / "result.json"
    path.parent.mkdir(parents=True)
    fake_result(CELLS[0].config).to_json(path)
    text = path.read_text().replace(*change) if change else "[]"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a result that this version of syncbn can read") as caught:
        run(tmp_path)
    assert str(path) in str(caught.value)
    event = attempt(study_jobs(CELLS, tmp_path)[0], study_fakes.train, Records(tmp_path))
    assert (event.job.cell, event.state, str(path) in event.message) == (CELLS[0], "failed", True)
    assert path.read_text() == text


@pytest.mark.fault(
    "disk",
    "no space is left",
    moment="when a run of a study is recorded",
    outcome="the run is `failed`; the next study run records it",
    lost="nothing",
)
def test_a_record_that_cannot_be_written_is_a_failure_of_its_run_alone(tmp_path, monkeypatch):
    """Results that are to be recorded by the study itself, at its beginning and after a worker died."""
    path = tmp_path / "runs" / CELLS[0].key
    path.mkdir(parents=True)
    fake_result(CELLS[0].config).to_json(path / "result.json")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Records, "add", full)  # in this process; the workers are new ones
    outcomes = run(tmp_path, study_fakes.train_then_killed)
    failed = {key for key, outcome in outcomes.items() if outcome.state == "failed"}
    assert failed == {cell.key for cell in CELLS if cell.seed == 0}
    assert {outcomes[key].message for key in failed} == {"OSError: [Errno 28] No space left on device"}
    assert failure(outcomes[CELLS[0].key].job.log) == "OSError: [Errno 28] No space left on device"
    assert ends({key: o for key, o in outcomes.items() if key not in failed}) == {("done", True)}
    monkeypatch.undo()
    assert ends(run(tmp_path)) == {("done", False)}


@pytest.mark.fault(
    "death",
    "a worker of a study is killed",
    moment="between its result and its record",
    outcome="the run is recorded, and not done again",
    lost="nothing",
)
def test_a_worker_that_dies_after_its_result_has_done_its_run(tmp_path):
    outcomes = run(tmp_path, study_fakes.train_then_killed)
    assert ends(outcomes) == {("done", True)}
    assert len(read_records(tmp_path)) == JOBS
    assert sorted(calls(tmp_path).values()) == [1] * JOBS


@pytest.mark.fault(
    "death",
    "a worker of a study is killed",
    moment="in a run",
    outcome="the run is `failed`, the others are done",
    lost="the steps since the last checkpoint",
)
def test_accidents_are_outcomes(tmp_path, monkeypatch, capsys):
    """One run raises, one kills its worker, two diverge: the others are done all the same."""
    outcomes = run(tmp_path, study_fakes.train_with_accidents)
    by_place = {(c.arm, c.seed): outcomes[c.key] for c in CELLS}
    assert by_place["sync", 0].state == "failed"
    assert "no luck" in by_place["sync", 0].message
    assert by_place["sync", 1].state == "failed"
    assert "SIGKILL" in by_place["sync", 1].message
    assert [by_place["batch", seed].state for seed in (0, 1)] == ["diverged"] * 2
    assert [by_place["iid", seed].state for seed in (0, 1)] == ["done"] * 2
    assert [by_place["iid", seed].result.score for seed in (0, 1)] == [0.02] * 2
    # The folder tells the same to another process.
    seen = study_outcomes(CELLS, tmp_path)
    assert {k: (o.state, o.message) for k, o in seen.items()} == {k: (o.state, o.message) for k, o in outcomes.items()}
    monkeypatch.setattr(commands, "load_study", lambda name: STUDY)
    with try_lock(by_place["sync", 1].job.lock):
        assert main(["study", "status", "--config", "small", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(f"small: 6 runs in {tmp_path}") + 1 :]
    words = [line.split()[:2] for line in lines[:5]]
    assert words == [["missing", "0"], ["running", "1"], ["done", "2"], ["diverged", "2"], ["failed", "1,"]]
    assert re.fullmatch(r"about \S+ s left, one run at a time, from the runs that have finished", lines[5])
    assert lines[6:9] == ["running: sync, seed 1", "diverged: batch, seed 0", "diverged: batch, seed 1"]
    assert lines[9].startswith("failed: sync, seed 0: RuntimeError: no luck (log: ")
    assert len(lines) == 10


def test_status_of_a_folder_that_does_not_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_study", lambda name: STUDY)
    out = tmp_path / "none"
    assert main(["study", "status", "--config", "small", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"small: 6 runs in {out}, which does not exist yet"
    assert [line.split() for line in lines[1:6]] == [
        [k, n] for k, n in zip(("missing", "running", "done", "diverged", "failed"), "60000", strict=True)
    ]
    assert lines[6:] == ["no estimate before the first run has finished"]
    assert not out.exists()


def test_status_tells_a_run_that_was_cut_off_from_one_that_was_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_study", lambda name: STUDY)
    study_jobs(CELLS, tmp_path)[0].directory.mkdir(parents=True)
    assert main(["study", "status", "--config", "small", "--out", str(tmp_path)]) == 0
    assert "missing     6, 1 of them begun and cut off" in capsys.readouterr().out


def test_report_from_what_is_there(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(commands, "load_study", lambda name: STUDY)
    monkeypatch.setattr(commands, "print_table", lambda *arguments: None)
    monkeypatch.setattr(commands, "write_report", lambda *arguments, **options: written.append(arguments) or "the page")
    words = ["study", "report", "--config", "small", "--out"]
    assert main([*words, str(tmp_path / "none")]) == 2
    assert "expected a folder with at least one finished run of the study small" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    for cell in CELLS[:4]:
        Records(tmp_path).add(cell.key, study_fakes.NOON, 1.0, fake_result(cell.config))
    assert main([*words, str(tmp_path)]) == 0
    assert capsys.readouterr().out == "report: the page\n"
    study, cells, results, out = written[0]
    assert (study, cells, out) == (STUDY, CELLS, tmp_path)
    assert [state_of(results[cell.key]) for cell in CELLS[:4]] == ["done"] * 4
    assert set(results) == {cell.key for cell in CELLS[:4]}
    assert not (tmp_path / "runs").exists()


def test_a_log_tells_of_its_last_attempt(tmp_path):
    log = tmp_path / "logs" / "k.log"
    assert failure(log) is None
    note_failure(log, "OSError: first")
    assert failure(log) == "OSError: first"
    with log.open("a") as file:
        file.write("== 2026-03-01T12:00:00+00:00 began: sync, seed 0\nstep 1\nValueError: second\nstep 2\n")
    assert failure(log) is None


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_study", lambda name: STUDY)

    def said(*words, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["study", "run", "--config", "small", "--out", str(tmp_path / "out"), *words]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "workers: got 0, expected a positive integer" in said("--workers", "0")
    assert "executor: got 'cloud', expected one of pool, slurm, local" in said("--executor", "cloud")
    assert "slurm-options" in said("--slurm-options", "{partition: x}")
    assert "slurm-options: got 'nonsense', expected a mapping" in said("--slurm-options", "nonsense")
    assert "workers: got 2, expected 1, as the 4 processes" in said("--workers", "2", WORLD_SIZE="4")
    assert "executor: got 'local', expected none, as the 4 processes" in said("--executor", "local")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study foo", "command: got 'study foo', expected one of train, parity, diagnose, advise, convert-check"),
        ("study", "command: got 'study', expected one of train, parity, diagnose, advise, convert-check, study plan"),
        ("", "command: got nothing, expected one of train"),
        ("study run --out x", "config: got nothing, expected text, which syncbn study run needs"),
        ("study status", "config: got nothing, expected text, which syncbn study status needs"),
        ("study status --config a", "out: got nothing, expected a path, which syncbn study status needs"),
        ("study run --config a --out b --wurkers 2", "wurkers: got '2', expected an option of syncbn study run"),
        ("study run --config a --out b --workers two", "workers: got 'two', expected an integer"),
        ("study run --config a --out", "out: got nothing, expected a path"),
        ("study run nbs_sweep --out b", "study run: got 'nbs_sweep', expected options alone"),
        ("study run --config nothing --out b", "study: got 'nothing', expected an existing YAML file or the name"),
    ],
)
def test_words_that_are_wrong(words, message, capsys):
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"syncbn: error: {message}")
    assert said.count("\n") == 1


def test_a_cluster_needs_submitit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_study", lambda name: STUDY)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["study", "run", "--config", "small", "--out", str(tmp_path), "--executor", "slurm"]) == 2
    assert capsys.readouterr().err == "syncbn: error: submitit is not installed; pip install 'syncbn[slurm]'\n"


@pytest.mark.fault(
    "file",
    "records of a newer version",
    moment="before the study goes on",
    outcome="one line",
    lost="nothing",
)
def test_records_of_a_newer_version_stop_the_study(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "w.jsonl").write_text('{"schema": 2, "key": "a"}\n')
    with pytest.raises(ConfigError, match="a newer version of syncbn"):
        run(tmp_path)


@pytest.mark.fault(
    "together",
    "two studies in one folder",
    moment="after a kill of the study",
    outcome="each run is done once, by one of them",
    lost="the steps since the last checkpoint",
)
def test_killed_and_two_at_once(tmp_path):
    """A study killed half-way leaves whole records; then two go on with it together and run each cell once."""
    # Forked from a server that has imported torch, a runner starts at once; its workers are new processes, as always.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "study_fakes"])
    first = context.Process(target=run, args=(tmp_path,), kwargs={"workers": 1})
    first.start()
    deadline = time.monotonic() + 60
    while not read_records(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    done = set(read_records(tmp_path))
    assert done
    # The killed study's worker notices and ends; what it was at is free again then.
    together = [context.Process(target=run, args=(tmp_path,), kwargs={"workers": 1}) for _ in range(2)]
    for process in together:
        process.start()
    for process in together:
        process.join(100)
    assert [process.exitcode for process in together] == [0, 0]
    assert len(read_records(tmp_path)) == JOBS
    lines = [line for path in (tmp_path / "records").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == JOBS
    # The cell that was cut off was begun twice; every other cell once.
    counts = calls(tmp_path)
    assert sum(counts.values()) <= JOBS + 1
    assert all(counts[key] == 1 for key in done)
