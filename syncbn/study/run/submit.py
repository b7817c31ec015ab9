"""Running a study's cells on a cluster through submitit: each cell is a job, which locks, trains and records it.

The study's folder has to be on a file system that all machines see and whose locks (flock) hold between them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from syncbn.study.run.jobs import Event, Events, Job, TrainFunction, attempt
from syncbn.study.run.logs import note_failure, output_to
from syncbn.study.run.pool import use_threads
from syncbn.study.run.records import Records
from syncbn.train.config import ConfigError
from syncbn.train.launch_error import LaunchError

POLL_SECONDS = {"slurm": 5.0, "local": 0.5}
"""Time between two looks at the jobs' results."""
QUEUE_SECONDS = 20.0
"""Time between two looks at Slurm's queue."""
GRACE_SECONDS = 30.0
"""How long to wait for the result of a job that has left the queue: shared file systems take a while to show it."""
STOP_SECONDS = 25.0
"""Time that jobs of this machine get to end when they are cancelled."""
TIMEOUT_MINUTES = 240
"""Default time limit of a job. A job that reaches its limit is queued again and goes on from its checkpoint."""
REQUEUES = 20
"""How often a job may reach its limit."""
_GENERIC = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")


@dataclass
class CellRun:
    """What a job of the cluster does, as submitit pickles it."""

    train: TrainFunction

    def __call__(self, job: Job) -> Event:
        use_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
        return attempt(job, self.train, Records(job.out))

    def checkpoint(self, job: Job) -> Any:
        """What submitit queues when the time is up: the same again, which goes on from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


@dataclass(kw_only=True)
class _Handle:
    """A submitted job."""

    job: Job
    submitted: Any
    """submitit's object for it."""
    log_size: int
    """Size of the log before submission; the log grows when the job begins."""
    begun: bool = False
    gone_at: float | None = None
    """When it was first seen to have left the queue, by :func:`time.monotonic`."""


def submitted_events(
    jobs: Sequence[Job], size: int, train: TrainFunction, kind: str, options: Mapping[str, Any]
) -> Events:
    """Do the jobs on a cluster, at most ``size`` at a time; closing the events cancels the jobs that have not ended.

    ``local`` is processes of this machine that submitit starts, which see as many GPUs as the option ``gpus_per_node``
    says. ``options`` are submitit's parameters of a job; Slurm's own can be named without the prefix ``slurm_``.
    Raises a ConfigError for a wrong option or a machine without Slurm, and a LaunchError if Slurm refuses the jobs.
    """
    jobs = [replace(job, out=job.out.absolute()) for job in jobs]  # a cluster's jobs start in a folder of their own
    return _events(jobs, _executor(jobs[0].out, kind, size, options), CellRun(train), size, kind)


def _events(queue: list[Job], executor: Any, run: CellRun, size: int, kind: str) -> Events:
    active: list[_Handle] = []
    asked = float("-inf")
    try:
        while queue or active:
            # Slurm gets all jobs as one array, which keeps to its own limit.
            free = len(queue) if kind == "slurm" else size - len(active)
            ready, queue = queue[:free], queue[free:]
            active += _submit(executor, run, ready, kind) if ready else []
            if kind == "local" or time.monotonic() - asked >= QUEUE_SECONDS:
                asked = time.monotonic()
                _look_at_queue(active, kind)
            for handle in list(active):
                if not handle.begun and _size(handle.job.log) != handle.log_size:
                    handle.begun = True
                    yield Event(handle.job, "running")
                if (event := _ended(handle, kind)) is not None:
                    active.remove(handle)
                    yield event
            yield None
            time.sleep(POLL_SECONDS[kind])
    finally:
        _cancel(active, kind)


