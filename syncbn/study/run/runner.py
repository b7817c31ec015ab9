"""Runs the cells of a study that have no record yet, several side by side; killed at any point, it goes on from there.

Layout of a study's directory::

    records/WORKER.jsonl one line a finished run, in a file for each process that wrote any
    runs/KEY/            what the trainer writes for a cell: config.yaml, metrics.jsonl, result.json, checkpoint/
    distributed/KEY-N/   the same for the cell repeated under N processes
    locks/ID.lock        held while a process works on that job, so that no two do
    logs/ID.log          what the run printed, and its traceback if it failed
    submitted/           what submitit writes, where it hands the jobs out
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from syncbn.study.plan.grid import Cell, RepeatDistributed, Study, cell_to_repeat, unique_cells
from syncbn.study.run.pool import pool_events
from syncbn.study.run.progress import Display
from syncbn.study.run.records import Record, Records
from syncbn.study.run.worker import Events, Job, Reply, Trainer, is_held, load_result, note_failure, recorded
from syncbn.train.checkpoint import try_lock

if TYPE_CHECKING:
    from syncbn.study.run.ranks import Ranks
    from syncbn.train.result import RunResult

Executor = Literal["pool", "slurm", "local"]
"""Who does the runs: processes of this machine, a Slurm cluster, or submitit's stand-in for a cluster on this machine.
Under a launcher, its processes do them instead."""
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
    """The recorded result, unless it failed. A diverged run has one."""


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    out: Path,
    *,
    workers: int | None = None,
    trainer: Trainer | None = None,
    display: Display | None = None,
    executor: Executor = "pool",
    options: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Outcome]:
    """Run the cells that have no record yet, and the study's repeat under real processes after them.

    Several calls on one directory share the work: each cell is run once, and every call ends with all results.

    Args:
        study: the study; its ``repeat_distributed`` is run too.
        cells: its cells; cells of one key are one run.
        out: the study's directory, made if need be.
        workers: runs side by side; by default one for each core, or on a Slurm cluster all at once.
        trainer: what does the runs, by default the package's own.
        display: shows the progress.
        executor: who does the runs.
        options: parameters of the cluster's jobs, for submitit.
        ranks: the first of a launcher's processes, which then do the runs together, one after another; the others have
            to :meth:`~syncbn.study.run.ranks.Ranks.follow`.

    Returns:
        One outcome for each cell's key, and one for the repeat's :func:`repeat_id`. A failure is an outcome.

    Raises:
        KeyboardInterrupt: after the workers have been stopped, or their jobs cancelled; what was done is kept.
        ConfigError: records or a result of another version, or options that a cluster does not know.
        ImportError: submitit is not installed.
    """
    jobs = study_jobs(study, cells, out)
    records = Records(out)
    records.refresh()
    outcomes = {}
    for job in jobs:
        try:
            record = _found(job, records)
        except OSError as error:
            outcomes[job.id] = _not_recorded(job, error)
            continue
        if record is not None:
            outcomes[job.id] = Outcome(job=job, status="kept", result=record.result)
    missing = [job for job in jobs if job.id not in outcomes]
    limit = workers if workers is not None else len(missing) if executor == "slurm" else len(os.sched_getaffinity(0))
    side_by_side = 1 if ranks else max(1, min(limit, sum(job.processes is None for job in missing)))
    with display or Display() as shown:
        shown.start(total=len(jobs), done=len(outcomes), workers=side_by_side)
        if ranks is not None:  # also with nothing to do: the other processes wait to be told so
            outcomes |= collect(ranks.events(missing, out), records, shown)
        elif missing:
            events = _events(missing, side_by_side, trainer or Trainer(), out, executor, options or {})
            outcomes |= collect(events, records, shown)
    return {job.id: outcomes[job.id] for job in jobs}


def study_jobs(study: Study, cells: Sequence[Cell], out: Path) -> list[Job]:
    """All runs of a study, the repeat under real processes last."""
    jobs = [
        Job(
            id=cell.key,
            label=cell.label,
            config=cell.config,
            directory=out / "runs" / cell.key,
            lock=out / "locks" / f"{cell.key}.lock",
            log=out / "logs" / f"{cell.key}.log",
        )
        for cell in unique_cells(list(cells))
    ]
    if study.repeat_distributed is not None:
        jobs.append(_repeat_job(study.repeat_distributed, cells, out))
    return jobs


def repeat_id(repeat: RepeatDistributed, cells: Sequence[Cell]) -> str:
    """Name of the repeat under real processes: the key of the cell it repeats, and the number of processes."""
    return f"{_cell(repeat, cells).key}-{repeat.processes}"


def left_over(study: Study, cells: Sequence[Cell], keys: Iterable[str]) -> str | None:
    """A note on how many of the records with these keys are of no run of the study; None where there are none."""
    known = {cell.key for cell in cells}
    if study.repeat_distributed is not None:
        known.add(repeat_id(study.repeat_distributed, cells))
    number = sum(key not in known for key in keys)
    if not number:
        return None
    which = "1 record belongs to a cell that is" if number == 1 else f"{number} records belong to cells that are"
    return f"{which} no longer in the study"


def collect(events: Events, records: Records, display: Display) -> dict[str, Outcome]:
    """Every job's outcome by id, from what happens to the jobs; closes ``events`` when it ends, however it does."""
    outcomes: dict[str, Outcome] = {}
    with closing(events):
        for event in events:
            if event is None:
                display.tick()
            elif event.reply is None:
                display.began(event.job.id, event.job.label)
            elif event.reply.status == "busy":
                display.waiting(event.job.id, event.job.label)
            else:
                outcome = _outcome(event.job, event.reply, records)
                outcomes[event.job.id] = outcome
                ran = outcome.status == "ran"
                display.ended(event.job.id, event.job.label, outcome.result, outcome.message, timed=ran)
    return outcomes


