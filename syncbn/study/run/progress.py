"""Progress of a study: a live bar on a terminal, and one line for each run that ends."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from syncbn.study.run.jobs import Job
from syncbn.study.run.status import Outcome


class Display:
    """Shows how many runs have ended, which ones are running and about how long the rest takes. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self.total = self.done = 0
        self.workers = 1
        self._running: dict[str, tuple[str, float]] = {}
        self._seconds: list[float] = []
        self._announced: set[str] = set()
        columns = (TextColumn("cells"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
        labels = TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, labels, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, *, total: int, done: int, workers: int) -> None:
        """``total`` runs, of which ``done`` ended before; ``workers`` of the others run side by side."""
        self.total, self.done, self.workers = total, done, workers
        before = f"{done} of them done before, " if done else ""
        side = f"{workers} side by side" if workers > 1 else "one at a time"
        self._print(f"{total} runs: {before}{total - done} to do" + (f", {side}" if done < total else ""))
        self.tick()

    def began(self, job: Job) -> None:
        self._running[job.key] = (job.label, time.monotonic())

    def waiting(self, job: Job) -> None:
        """Another study run is working on this cell."""
        self._running.pop(job.key, None)
        if job.key not in self._announced:
            self._announced.add(job.key)
            self._print(f"{job.label}: another study run is working on it; waiting for its result")

    def ended(self, outcome: Outcome) -> None:
        self.done += 1
        key, result = outcome.job.key, outcome.result
        _, began = self._running.pop(key, ("", time.monotonic()))
        if outcome.ran:
            self._seconds.append(time.monotonic() - began)
        if result is None:
            news = f"failed: {outcome.message}"
        elif math.isnan(result.score):
            news = f"diverged after {result.steps} steps"
        else:
            # A run of the tuning says what it is chosen by.
            part: str = "test"
            score: float | None = result.score
            if outcome.job.cell.tuning and result.validation is not None:
                part, score = "validation", result.validation[result.metric.name]
            shown = "unknown" if score is None else result.metric.shown(score)
            news = f"{part} {result.metric.name} {shown}, {duration(result.seconds)}"
        width = len(str(self.total))
        left = self._left()
        self._print(f"[{self.done:{width}}/{self.total}] {outcome.job.label}: {news}" + (f"; {left}" if left else ""))

    def tick(self) -> None:
        labels = " | ".join(label for label, _ in self._running.values()) or "waiting"
        left = self._left()
        description = labels + (f"; {left}" if left else "") if self.done < self.total else "done"
        self._bar.update(self._task, completed=self.done, total=self.total, description=description)

    def _left(self) -> str:
        """About how long the rest takes, from the mean over the runs so far; empty before the first has ended."""
        remaining = self.total - self.done
        if not self._seconds or not remaining:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        now = time.monotonic()
        begun = sum(min(now - began, mean) for _, began in self._running.values())
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
