"""A study under a launcher: its cells are run one after another by all processes together.

The first process decides what is to be done, and holds the locks and the records; it tells the others through the
launcher's store, which outlives a failed run's process group and never times out while they wait. One process group
serves all cells, until a cell fails: what the processes had still to exchange would be taken for the next cell's, so
they make a new one.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from syncbn.study.run.records import Records
from syncbn.study.run.worker import Event, Events, Job, Trainer, attempt, failure, note_failure, output_to
from syncbn.train.config import RunConfig

RETRY_SECONDS = 1.0
"""Time between two attempts at a cell that another study run holds."""
ALONE_SECONDS = 60.0
"""How long a process that failed waits for the others to fail too, before it ends: they wait for it in a collective."""
_LOOK = timedelta(seconds=10)


def launched() -> bool:
    """Whether this is one of several processes of a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class _Task:
    """What the first process tells the others to do."""

    config: RunConfig
    out: Path | None
    log: Path
    label: str


class Ranks:
    """The processes of a launcher, as one of them; a context manager."""

    def __init__(self, trainer: Trainer | None = None) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        store, self.rank, self.size = next(iter(rendezvous("env://")))
        self._store = dist.PrefixStore("syncbn study", store)  # type: ignore[attr-defined]
        self._trainer = trainer or Trainer()
        self._tasks = self._worlds = 0
        self._job: Job | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave_world()

    def events(self, jobs: Sequence[Job], out: Path) -> Events:
        """Do the jobs on all processes; on the first one, while the others :meth:`follow`.

        Cells that failed in an earlier run of the study come last: one whose failure ends the processes, as a single
        one of them met it, must not keep all others from being run.
        """
        records = Records(out)
        together = Trainer(train=self._train_together, launch=self._trainer.launch)
        queue = deque(sorted(jobs, key=lambda job: (job.processes is not None, failure(job.log) is not None)))
        try:
            while queue:
                job = self._job = queue.popleft()
                yield Event(job)
                reply = attempt(job, together, records)
                if reply.status == "busy":
                    queue.append(job)
                    time.sleep(RETRY_SECONDS)
                yield Event(job, reply)
        finally:
            self._tell(None)

    def follow(self) -> None:
        """Take part in every run of the first process, until it has no more; on all other processes."""
        while (task := self._hear()) is not None:
            with output_to(task.log):
                self._take_part(task)

    def _train_together(self, config: RunConfig, out: Path | None = None, *, resume: bool = False) -> None:
        """Train on all processes; the trainer of the first one."""
        assert self._job is not None
        assert resume
        config.check_processes(self.size)  # a mistake that needs no others to be found
        task = _Task(config, out, self._job.log, self._job.label)
        self._tell(task)
        errors = self._take_part(task)
        for rank, error in enumerate(errors):
            if error is not None and rank != self.rank:
                raise RuntimeError(f"process {rank}: {error}")

    def _take_part(self, task: _Task) -> list[str | None]:
        """Do a task together with the others; returns what went wrong on each process.

        Raises:
            Exception: what went wrong on this one.
        """
        from syncbn.train.loop import train

        own: Exception | None = None
        try:
            self._join_world()
            (self._trainer.train or train)(task.config, task.out, resume=True)
        except Exception as error:  # whatever it is, the others have to know
            own = error
            if self.rank:
                traceback.print_exc()
        errors = self._agree(None if own is None else f"{type(own).__name__}: {own}".splitlines()[0], task)
        if any(errors):
            self._leave_world()
        if own is not None and self.rank == 0:
            raise own
        return errors

    def _tell(self, task: _Task | None) -> None:
        self._tasks += 1
        self._store.set(f"task {self._tasks}", pickle.dumps(task))  # type: ignore[arg-type]  # bytes, too

    def _hear(self) -> _Task | None:
        self._tasks += 1
        found: _Task | None = pickle.loads(self._get(f"task {self._tasks}", None))
        return found

    def _agree(self, error: str | None, task: _Task) -> list[str | None]:
        """Every process's error. A process that failed alone ends here, and with it, by the launcher, the others."""
        self._store.set(f"end {self._tasks} {self.rank}", json.dumps(error))
        deadline = None if error is None else time.monotonic() + ALONE_SECONDS
        try:
            return [json.loads(self._get(f"end {self._tasks} {rank}", deadline)) for rank in range(self.size)]
        except TimeoutError:
            message = f"process {self.rank} failed alone: {error}"
            note_failure(task.log, message)
            what = "the others cannot go on without it; started again, the study does its other runs first"
            # No error that the study could go on after: the other processes hang in a collective.
            sys.exit(f"syncbn: error: {task.label}: {message}; {what}")

    def _get(self, key: str, deadline: float | None) -> bytes:
        import torch.distributed as dist

        while True:
            left = _LOOK if deadline is None else min(_LOOK, timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
            try:
                self._store.wait([key], left)
            except dist.DistStoreError:
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(key) from None
                continue
            value: bytes = self._store.get(key)
            return value

    def _join_world(self) -> None:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            self._worlds += 1
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=dist.PrefixStore(f"world {self._worlds}", self._store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.size,
            )

    def _leave_world(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            with suppress(RuntimeError):  # after a failure it may be in any state
                dist.destroy_process_group()
