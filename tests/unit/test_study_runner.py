"""Running a study: each cell once, whatever is killed or started twice."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import time

import study_fakes
from study_fakes import small_study

from syncbn.study.plan import study_cells
from syncbn.study.runner import run_cells
from syncbn.study.worker import Trainer, load_record


def run(out, train=study_fakes.train, workers=2):
    study = small_study()
    return run_cells(study, study_cells(study), out, workers=workers, trainer=Trainer(train=train))


def calls(out):
    return collections.Counter((out / "calls.txt").read_text().split())


def test_each_cell_once_and_then_never_again(tmp_path):
    first = run(tmp_path)
    assert {o.status for o in first.values()} == {"ran"}
    assert sorted(calls(tmp_path).values()) == [1] * 6
    second = run(tmp_path)
    assert {o.status for o in second.values()} == {"kept"}
    assert {k: o.result for k, o in second.items()} == {k: o.result for k, o in first.items()}
    assert sorted(calls(tmp_path).values()) == [1] * 6


def test_a_half_written_record_is_run_again(tmp_path):
    key = study_cells(small_study())[0].key
    (tmp_path / "runs" / key).mkdir(parents=True)
    (tmp_path / "runs" / key / "result.json").write_text('{"status": "ok", "test_er')
    assert load_record(tmp_path / "runs" / key) is None
    assert {o.status for o in run(tmp_path).values()} == {"ran"}
    assert calls(tmp_path)[key] == 1


def test_accidents_are_outcomes(tmp_path):
    """One run raises, one kills its worker, two diverge: the others are done all the same."""
    outcomes = run(tmp_path, study_fakes.train_with_accidents)
    by_place = {(c.arm, c.seed): outcomes[c.key] for c in study_cells(small_study())}
    assert by_place["sync", 0].status == "failed"
    assert "no luck" in by_place["sync", 0].message
    assert by_place["sync", 1].status == "failed"
    assert "SIGKILL" in by_place["sync", 1].message
    assert [by_place["batch", seed].result.status for seed in (0, 1)] == ["diverged"] * 2
    assert [by_place["iid", seed].result.test_error for seed in (0, 1)] == [0.02] * 2


def test_killed_and_two_at_once(tmp_path):
    """A study killed half-way leaves whole records; then two go on with it together and run each cell once."""
    context = multiprocessing.get_context("spawn")
    first = context.Process(target=run, args=(tmp_path,), kwargs={"workers": 1})
    first.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    done = {path.parent.name for path in tmp_path.glob("runs/*/result.json")}
    assert done
    # The killed study's worker notices and ends; what it was at is free again then.
    together = [context.Process(target=run, args=(tmp_path,), kwargs={"workers": 1}) for _ in range(2)]
    for process in together:
        process.start()
    for process in together:
        process.join(100)
    assert [process.exitcode for process in together] == [0, 0]
    records = [load_record(tmp_path / "runs" / cell.key) for cell in study_cells(small_study())]
    assert None not in records
    # The cell that was cut off was begun twice; every other cell once.
    counts = calls(tmp_path)
    assert sum(counts.values()) <= 7
    assert all(counts[key] == 1 for key in done)
