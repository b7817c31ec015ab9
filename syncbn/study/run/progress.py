"""Progress of a study: a line for each run that ends and, on a terminal, a live table of those that are going on."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import ExitStack
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from syncbn.study.plan.alike import sentence
from syncbn.study.run.jobs import Job
from syncbn.study.run.news import News
from syncbn.study.run.status import Outcome

REFRESHES = 1.0
"""Redrawings of the table per second: few, as the runs need the processor."""


class _Running(NamedTuple):
    label: str
    began: float
    news: News


class Display:
    """Shows how many runs have ended, which ones are going on and about how long the rest takes. A context manager."""

    def __init__(self, quiet: bool = False, part: str = "test") -> None:
        """``part``: of the data that a run's score is of; empty if it is of none."""
        self.console = Console(quiet=quiet)
        self.part = part
        self.total = self.done = 0
        self.workers = 1
        self._running: dict[str, _Running] = {}
        self._seconds: list[float] = []
        self._announced: set[str] = set()
        self._failed: dict[str, str] = {}  # the first run that failed with each sentence
        self._opened = ExitStack()

    def __enter__(self) -> Display:
        if not self.console.quiet and sys.stdout.isatty():
            # A run in this process sends what it prints to its log; the table stays on the terminal.
            terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding)
            self.console = Console(file=self._opened.enter_context(terminal))
            columns = (TextColumn("runs"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
            left = TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, left, console=self.console, auto_refresh=False)
            self._bar.add_task("", total=None)
            shown = Live(
                console=self.console,
                get_renderable=self._table,
                refresh_per_second=REFRESHES,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._opened.enter_context(shown)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()  # also after Ctrl-C: the table goes, and the cursor comes back

    def start(self, *, total: int, done: int, workers: int) -> None:
        """``total`` runs, of which ``done`` ended before; ``workers`` of the others run side by side."""
        self.total, self.done, self.workers = total, done, workers
        before = f"{done} of them done before, " if done else ""
        side = f"{workers} side by side" if workers > 1 else "one at a time"
        self._print(f"{total} runs: {before}{total - done} to do" + (f", {side}" if done < total else ""))

    def began(self, job: Job) -> None:
        self._running[job.key] = _Running(job.label, time.monotonic(), News(job))

    def waiting(self, job: Job, stopped: str = "") -> None:
        """Another study run is working on this cell, or it was ``stopped``."""
        self._running.pop(job.key, None)
        if stopped:
            self._print(f"{job.label}: {stopped}")
        elif job.key not in self._announced:
            self._announced.add(job.key)
            self._print(f"{job.label}: another study run is working on it; waiting for its result")

    def ended(self, outcome: Outcome) -> None:
        self.done += 1
        result, run = outcome.result, self._running.pop(outcome.job.key, None)
        if outcome.ran and run is not None:
            self._seconds.append(time.monotonic() - run.began)
        if result is None:
            label = outcome.job.label
            first = self._failed.setdefault(sentence(outcome.message, outcome.job.key), label)
            news = f"failed: {outcome.message}" if first == label else f"failed like {first}"
        elif math.isnan(result.score):
            news = f"diverged after {result.steps} steps"
        else:
            # A run of the tuning says what it is chosen by.
            part = self.part
            score: float | None = result.score
            if outcome.job.cell.tuning and result.validation is not None:
                part, score = "validation", result.validation[result.metric.name]
            shown = "unknown" if score is None else result.metric.shown(score)
            news = f"{part} {result.metric.name} {shown}, {duration(result.seconds)}".lstrip()
        width = len(str(self.total))
        left = self._left()
        self._print(f"[{self.done:{width}}/{self.total}] {outcome.job.label}: {news}" + (f"; {left}" if left else ""))

    def _table(self) -> Group:
        """A row for each run that is going on, as many as the terminal has room for, and the bar below them."""
        rows = Table.grid(padding=(0, 2), pad_edge=False)
        for _ in range(4):
            rows.add_column(no_wrap=True, overflow="ellipsis")
        running = list(self._running.values())  # the runs begin and end in another thread
        room = max(1, self.console.height - 4)
        for run in running[:room]:
            run.news.look()
            words = (run.label, duration(time.monotonic() - run.began), run.news.place, run.news.metric)
            rows.add_row(*map(Text, words))
        if len(running) > room:
            rows.add_row(Text(f"and {len(running) - room} more"))
        waits = "" if running or self.done == self.total else "waiting"
        self._bar.update(
            self._bar.task_ids[0], completed=self.done, total=self.total or None, description=self._left() or waits
        )
        return Group(rows, self._bar.get_renderable())

    def _left(self) -> str:
        """About how long the rest takes, from the mean over the runs so far; empty before the first has ended."""
        remaining = self.total - self.done
        if not self._seconds or not remaining:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        now = time.monotonic()
        begun = sum(min(now - run.began, mean) for run in list(self._running.values()))
        return f"about {duration((mean * remaining - begun) / min(self.workers, remaining))} left"

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``seconds`` in words, such as 0.4 s, 24 s, 3 min, 1.5 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
