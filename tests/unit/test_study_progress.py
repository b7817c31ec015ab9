"""What a study shows while it runs: lines, and on a terminal a table of the runs that are going on."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import threading
import time

import pytest
import study_fakes
from study_fakes import fake_result, small_study

from syncbn.study.plan.grid import study_cells
from syncbn.study.run import news, progress
from syncbn.study.run.jobs import Job, study_jobs
from syncbn.study.run.news import News
from syncbn.study.run.progress import Display
from syncbn.study.run.runner import run_cells
from syncbn.study.run.status import Outcome

CELLS = study_cells(small_study(base={"gpus": 4, "per_gpu_batch_size": 4, "budget": {"epochs": 3}}))
STEP = {"kind": "step", "step": 7, "epoch": 1, "train_loss": 0.51234}
EVALUATED = {"kind": "eval", "step": 10, "epoch": 2, "train_loss": 0.4, "test": {"loss": 1.0, "error": 0.9}}
VALIDATED = {**EVALUATED, "validation": {"loss": 0.3, "error": 0.1256}}


# ---- what a run has written


def told(job, *texts):
    """Where a run stands after each of the texts was added to its file."""
    found, seen = News(job), []
    job.directory.mkdir(parents=True, exist_ok=True)
    for text in texts:
        with (job.directory / "metrics.jsonl").open("a") as file:
            file.write(text)
        found.look()
        seen.append((found.place, found.metric))
    return seen


def lines(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


def job_of(tmp_path, cell=CELLS[0]):
    return Job(cell=cell, out=tmp_path)


def test_a_run_is_somewhere_in_its_budget(tmp_path):
    later = {**STEP, "step": 11, "epoch": 2, "train_loss": 0.3}
    assert told(job_of(tmp_path), lines(STEP), lines(VALIDATED), lines(later)) == [
        ("epoch 2 of 3", "training loss 0.5123"),
        ("epoch 2 of 3", "validation error 0.1256"),
        ("epoch 3 of 3", "validation error 0.1256"),
    ]


def test_a_budget_of_steps_and_no_validation_data(tmp_path):
    budget = {"epochs": None, "steps": 400}
    cell = study_cells(small_study(base={"gpus": 4, "per_gpu_batch_size": 4, "budget": budget}))[0]
    (seen,) = told(job_of(tmp_path, cell), lines(STEP, EVALUATED))
    assert seen == ("step 10 of 400", "training loss 0.4"), "the test set is for the end"


def test_a_loop_of_the_users_reports_what_it_likes(tmp_path):
    first, second = {"step": 20, "loss": 1.5, "validation_dice": 0.71239}, {"step": 40, "loss": None}
    assert told(job_of(tmp_path), f"\n{lines(first)}", f"\n{lines(second)}") == [
        ("step 20", "validation_dice 0.7124"),
        ("step 40", "validation_dice 0.7124"),
    ]


def test_half_a_line_is_read_when_it_is_whole(tmp_path):
    text = lines(STEP, VALIDATED)
    seen = told(job_of(tmp_path), text[:-9], text[-9:])
    assert seen == [("epoch 2 of 3", "training loss 0.5123"), ("epoch 2 of 3", "validation error 0.1256")]


@pytest.mark.parametrize(
    "wrong",
    [
        *('{"step": 3', "[1, 2]", "null", '{"step": Infinity}', '{"step": "a"}', '{"kind": "step", "step": 1}'),
        *('{"step": 3, "loss": "small"}', '{"kind": "eval", "step": 1, "epoch": 1, "validation": 3}', "\x00\xff"),
    ],
)
def test_no_line_is_an_error(tmp_path, wrong):
    assert told(job_of(tmp_path), f"{wrong}\n{lines(VALIDATED)}")[-1] == ("epoch 2 of 3", "validation error 0.1256")


def test_no_file_is_no_error(tmp_path):
    found = News(job_of(tmp_path))
    found.look()
    (tmp_path / "runs" / CELLS[0].key / "metrics.jsonl").mkdir(parents=True)
    found.look()
    assert (found.place, found.metric) == ("", "")


def test_a_run_that_begins_anew_is_read_anew(tmp_path):
    job = job_of(tmp_path)
    found = News(job)
    job.directory.mkdir(parents=True)
    path = job.directory / "metrics.jsonl"
    for text, place in ((lines(STEP, VALIDATED, STEP), "epoch 2 of 3"), (lines({**STEP, "epoch": 0}), "epoch 1 of 3")):
        path.write_text(text)
        found.look()
        assert found.place == place


def test_a_look_reads_the_end_of_what_was_added(tmp_path, monkeypatch):
    monkeypatch.setattr(news, "MOST_BYTES", 300)
    records = [{**STEP, "epoch": epoch} for epoch in range(2)] * 50
    job = job_of(tmp_path)
    sizes = []
    found = News(job)
    job.directory.mkdir(parents=True)
    (job.directory / "metrics.jsonl").write_text(lines(*records))
    monkeypatch.setattr(found, "_note", lambda record: sizes.append(record))
    found.look()
    assert 1 <= len(sizes) <= 4
    found.look()
    assert len(sizes) <= 4, "nothing is read twice"


# ---- the terminal


class Terminal:
    """A terminal that is standard output, and all that was written to it."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self._before, sys.stdout = sys.stdout, self.file
        self._text = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                self._text += os.read(self.master, 4096)
            except OSError:  # the other end was closed
                return

    def close(self):
        """Standard output is what it was; returns what was written."""
        sys.stdout = self._before
        self.file.close()
        self._reader.join(10)
        os.close(self.master)
        return self._text.decode()


