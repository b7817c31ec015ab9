"""Where a study stands, from what lies in its folder; nothing is run or written, so it may be asked at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from syncbn.study.plan.grid import Cell, Study, study_cells
from syncbn.study.plan.study_file import load_study
from syncbn.study.run.progress import duration
from syncbn.study.run.records import Record, cells_per_hour, read_records
from syncbn.study.run.runner import Outcome, left_over, study_jobs
from syncbn.study.run.worker import Job, failure, is_held, load_result
from syncbn.train.config import ConfigError

if TYPE_CHECKING:
    from syncbn.train.result import RunResult

State = Literal["done", "running", "failed", "begun", "missing"]


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Where one run of a study stands."""

    job: Job
    state: State
    """Recorded; a process is at it; its last attempt failed; cut off, to go on from its checkpoint; not begun."""
    message: str = ""
    """Why it failed."""
    result: RunResult | None = None
    """Of a run that is done."""


def study_state(study: Study, cells: Sequence[Cell], out: Path) -> tuple[list[JobState], dict[str, Record]]:
    """Where each run of a study stands, the repeat under real processes last, and all records in its folder.

    Raises:
        ConfigError: records or a result of another version.
    """
    records = read_records(out)
    return [_state(job, records.get(job.id)) for job in study_jobs(study, cells, out)], records


def study_outcomes(study: Study, cells: Sequence[Cell], out: Path) -> dict[str, Outcome]:
    """The outcomes of what was run so far, as :func:`syncbn.study.run.runner.run_cells` returns them; nothing is run.

    Raises:
        ConfigError: records or a result of another version.
    """
    outcomes = {}
    for found in study_state(study, cells, out)[0]:
        if found.result is not None:
            outcomes[found.job.id] = Outcome(job=found.job, status="kept", result=found.result)
        elif found.state == "failed":
            outcomes[found.job.id] = Outcome(job=found.job, status="failed", message=found.message)
    return outcomes


def print_status(config: str, out: Path) -> int:
    """Print what of a study is done, running, failed and missing, how fast it goes and about how long the rest takes.

    Args:
        config: a study's YAML file, or the name of one that comes with the package.
        out: its folder, which may be in use, or not exist yet.

    Returns:
        0.

    Raises:
        ConfigError: a mistake in the study, or records or a result of another version.
    """
    study = load_study(config)
    if out.exists() and not out.is_dir():
        raise ConfigError("out", str(out), "a folder")
    cells = study_cells(study)
    states, records = study_state(study, cells, out)
    groups = {
        kind: [s for s in states if s.state == kind] for kind in ("done", "running", "failed", "begun", "missing")
    }
    diverged = [s for s in groups["done"] if s.result is not None and s.result.status == "diverged"]
    print(f"{study.name}: {len(states)} runs in {out}" + ("" if out.exists() else ", which does not exist yet"))
    print(f"done     {len(groups['done']):4}" + (f", {len(diverged)} of them diverged" if diverged else ""))
    print(f"running  {len(groups['running']):4}")
    print(f"failed   {len(groups['failed']):4}" + (", to be tried again" if groups["failed"] else ""))
    begun = len(groups["begun"])
    print(f"missing  {len(groups['missing']) + begun:4}" + (f", {begun} of them begun and cut off" if begun else ""))
    ours = {s.job.id: records[s.job.id] for s in states if s.job.id in records}
    print(_speed(ours, len(states) - len(groups["done"])))
    if note := left_over(study, cells, records):
        print(note)
    for kind, members in (("running", groups["running"]), ("diverged", diverged)):
        for found in members:
            print(f"{kind}: {found.job.label}")
    for found in groups["failed"]:
        print(f"failed: {found.job.label}: {found.message} (log: {found.job.log})")
    return 0


def _state(job: Job, record: Record | None) -> JobState:
    # A result without a record: the process was killed between the two, or is about to write the record.
    result = record.result if record is not None else load_result(job.directory)
    if result is not None:
        return JobState(job=job, state="done", result=result)
    if is_held(job.lock) or is_held(job.directory / ".lock"):
        return JobState(job=job, state="running")
    message = failure(job.log)
    if message is not None:
        return JobState(job=job, state="failed", message=message)
    return JobState(job=job, state="begun" if job.directory.exists() else "missing")


def _speed(records: dict[str, Record], left: int) -> str:
    rate = cells_per_hour(records.values())
    if rate is None:
        return "no run has ended yet" if left else "all is done"
    rest = f"about {duration(3600 * left / rate)} for the other {left}" if left else "all is done"
    return f"{rate:.3g} runs an hour while it was running; {rest}"
