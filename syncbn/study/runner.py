"""Runs the cells of a study that have no result yet, several side by side; killed at any point, it goes on from there.

Layout of a study's directory::

    runs/KEY/            what the trainer writes for a cell: config.yaml, metrics.jsonl, result.json, checkpoint/
    distributed/KEY-N/   the same for the cell repeated under N processes
    locks/ID.lock        held while a process works on that job, so that no two do
    logs/ID.log          what the run printed, and its traceback if it failed
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from syncbn.study.plan import Cell, RepeatDistributed, Study
from syncbn.study.progress import Display
from syncbn.study.worker import STOP_SECONDS, Job, Reply, Trainer, last_error, load_record, worker_main

if TYPE_CHECKING:
    from syncbn.train.result import RunResult

POLL_SECONDS = 0.5
"""Longest time between two looks at the workers, which is also how often the display moves."""
RETRY_SECONDS = 1.0
"""Time between two attempts at a cell that another study run holds."""
DISTRIBUTED_TIMEOUT = 3600.0
"""Seconds that the repeat under real processes may take."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one job of this study run."""

    job: Job
    status: Literal["ran", "kept", "failed"]
    """Run now, found done (before, or by another study run meanwhile), or failed."""
    message: str = ""
    """Why it failed, in one line."""
    result: RunResult | None = None
    """The record, unless it failed. A diverged run has one."""


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    out: Path,
    *,
    workers: int | None = None,
    trainer: Trainer | None = None,
    display: Display | None = None,
) -> dict[str, Outcome]:
    """Run the cells that have no result yet, and the study's repeat under real processes after them.

    Several calls on one directory share the work: each cell is run once, and every call ends with all results.

    Args:
        study: the study; its ``repeat_distributed`` is run too.
        cells: its cells; cells of one key are one run.
        out: the study's directory, made if need be.
        workers: processes side by side; by default one for each core, and no more than there are runs to do.
        trainer: what does the runs, by default the package's own.
        display: shows the progress.

    Returns:
        One outcome for each cell's key, and one for the repeat's :func:`repeat_id`. A failure is an outcome.

    Raises:
        KeyboardInterrupt: after the workers have been stopped; what was done is kept.
    """
    unique: dict[str, Cell] = {}
    for cell in cells:
        unique.setdefault(cell.key, cell)
    jobs = [_cell_job(cell, out) for cell in unique.values()]
    if study.repeat_distributed is not None:
        jobs.append(_repeat_job(study.repeat_distributed, cells, out))
    outcomes = {}
    missing = []
    for job in jobs:
        result = load_record(job.directory)
        if result is None:
            missing.append(job)
        else:
            outcomes[job.id] = Outcome(job=job, status="kept", result=result)
    side_by_side = workers if workers is not None else len(os.sched_getaffinity(0))
    side_by_side = max(1, min(side_by_side, sum(job.processes is None for job in missing)))
    with display or Display() as shown:
        shown.start(total=len(jobs), done=len(outcomes), workers=side_by_side)
        if missing:
            outcomes |= _run_jobs(missing, side_by_side, trainer or Trainer(), shown)
    return {job.id: outcomes[job.id] for job in jobs}


def repeat_id(repeat: RepeatDistributed, cells: Sequence[Cell]) -> str:
    """Name of the repeat under real processes: the key of the cell it repeats, and the number of processes."""
    return f"{_repeated_cell(repeat, cells).key}-{repeat.processes}"


def _cell_job(cell: Cell, out: Path) -> Job:
    return Job(
        id=cell.key,
        label=f"{cell.arm}, seed {cell.seed}",
        config=cell.config,
        directory=out / "runs" / cell.key,
        lock=out / "locks" / f"{cell.key}.lock",
        log=out / "logs" / f"{cell.key}.log",
    )


def _repeat_job(repeat: RepeatDistributed, cells: Sequence[Cell], out: Path) -> Job:
    cell = _repeated_cell(repeat, cells)
    name = repeat_id(repeat, cells)
    return Job(
        id=name,
        label=f"{cell.arm}, seed {cell.seed}, on {repeat.processes} processes",
        config=cell.config,
        directory=out / "distributed" / name,
        lock=out / "locks" / f"{name}.lock",
        log=out / "logs" / f"{name}.log",
        processes=repeat.processes,
        timeout=DISTRIBUTED_TIMEOUT,
    )


def _repeated_cell(repeat: RepeatDistributed, cells: Sequence[Cell]) -> Cell:
    return next(cell for cell in cells if (cell.arm, cell.seed) == (repeat.arm, repeat.seed))