def _submit(executor: Any, run: CellRun, jobs: list[Job], kind: str) -> list[_Handle]:
    sizes = [_size(job.log) for job in jobs]
    try:
        with output_to(jobs[0].out / "logs" / "submit.log"):  # local jobs write to the terminal that they inherit
            submitted = executor.map_array(run, jobs)
    except (RuntimeError, OSError) as error:
        raise LaunchError(f"{kind} did not take the jobs: {' '.join(str(error).split())}") from error
    return [_Handle(job=j, submitted=s, log_size=n) for j, s, n in zip(jobs, submitted, sizes, strict=True)]


def _look_at_queue(active: list[_Handle], kind: str) -> None:
    """Note which jobs have left the queue. (submitit asks Slurm's accounting, which not every cluster keeps.)"""
    queued = _queued({handle.submitted.job_id.split("_")[0] for handle in active}) if kind == "slurm" else None
    for handle in active:
        if kind == "slurm":
            gone = queued is not None and handle.submitted.job_id not in queued
        else:
            gone = handle.submitted.done()
        handle.gone_at = (handle.gone_at or time.monotonic()) if gone else None


def _queued(arrays: set[str]) -> set[str] | None:
    """Ids of the jobs of some arrays that wait or run in Slurm; None if Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(sorted(arrays))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return set(done.stdout.split()) if done.returncode == 0 else set()


def _ended(handle: _Handle, kind: str) -> Event | None:
    """How a job ended; it has failed if it is gone without a result. None while a result may still come."""
    submitted = handle.submitted
    grace = GRACE_SECONDS if kind == "slurm" else 1.0
    if submitted.paths.result_pickle.exists():
        error = submitted.exception()
        if error is None:
            event: Event = submitted.result()
            return event
        said = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("---")]
        message = next((line for line in reversed(said) if "Error" in line), said[0])
    elif handle.gone_at is not None and time.monotonic() - handle.gone_at >= grace:
        state = f" ({submitted.state})" if kind == "slurm" and shutil.which("sacct") else ""
        message = f"job {submitted.job_id} ended without an answer{state}"
    else:
        return None
    message += f" (submitit's log: {submitted.paths.stderr})"
    note_failure(handle.job.log, message)
    return Event(handle.job, "failed", message)


def _cancel(active: list[_Handle], kind: str) -> None:
    """Cancel what has not ended; processes of this machine are waited for."""
    if kind == "slurm":
        if active:
            ids = [handle.submitted.job_id for handle in active]
            subprocess.run(["scancel", *ids], capture_output=True, timeout=60, check=False)
        return
    for handle in active:
        handle.submitted.cancel(check=False)
    deadline = time.monotonic() + STOP_SECONDS
    while not all(handle.submitted.done() for handle in active) and time.monotonic() < deadline:
        time.sleep(0.1)


def _executor(out: Path, kind: str, size: int, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise ImportError("submitit is not installed; pip install 'syncbn[slurm]'") from None
    if kind == "slurm" and shutil.which("srun") is None:
        raise ConfigError("executor", kind, "pool or local, as this machine has no Slurm (srun was not found)")
    for name in ("nodes", "tasks_per_node", "slurm_nodes", "slurm_ntasks_per_node", "ntasks_per_node"):
        if options.get(name, 1) != 1:
            raise ConfigError(f"slurm-options: {name}", options[name], "1, as a cell is run by one process")
    parameters = {"name": "syncbn-study", "timeout_min": TIMEOUT_MINUTES, "slurm_array_parallelism": size}
    known = ("slurm_", "local_")
    parameters |= {k if k in _GENERIC or k.startswith(known) else f"slurm_{k}": v for k, v in options.items()}
    executor = submitit.AutoExecutor(folder=out / "submitted", cluster=kind, slurm_max_num_timeout=REQUEUES)
    try:
        executor.update_parameters(**parameters)
    except (NameError, AssertionError, ValueError, TypeError) as error:
        expected = f"submitit's parameters ({str(error).splitlines()[0]})"
        raise ConfigError("slurm-options", dict(options), expected) from None
    return executor


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
