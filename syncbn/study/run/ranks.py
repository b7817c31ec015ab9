"""A study under a launcher such as torchrun: all its processes train each cell together, one cell after another.

The first process decides which cells are run, broadcasts each to the others, and keeps locks and records. A process
that fails ends all of them, because the others would wait for it in a collective; started again, the study goes on.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from syncbn.study.run.jobs import Event, Events, Job, TrainFunction, attempt
from syncbn.study.run.logs import error_line, failure, note_failure, output_to
from syncbn.study.run.records import Records
from syncbn.study.run.signals import StudyStopped, stoppable
from syncbn.train import loop
from syncbn.train.config import RunConfig
from syncbn.train.launch import make_process_group
from syncbn.train.stopping import Stopped

FIRST_WORD_SECONDS = 5.0
"""How long the other processes wait before they report a failure, as the first one may have the same to report."""


def launched() -> bool:
    """Whether this is one of several processes of a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group() -> Iterator[int]:
    """Join the launcher's other processes; yields the rank of this one."""
    make_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield dist.get_rank()
    dist.destroy_process_group()  # not after an error, when it may wait for the others forever


def rank_events(jobs: Sequence[Job], train: TrainFunction) -> Events:
    """Do the jobs on all processes; for the first one, while the others :func:`follow`."""
    records = Records(jobs[0].out)
    # Cells that failed before come last: a failure ends the run, and must not keep the other cells from being run.
    for job in sorted(jobs, key=lambda job: failure(job.log) is not None):

        def train_on_all(config: RunConfig, folder: Path, resume: bool, job: Job = job) -> None:
            config.check_processes(dist.get_world_size())  # fails this cell alone, as the others do not know of it yet
            share(job)
            _train(job, train)

        yield Event(job, "running")
        yield attempt(job, train_on_all, records)


def follow(train: TrainFunction = loop.train) -> None:
    """Take part in every run of the first process, until it shares None."""
    while (job := share(None)) is not None:
        with output_to(job.log):
            _train(job, train)


def share(job: Job | None) -> Job | None:
    """The first process's job, on every process."""
    shared = [job]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _train(job: Job, train: TrainFunction) -> None:
    """Train a cell together with the others; an error ends this process with one line."""
    try:
        stoppable(train)(job.cell.config, job.directory, resume=True)
    except Stopped as error:  # all of them
        print(error)
        raise StudyStopped(error.cause) from None
    except Exception as error:  # whatever it is, the others cannot go on
        traceback.print_exc()
        if dist.get_rank():
            time.sleep(FIRST_WORD_SECONDS)
        if failure(job.log) is not None:
            sys.exit(1)  # another process has reported a failure, which broke a collective of this one
        message = f"process {dist.get_rank()}: {error_line(error)}"
        note_failure(job.log, message)
        sys.exit(f"syncbn: error: {job.label}: {message}; run the study again to go on with its other cells")
