"""Where a study stands and how long the rest takes, read from its folder; nothing is run or written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from syncbn.study.plan.grid import Cell, State, state_of, unique_cells
from syncbn.study.plan.halving import Length, length_of
from syncbn.study.run.jobs import Job, load_result, study_jobs
from syncbn.study.run.logs import failure
from syncbn.study.run.records import Record, read_records
from syncbn.train.result import RunResult


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The state of a run."""

    job: Job
    state: State
    message: str = ""
    """Why it failed, in one line."""
    mistake: bool = False
    """Whether it failed by the user's code or configuration, as far as that was seen by this process."""
    result: RunResult | None = None
    """Its result if it is done or diverged."""
    ran: bool = False
    """Whether it ended in this call of :func:`syncbn.study.run.runner.run_cells`, not before."""


def study_outcomes(cells: Sequence[Cell], out: Path) -> dict[str, Outcome]:
    """The state of each run of a study, by key."""
    records = read_records(out)
    return {job.key: _outcome(job, records.get(job.key)) for job in study_jobs(cells, out)}


def _outcome(job: Job, record: Record | None) -> Outcome:
    # A result without a record: its process was killed between the two, or is about to write the record.
    result = record.result if record is not None else load_result(job.directory)
    if result is not None:
        return Outcome(job=job, state=state_of(result), result=result)
    if job.held():
        return Outcome(job=job, state="running")
    message = failure(job.log)
    if message is not None:
        return Outcome(job=job, state="failed", message=message)
    return Outcome(job=job, state="missing")


def seconds_left(cells: Sequence[Cell], records: Mapping[str, Record]) -> float | None:
    """Estimated seconds of the runs without a record, one after another; None before the first run has finished.

    Each is expected to take the median time of the finished runs that are most like it: of its arm and its length, of
    its arm, or any. A run of another length counts in proportion to it.
    """
    finished: dict[tuple[object, ...], list[tuple[int, float]]] = defaultdict(list)
    for cell in unique_cells(cells):
        if cell.key in records:
            length = length_of(cell.config)
            for kind in _kinds(cell, length):
                finished[kind].append((length.number, records[cell.key].seconds))
    if not finished:
        return None
    return sum(_expected(cell, finished) for cell in unique_cells(cells) if cell.key not in records)


def _kinds(cell: Cell, length: Length) -> list[tuple[object, ...]]:
    """What runs like this one have in common, the closest first."""
    return [(cell.arm, length), (cell.arm, length.unit), (length.unit,), ()]


def _expected(cell: Cell, finished: Mapping[tuple[object, ...], list[tuple[int, float]]]) -> float:
    length = length_of(cell.config)
    kind = next(kind for kind in _kinds(cell, length) if kind in finished)
    # Epochs and steps have no proportion.
    return median(seconds * (length.number / number if kind else 1) for number, seconds in finished[kind])


def left_over(cells: Sequence[Cell], keys: Iterable[str]) -> str | None:
    """A note on how many of the records with these keys belong to no cell of the study; None if none does."""
    number = len(set(keys) - {cell.key for cell in cells})
    if not number:
        return None
    which = "1 record belongs to a cell that is" if number == 1 else f"{number} records belong to cells that are"
    return f"{which} no longer in the study"
