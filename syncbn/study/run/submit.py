"""Handing a study's cells to a cluster, through submitit: each cell is a job, and asks the records itself.

A job holds the cell's lock while it works, so jobs may run beside a pool, or beside the jobs of a study run that was
killed. The study's folder has to lie where all machines see it, on a file system whose locks (flock) hold between them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from syncbn.study.run.records import Records
from syncbn.study.run.worker import (
    STOP_SECONDS,
    Event,
    Events,
    Job,
    Reply,
    Trainer,
    attempt,
    forget_launcher,
    is_held,
    last_error,
    note_failure,
    output_to,
)
from syncbn.train.config import ConfigError
from syncbn.train.launch import LaunchError

FOLDER = "submitted"
POLL_SECONDS = {"slurm": 5.0, "local": 0.5}
"""Time between two looks at the jobs' results."""
QUEUE_SECONDS = 20.0
"""Time between two questions to Slurm about what is still in its queue."""
GRACE_SECONDS = 30.0
"""How long a job may be gone from the queue before its result has to be seen: shared file systems take a while."""
RETRY_SECONDS = 1.0
"""Time between two looks at a cell that another study run holds."""
TIMEOUT_MINUTES = 240
"""Limit of a job, unless the options set one; a job that reaches it is put back into the queue and goes on there."""
REQUEUES = 20
"""How often a job may reach its limit."""
_GENERIC = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")


class CellRun:
    """What a job of the cluster does, as it is pickled for it."""

    def __init__(self, trainer: Trainer, out: Path) -> None:
        self.trainer = trainer
        self.out = out

    def __call__(self, job: Job) -> Reply:
        """Do one of the study's jobs, in a process of its own."""
        import torch

        forget_launcher()
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
        return attempt(job, self.trainer, Records(self.out))

    def checkpoint(self, job: Job) -> Any:
        """What is put back into the queue when the time is up: the same again, which goes on from its checkpoint."""
        return import_submitit().helpers.DelayedSubmission(self, job)


@dataclass(kw_only=True)
class _Handle:
    """A submitted job."""

    job: Job
    submitted: Any
    """submitit's side of it."""
    log_size: int
    """Size of the log before it: it grows when the job begins."""
    begun: bool = False
    gone_at: float | None = None
    """When it was first seen to be gone, by :func:`time.monotonic`."""


@dataclass(kw_only=True)
class _Cluster:
    """Jobs at submitit, and those that wait to be handed over."""

    kind: Literal["slurm", "local"]
    executor: Any
    size: int
    """Jobs at one time."""
    trainer: Trainer
    out: Path
    queue: deque[Job]
    active: list[_Handle] = field(default_factory=list)
    retry_at: dict[str, float] = field(default_factory=dict)
    asked_at: float = float("-inf")

    def submit(self) -> None:
        """Hand over what may go now: to Slurm everything as one array, which keeps to its own limit."""
        ready = [job for job in self.queue if time.monotonic() >= self.retry_at.get(job.id, 0.0)]
        # What came back as busy is no part of the array, and has to keep to the limit here.
        ready = ready if self.kind == "slurm" and not self.retry_at else ready[: max(self.size - len(self.active), 0)]
        if not ready:
            return
        try:
            with output_to(self.out / "logs" / "submit.log"):  # local jobs keep the terminal they inherit
                submitted = self.executor.map_array(CellRun(self.trainer, self.out), ready)
        except (RuntimeError, OSError) as error:
            raise LaunchError(f"{self.kind} did not take the jobs: {' '.join(str(error).split())}") from error
        for job, handle in zip(ready, submitted, strict=True):
            self.queue.remove(job)
            self.active.append(_Handle(job=job, submitted=handle, log_size=_size(job.log)))

    def begun(self) -> list[Job]:
        """Jobs that were begun since the last call."""
        found = [handle for handle in self.active if not handle.begun and _size(handle.job.log) != handle.log_size]
        for handle in found:
            handle.begun = True
        return [handle.job for handle in found]

    def replies(self) -> list[tuple[Job, Reply]]:
        """The jobs that are over; one that ended without a reply, however that came, has failed."""
        self._look_at_queue()
        over = []
        for handle in list(self.active):
            reply = _reply(handle, GRACE_SECONDS if self.kind == "slurm" else 1.0)
            if reply is not None:
                self.active.remove(handle)
                over.append((handle.job, reply))
        return over

    def put_back(self, job: Job) -> None:
        """Try a job again later: another study run is at it."""
        self.retry_at[job.id] = time.monotonic() + RETRY_SECONDS
        self.queue.append(job)

    def settled(self, records: Records) -> list[Job]:
        """Jobs that another study run was at and has done; those that it still is at are left alone for a while."""
        waiting = [job for job in self.queue if job.id in self.retry_at]
        if waiting:
            records.refresh()
        done = [job for job in waiting if records.get(job.id) is not None]
        for job in waiting:
            if job in done:
                self.queue.remove(job)
            elif is_held(job.lock) or is_held(job.directory / ".lock"):
                self.retry_at[job.id] = time.monotonic() + RETRY_SECONDS
        return done

    def stop(self) -> None:
        """Cancel what is going on, and wait for processes of this machine to end."""
        if self.kind == "slurm" and self.active:
            ids = [handle.submitted.job_id for handle in self.active]
            subprocess.run(["scancel", *ids], capture_output=True, timeout=60, check=False)
            return
        for handle in self.active:
            handle.submitted.cancel(check=False)
        deadline = time.monotonic() + STOP_SECONDS
        while not all(handle.submitted.done() for handle in self.active) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _look_at_queue(self) -> None:
        """Note which jobs are gone. submitit asks Slurm's accounting, which not every cluster keeps."""
        if self.kind == "local":
            gone = [handle for handle in self.active if handle.submitted.done()]
        elif time.monotonic() - self.asked_at < QUEUE_SECONDS:
            return
        else:
            self.asked_at = time.monotonic()
            queued = _queued({handle.submitted.job_id.split("_")[0] for handle in self.active})
            gone = [] if queued is None else [h for h in self.active if h.submitted.job_id not in queued]
        for handle in self.active:
            if handle not in gone:
                handle.gone_at = None
            elif handle.gone_at is None:
                handle.gone_at = time.monotonic()