def _events(
    jobs: Sequence[Job], size: int, trainer: Trainer, out: Path, executor: Executor, options: Mapping[str, Any]
) -> Events:
    if executor == "pool":
        return pool_events(jobs, size, trainer, out)
    from syncbn.study.run.submit import submitted_events

    return submitted_events(jobs, size, trainer, out, executor, options)


def _repeat_job(repeat: RepeatDistributed, cells: Sequence[Cell], out: Path) -> Job:
    cell = _cell(repeat, cells)
    name = repeat_id(repeat, cells)
    return Job(
        id=name,
        label=f"{cell.label}, repeated with other processes",
        config=cell.config,
        directory=out / "distributed" / name,
        lock=out / "locks" / f"{name}.lock",
        log=out / "logs" / f"{name}.log",
        processes=repeat.processes,
        timeout=DISTRIBUTED_TIMEOUT,
        repeats=cell.key,
    )


def _cell(repeat: RepeatDistributed, cells: Sequence[Cell]) -> Cell:
    cell = cell_to_repeat(repeat, cells)
    assert cell is not None, "checked when the study was read"
    return cell


def _found(job: Job, records: Records) -> Record | None:
    """The record of a job that is done, also of one that ended without being recorded; None where it is to be run."""
    record = records.get(job.id)
    if record is not None or load_result(job.directory) is None:
        return record
    with try_lock(job.lock) as held:
        return recorded(job, records) if held and not is_held(job.directory / ".lock") else None


def _outcome(job: Job, reply: Reply, records: Records) -> Outcome:
    try:
        records.refresh()
        record = _found(job, records)
    except OSError as error:
        return _not_recorded(job, error)
    if record is not None:
        return Outcome(job=job, status="kept" if reply.status == "kept" else "ran", result=record.result)
    return Outcome(job=job, status="failed", message=reply.message or "the record is gone")


def _not_recorded(job: Job, error: OSError) -> Outcome:
    """The outcome of a job whose record cannot be read or written here (a full disk): the other jobs go on."""
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    note_failure(job.log, message)
    return Outcome(job=job, status="failed", message=message)
