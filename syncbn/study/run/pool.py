"""A pool of worker processes on this machine, which outlive their jobs."""

from __future__ import annotations

import multiprocessing
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

from syncbn.study.run.worker import (
    STOP_SECONDS,
    Event,
    Events,
    Job,
    Reply,
    Trainer,
    last_error,
    note_failure,
    worker_main,
)

POLL_SECONDS = 0.5
"""Longest time between two looks at the workers, which is also how often the display moves."""
RETRY_SECONDS = 1.0
"""Time between two attempts at a cell that another study run holds."""


def pool_events(jobs: Sequence[Job], workers: int, trainer: Trainer, out: Path) -> Events:
    """Do the jobs in ``workers`` processes, which are gone when this ends, however it does.

    Yields:
        What happens, and None whenever nothing has for a while.
    """
    pool = _Pool(trainer=trainer, out=out, size=workers, queue=deque(jobs))
    finished = False
    try:
        while pool.queue or pool.busy():
            for job in pool.assign():
                yield Event(job)
            for job, reply in pool.replies(POLL_SECONDS):
                if reply.status == "busy":
                    pool.put_back(job)
                yield Event(job, reply)
            yield None
        finished = True
    finally:
        pool.stop(grace=STOP_SECONDS if finished else None)


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
    out: Path
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
                message = _death(worker.process.exitcode, last_error(job.log))
                note_failure(job.log, message)
                reply = Reply(status="failed", message=message)
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
        process = self.context.Process(
            target=worker_main, args=(there, self.trainer, self.out), name="syncbn study worker"
        )
        with interrupts_ignored():
            process.start()
        there.close()  # else the end of the worker would not close the pipe
        self.workers.append(_Worker(process=process, connection=here))
        return self.workers[-1]


def _death(code: int | None, last: str) -> str:
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return f"the worker process died ({how})" + (f" after: {last}" if last else "")


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Start a process that ignores Ctrl-C from its first instruction on (a child inherits what is ignored)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
