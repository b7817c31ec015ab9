"""A worker process of a study: it imports torch once and then runs one job after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait

from syncbn.study.run.jobs import Job, TrainFunction, attempt
from syncbn.study.run.records import Records


def worker_main(connection: Connection, train: TrainFunction) -> None:
    """Body of a worker process: answers each :class:`Job` with an :class:`Event`, until the pipe closes."""
    # Ctrl-C reaches all processes of the terminal; the runner acts on it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_threads(1)
    records: Records | None = None
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        records = records or Records(job.out)
        connection.send(attempt(job, train, records))


def use_threads(number: int) -> None:
    """Compute in this number of threads, as one process that belongs to no launcher."""
    import torch

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)


def _end_with_parent() -> None:
    """End this process when the runner ends, even by SIGKILL; the run goes on from its checkpoint next time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