def submitted_events(
    jobs: Sequence[Job],
    size: int,
    trainer: Trainer,
    out: Path,
    kind: Literal["slurm", "local"],
    options: Mapping[str, Any],
) -> Events:
    """Do the jobs on a cluster, at most ``size`` at a time.

    Args:
        jobs: what is to be done.
        size: jobs at one time.
        trainer: what does the runs.
        out: the study's folder, on a file system that all machines see.
        kind: ``slurm``, or ``local`` for processes of this machine that submitit watches over, which see as many GPUs
            as the option ``gpus_per_node`` says.
        options: submitit's parameters of a job; Slurm's own may be named without the ``slurm_`` before them.

    Returns:
        What happens. When it is closed, jobs that are not over are cancelled.

    Raises:
        ConfigError: an option that submitit does not know, or no Slurm here.
        ImportError: submitit is not installed.
        LaunchError: Slurm did not take the jobs.
    """
    # Here, not at the first event: a mistake is found before anything is shown.
    executor = _executor(out, kind, size, options)
    # A cluster's jobs start in a folder of their own.
    whole = [_absolute(job) for job in jobs]
    cluster = _Cluster(kind=kind, executor=executor, size=size, trainer=trainer, out=out.absolute(), queue=deque(whole))
    return _events(cluster, {job.id: job for job in jobs})


def _events(cluster: _Cluster, given: Mapping[str, Job]) -> Events:
    records = Records(cluster.out)
    try:
        while cluster.queue or cluster.active:
            for job in cluster.settled(records):
                yield Event(given[job.id], Reply(status="kept"))
            cluster.submit()
            for job in cluster.begun():
                yield Event(given[job.id])
            for job, reply in cluster.replies():
                if reply.status == "busy":
                    cluster.put_back(job)
                yield Event(given[job.id], reply)
            yield None
            if cluster.active or cluster.queue:
                time.sleep(POLL_SECONDS[cluster.kind])
    finally:
        cluster.stop()


def import_submitit() -> Any:
    """submitit, which is an optional requirement. Raises ImportError."""
    try:
        import submitit
    except ImportError:
        raise ImportError("submitit is not installed; pip install 'syncbn[slurm]'") from None
    return submitit


def _executor(out: Path, kind: Literal["slurm", "local"], size: int, options: Mapping[str, Any]) -> Any:
    submitit = import_submitit()
    if kind == "slurm" and shutil.which("srun") is None:
        raise ConfigError("executor", kind, "pool or local, as this machine has no Slurm (srun was not found)")
    for name in ("nodes", "tasks_per_node", "slurm_nodes", "slurm_ntasks_per_node", "ntasks_per_node"):
        if options.get(name, 1) != 1:
            raise ConfigError(f"slurm-options: {name}", options[name], "1, as a cell is run by one process")
    parameters = {"name": "syncbn-study", "timeout_min": TIMEOUT_MINUTES, "slurm_array_parallelism": size}
    known = ("slurm_", "local_")
    parameters |= {k if k in _GENERIC or k.startswith(known) else f"slurm_{k}": v for k, v in options.items()}
    executor = submitit.AutoExecutor(folder=(out / FOLDER).absolute(), cluster=kind, slurm_max_num_timeout=REQUEUES)
    try:
        executor.update_parameters(**parameters)
    except (NameError, AssertionError, ValueError, TypeError) as error:
        expected = f"submitit's parameters ({str(error).splitlines()[0]})"
        raise ConfigError("slurm-options", dict(options), expected) from None
    return executor


def _absolute(job: Job) -> Job:
    return replace(job, directory=job.directory.absolute(), lock=job.lock.absolute(), log=job.log.absolute())


def _reply(handle: _Handle, grace: float) -> Reply | None:
    """What a job answered; a failure if it is gone without an answer, None while it may still come."""
    submitted = handle.submitted
    if submitted.paths.result_pickle.exists():
        error = submitted.exception()
        if error is None:
            reply: Reply = submitted.result()
            return reply
        said = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("---")]
        reason = next((line for line in reversed(said) if "Error" in line), said[0])
        message = f"{reason} (submitit's log: {submitted.paths.stderr})"
    elif handle.gone_at is not None and time.monotonic() - handle.gone_at >= grace:
        last = last_error(handle.job.log) if handle.begun else ""
        state = f" ({submitted.state})" if grace == GRACE_SECONDS and shutil.which("sacct") else ""
        message = f"job {submitted.job_id} ended without an answer{state}{f' after: {last}' if last else ''}"
        message += f" (submitit's log: {submitted.paths.stderr})"
    else:
        return None
    note_failure(handle.job.log, message)
    return Reply(status="failed", message=message)


def _queued(arrays: set[str]) -> set[str] | None:
    """Ids of the jobs of some arrays that Slurm still has in its queue, or runs; None if it does not say."""
    if not arrays:
        return set()
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(sorted(arrays))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return set(done.stdout.split()) if done.returncode == 0 else set()


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0