def _run_jobs(jobs: list[Job], workers: int, trainer: Trainer, display: Display) -> dict[str, Outcome]:
    """Every job's outcome by id, from a pool of ``workers`` processes that is gone when this returns or raises."""
    outcomes: dict[str, Outcome] = {}
    pool = _Pool(trainer=trainer, size=workers, queue=deque(jobs))
    finished = False
    try:
        while pool.queue or pool.busy():
            for job in pool.assign():
                display.began(job.id, job.label)
            for job, reply in pool.replies(POLL_SECONDS):
                if reply.status == "busy":
                    pool.put_back(job)
                    display.waiting(job.id, job.label)
                    continue
                outcome = _outcome(job, reply)
                outcomes[job.id] = outcome
                display.ended(job.id, job.label, outcome.result, outcome.message, timed=outcome.status == "ran")
            display.tick()
        finished = True
    finally:
        pool.stop(grace=STOP_SECONDS if finished else None)
    return outcomes


def _outcome(job: Job, reply: Reply) -> Outcome:
    result = load_record(job.directory)
    if reply.status in ("ran", "kept") and result is not None:
        return Outcome(job=job, status="ran" if reply.status == "ran" else "kept", result=result)
    return Outcome(job=job, status="failed", message=reply.message or "the record is gone")


@dataclass(kw_only=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job | None = None


@dataclass(kw_only=True)
class _Pool:
    """Worker processes that outlive their jobs, and the jobs that wait for one.

    Not a ``ProcessPoolExecutor``: there, one worker that dies takes all pending jobs with it.
    """

    trainer: Trainer
    size: int
    queue: deque[Job]
    workers: list[_Worker] = field(default_factory=list)
    retry_at: dict[str, float] = field(default_factory=dict)
    context: SpawnContext = field(default_factory=lambda: multiprocessing.get_context("spawn"))

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def assign(self) -> list[Job]:
        """Hand waiting jobs to idle workers, which are started as they are needed; returns the jobs handed out."""
        assigned = []
        for job in list(self.queue):
            busy = self.busy()
            # A launched job has processes of its own: beside others, neither speed would mean anything.
            alone = job.processes is not None
            if len(busy) >= self.size or any(w.job is not None and w.job.processes is not None for w in busy):
                break
            if (alone and busy) or time.monotonic() < self.retry_at.get(job.id, 0.0):
                continue
            worker = next((worker for worker in self.workers if worker.job is None), None) or self._start()
            self.queue.remove(job)
            worker.job = job
            with suppress(OSError):  # if it has just died, `replies` finds and reports that
                worker.connection.send(job)
            assigned.append(job)
        return assigned

    def replies(self, timeout: float) -> Iterator[tuple[Job, Reply]]:
        """The jobs that ended within ``timeout`` seconds; a worker that died is a failure of its job."""
        ready = wait([worker.connection for worker in self.busy()], timeout)
        for worker in [worker for worker in self.workers if worker.connection in ready]:
            job, worker.job = worker.job, None
            assert job is not None
            try:
                reply: Reply = worker.connection.recv()
            except (EOFError, OSError):
                self.workers.remove(worker)
                worker.connection.close()
                worker.process.join(STOP_SECONDS)
                code = worker.process.exitcode
                reply = Reply(status="failed", message=_death(code, last_error(job.log)))
            yield job, reply

    def put_back(self, job: Job) -> None:
        """Try a job again later: another study run is at it."""
        self.retry_at[job.id] = time.monotonic() + RETRY_SECONDS
        self.queue.append(job)

    def stop(self, grace: float | None) -> None:
        """End the workers: idle ones within ``grace`` seconds by themselves; with None, at once in mid-job."""
        for worker in self.workers:
            worker.connection.close()  # an idle worker's signal to end
            if grace is None:
                worker.process.terminate()
        deadline = time.monotonic() + (STOP_SECONDS if grace is None else grace)
        for worker in self.workers:
            worker.process.join(max(deadline - time.monotonic(), 0.0))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()

    def _start(self) -> _Worker:
        here, there = self.context.Pipe()
        process = self.context.Process(target=worker_main, args=(there, self.trainer), name="syncbn study worker")
        with _interrupts_ignored():
            process.start()
        there.close()  # else the end of the worker would not close the pipe
        self.workers.append(_Worker(process=process, connection=here))
        return self.workers[-1]


def _death(code: int | None, last: str) -> str:
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return f"the worker process died ({how})" + (f" after: {last}" if last else "")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start a process that ignores Ctrl-C from its first instruction on (a child inherits what is ignored)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
