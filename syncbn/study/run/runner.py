"""Running the cells of a study that have no record yet, several side by side. Killed at any time, it can be repeated.

Several study runs may share a folder: each cell is run once, and every study run waits for the results of the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from syncbn.study.plan.grid import Cell, state_of
from syncbn.study.run.here import here_events
from syncbn.study.run.jobs import Events, Job, TrainFunction, load_result, recorded, study_jobs
from syncbn.study.run.logs import error_line, note_failure
from syncbn.study.run.pool import pool_events
from syncbn.study.run.progress import Display
from syncbn.study.run.ranks import rank_events
from syncbn.study.run.records import Records
from syncbn.study.run.status import Outcome
from syncbn.study.run.stop import different_first, hopeless
from syncbn.study.run.submit import submitted_events
from syncbn.train import loop
from syncbn.train.checkpoint import try_lock

Executor = Literal["pool", "slurm", "local", "here"]
"""Who does the runs: processes of this machine, a Slurm cluster, submitit's stand-in for one, or this process."""
RETRY_SECONDS = 1.0
"""Time between two looks at cells that another study run is working on."""


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    workers: int | None = None,
    train: TrainFunction = loop.train,
    executor: Executor = "pool",
    options: Mapping[str, Any] | None = None,
    together: bool = False,
    progress: bool | Display = True,
) -> dict[str, Outcome]:
    """Run the cells that have no record yet.

    Args:
        workers: runs side by side; by default one per core, or on a Slurm cluster all at once.
        train: what does a run.
        executor, options: who does the runs, and for submitit the parameters of a job.
        together: all processes of a launcher do each run together. This is the first of them, and the others have to
            call :func:`syncbn.study.run.ranks.follow`.
        progress: print what is done, or what prints it.

    Returns:
        One outcome per key. A run that failed is an outcome; records or a result of another version are a ConfigError.
        If the first runs all fail by the same mistake of the user's, the others are left: their state is ``missing``.
    """
    jobs = {job.key: job for job in study_jobs(cells, out)}
    records = Records(out)
    outcomes = {key: outcome for key, job in jobs.items() if (outcome := _settled(job, records))}
    limit = workers or (len(jobs) if executor == "slurm" else len(os.sched_getaffinity(0)))
    side_by_side = 1 if together or executor == "here" else min(limit, len(jobs) - len(outcomes))
    with progress if isinstance(progress, Display) else Display(quiet=not progress) as shown:
        shown.start(total=len(jobs), done=len(outcomes), workers=side_by_side)
        while left := [job for key, job in jobs.items() if key not in outcomes]:
            if free := different_first([job for job in left if not job.held()]):
                size = min(side_by_side, len(free))
                events = _events(free, size, train, "ranks" if together else executor, options or {})
                outcomes |= _collect(events, jobs, records, shown)
                if records.empty and hopeless(outcomes.values(), jobs.values()):
                    return {key: outcomes.get(key) or Outcome(job=job, state="missing") for key, job in jobs.items()}
            else:
                time.sleep(RETRY_SECONDS)
            for job in [job for job in left if job.key not in outcomes]:
                if outcome := _settled(job, records):
                    outcomes[job.key] = outcome
                    shown.ended(outcome)
                else:
                    shown.waiting(job)
    return {key: outcomes[key] for key in jobs}


def _events(jobs: Sequence[Job], size: int, train: TrainFunction, executor: str, options: Mapping[str, Any]) -> Events:
    if executor == "pool":
        return pool_events(jobs, size, train)
    if executor == "here":
        return here_events(jobs, train)
    if executor == "ranks":
        return rank_events(jobs, train)
    return submitted_events(jobs, size, train, executor, options)


def _collect(events: Events, jobs: Mapping[str, Job], records: Records, display: Display) -> dict[str, Outcome]:
    """The outcomes of the jobs that ended, until the others are hopeless; closes ``events``.

    A job that another study run took has none.
    """
    outcomes: dict[str, Outcome] = {}
    with closing(events):
        for event in events:
            if event is None:
                continue
            job = jobs[event.job.key]
            if event.state == "running":
                display.began(job)
                continue
            # A worker that died may have finished its run before.
            outcome = _settled(job, records, ran=event.state != "missing")
            if outcome is None and event.state == "failed":
                outcome = Outcome(job=job, state="failed", message=event.message, mistake=event.mistake)
            if outcome is None:
                display.waiting(job, event.message)
            else:
                outcomes[job.key] = outcome
                display.ended(outcome)
            if records.empty and hopeless(outcomes.values(), jobs.values()):
                break
    return outcomes


def _settled(job: Job, records: Records, ran: bool = False) -> Outcome | None:
    """The outcome of a finished run, which is recorded now if its process was killed before it did so."""
    try:
        records.refresh()
        record = records.get(job.key)
        if record is None and load_result(job.directory) is not None:
            with try_lock(job.lock) as held:
                record = recorded(job, records) if held else None
    except OSError as error:  # a full disk, for one; the other runs go on
        message = error_line(error)
        note_failure(job.log, message)
        return Outcome(job=job, state="failed", message=message)
    return None if record is None else Outcome(job=job, state=state_of(record.result), result=record.result, ran=ran)
