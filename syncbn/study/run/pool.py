"""A pool of worker processes on this machine.

It is not a ``ProcessPoolExecutor``, in which one worker that dies takes all pending jobs with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from syncbn.study.run.jobs import Event, Events, Job, TrainFunction, attempt
from syncbn.study.run.logs import note_failure
from syncbn.study.run.records import Records
from syncbn.study.run.signals import stoppable

POLL_SECONDS = 0.5
"""Longest time between two looks at the workers."""
STOP_SECONDS = 25.0
"""Time a worker gets to end before it is killed."""


@dataclass(kw_only=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job | None = None


def pool_events(jobs: Sequence[Job], size: int, train: TrainFunction) -> Events:
    """Do the jobs in at most ``size`` processes, which have ended when this ends."""
    queue = deque(jobs)
    workers: list[_Worker] = []
    finished = False
    try:
        while queue or any(worker.job for worker in workers):
            while queue and (worker := _idle_worker(workers, size, train)):
                worker.job = queue.popleft()
                with suppress(OSError):  # the worker has just died, which _ended finds
                    worker.connection.send(worker.job)
                yield Event(worker.job, "running")
            yield from _ended(workers)
            yield None
        finished = True
    finally:
        _stop(workers, at_once=not finished)


def use_threads(number: int) -> None:
    """Compute in this number of threads, as one process that belongs to no launcher."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)


def _idle_worker(workers: list[_Worker], size: int, train: TrainFunction) -> _Worker | None:
    idle = next((worker for worker in workers if worker.job is None), None)
    if idle is not None or len(workers) == size:
        return idle
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, train), name="syncbn study worker")
    with _interrupts_ignored():
        process.start()
    there.close()  # otherwise the pipe would stay open when the worker ends
    workers.append(_Worker(process=process, connection=here))
    return workers[-1]


def _ended(workers: list[_Worker]) -> Iterator[Event]:
    """The jobs that end within a moment; the job of a worker that died has failed."""
    ready = wait([worker.connection for worker in workers if worker.job], POLL_SECONDS)
    for worker in [worker for worker in workers if worker.connection in ready]:
        job, worker.job = worker.job, None
        assert job is not None
        try:
            event: Event = worker.connection.recv()
        except (EOFError, OSError):
            workers.remove(worker)
            worker.connection.close()
            worker.process.join(STOP_SECONDS)
            code = worker.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            message = f"the worker process died ({how})"
            note_failure(job.log, message)
            event = Event(job, "failed", message)
        yield event


def _stop(workers: list[_Worker], at_once: bool) -> None:
    for worker in workers:
        worker.connection.close()  # an idle worker ends by this
        if at_once:
            worker.process.terminate()  # by SIGTERM, after which the trainer writes a checkpoint
    for worker in workers:
        worker.process.join(STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started here ignores Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():  # Python sets signals in the main thread alone
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _work(connection: Connection, train: TrainFunction) -> None:
    """Body of a worker process: answers each :class:`Job` with an :class:`Event`, until the pipe closes."""
    # Ctrl-C reaches all processes of the terminal; the runner acts on it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_threads(1)
    train = stoppable(train)
    records: Records | None = None
    with suppress(EOFError, BrokenPipeError):  # the runner wants no more
        while True:
            job: Job = connection.recv()
            records = records or Records(job.out)
            connection.send(attempt(job, train, records))


def _end_with_parent() -> None:
    """End this process when the runner ends, even by SIGKILL; the run goes on from its checkpoint next time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