@pytest.fixture
def terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "12"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "REFRESHES", 0.001)  # it is drawn with what is printed, and at the end
    return Terminal  # to be made in the test: pytest gives it another standard output than its fixtures


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"


def shown(terminal, jobs, done=0):
    """What a terminal of 12 lines shows of these runs, as the display ends."""
    made = terminal()
    with Display() as display:
        display.start(total=6, done=done, workers=2)
        for job in jobs:
            display.began(job)
    return made.close()


def test_a_row_for_each_run_and_the_bar_below(terminal, tmp_path):
    jobs = study_jobs(CELLS, tmp_path)[:2]
    told(jobs[1], lines(STEP, VALIDATED))
    text = shown(terminal, jobs, done=3)
    rows = [line.rstrip() for line in plain(text).splitlines() if line.strip()]
    assert rows[0] == "6 runs: 3 of them done before, 3 to do, 2 side by side"
    assert re.fullmatch(r"batch, seed 0 +\d+\.\d s", rows[-3])
    assert re.fullmatch(r"sync, seed 0 +\d+\.\d s +epoch 2 of 3 +validation error 0\.1256", rows[-2])
    assert re.fullmatch(r"runs 3/6 \S+ 0:00:\d\d", rows[-1])


def test_more_runs_than_lines_are_counted(terminal, tmp_path):
    cells = study_cells(small_study(seeds=list(range(8))))
    rows = plain(shown(terminal, study_jobs(cells, tmp_path)))
    assert rows.count(", seed ") == 8, "12 lines have room for them, the count, the bar and what is printed"
    assert "and 16 more" in rows
    assert "runs 0/6" in rows


def test_the_terminal_is_as_before_after_an_interrupt(terminal, tmp_path):
    def interrupted(config, out, *, resume):
        raise KeyboardInterrupt

    made = terminal()
    with pytest.raises(KeyboardInterrupt):
        run_cells(CELLS, tmp_path, train=interrupted, executor="here")
    assert sys.stdout is made.file
    text = made.close()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.index(HIDE) < text.index(SHOW)


def test_a_run_in_this_process_has_its_log_for_itself(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "REFRESHES", 50.0)

    def train(config, out, *, resume):
        print("what the run prints")
        time.sleep(0.2)  # the table is redrawn meanwhile
        study_fakes.train(config, out)

    made = terminal()
    outcomes = run_cells(CELLS[:2], tmp_path, train=train, executor="here")
    text = plain(made.close())
    assert "what the run prints" not in text
    assert re.search(r"batch, seed 0 +0\.[12] s", text), "drawn while the run goes on"
    assert "[1/2] batch, seed 0: test error 40.0 %" in text
    for outcome in outcomes.values():
        log = outcome.job.log.read_text()
        assert "what the run prints" in log
        assert "\x1b" not in log


def test_off_a_terminal_there_are_lines_alone(tmp_path, capsys):
    job = study_jobs(CELLS, tmp_path)[0]
    with Display() as display:
        display.start(total=1, done=0, workers=1)
        display.began(job)
        display.ended(Outcome(job=job, state="done", result=fake_result(job.cell.config, 0.127), ran=True))
    assert capsys.readouterr().out == (
        "1 runs: 1 to do, one at a time\n[1/1] batch, seed 0: test error 12.7 %, 0.1 s\n"
    )
    with Display(quiet=True) as display:
        display.start(total=1, done=0, workers=1)
    assert capsys.readouterr().out == ""
