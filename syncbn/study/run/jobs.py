"""One cell of a study being run: trained under a lock and recorded once, whatever is killed meanwhile.

A study's folder holds::

    records/WORKER.jsonl one line per finished run, in a file for each process that wrote any
    runs/KEY/            what training writes for a cell: config.yaml, metrics.jsonl, result.json, checkpoint/
    locks/KEY.lock       held while a process works on that cell
    logs/KEY.log         what the run printed, and its traceback if it failed
    study.yaml           the study itself, as it was last run
    parity.json          the study's parity check
    submitted/           files of submitit, if it handed out the jobs
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from syncbn.study.plan.grid import Cell, State, state_of, unique_cells
from syncbn.study.run.logs import error_line, note_begin, note_failure, output_to
from syncbn.study.run.records import Record, Records
from syncbn.train.checkpoint import try_lock
from syncbn.train.config import ConfigError, LocalError
from syncbn.train.launch_error import LaunchError
from syncbn.train.result import RunResult
from syncbn.train.stopping import Stopped
from syncbn.train.stored import IncompleteFile

TrainFunction = Callable[..., object]
"""Called as ``train(config, folder, resume=True)``, such as :func:`syncbn.train.loop.train`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell and the folder of its study."""

    cell: Cell
    out: Path

    @property
    def key(self) -> str:
        return self.cell.key

    @property
    def label(self) -> str:
        return self.cell.label

    @property
    def directory(self) -> Path:
        """Where training writes. A readable ``result.json`` in it means that the run is finished."""
        return self.out / "runs" / self.key

    @property
    def lock(self) -> Path:
        return self.out / "locks" / f"{self.key}.lock"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.key}.log"

    def held(self) -> bool:
        """Whether a process is working on this cell."""
        if not self.lock.exists():
            return False
        with try_lock(self.lock) as free:
            return not free


@dataclass(frozen=True)
class Event:
    """News of a job from those who do the jobs."""

    job: Job
    state: State
    """``running``: it was begun. ``missing``: it was left to another study run that is working on it or has just done
    it, or a signal has stopped it. Otherwise how it ended."""
    message: str = ""
    """Why it failed or was stopped, in one line."""
    mistake: bool = False
    """Whether it failed by the user's code or configuration, and not by the machine: others may fail alike."""


Events = Generator[Event | None, None, None]
"""The news of a list of jobs, with None whenever there was none for a while. Closing it stops the jobs."""


def study_jobs(cells: Sequence[Cell], out: Path) -> list[Job]:
    """The runs of a study: one for each key among its cells."""
    return [Job(cell=cell, out=out) for cell in unique_cells(cells)]


def attempt(job: Job, train: TrainFunction, records: Records) -> Event:
    """Train a cell and record its result, unless another process is working on it or has done it.

    An exception of the run is caught: it goes to the job's log, and its first line into the event.
    """
    try:
        return Event(job, _train_once(job, train, records))
    except Stopped as error:
        return Event(job, "missing", str(error))
    except Exception as error:  # whatever a run raises, the study goes on
        message = error_line(error)
        note_failure(job.log, message)
        launched = isinstance(error, LaunchError) and error.mistake
        return Event(job, "failed", message, launched or isinstance(error, ConfigError | LocalError | ImportError))


def _train_once(job: Job, train: TrainFunction, records: Records) -> State:
    with try_lock(job.lock) as held:
        # The process that held the lock before may just have finished the run.
        if not held or recorded(job, records) is not None:
            return "missing"
        (job.directory / "result.json").unlink(missing_ok=True)  # half-written
        started, clock = datetime.now(UTC), time.monotonic()
        with output_to(job.log):
            note_begin(job.label)
            try:
                train(job.cell.config, job.directory, resume=True)
            except Stopped as error:
                print(error)
                raise
            except Exception:
                traceback.print_exc()
                raise
        result = load_result(job.directory)
        if result is None:
            raise RuntimeError(f"the run ended without a readable {job.directory / 'result.json'}")
        if job.cell.tuning and result.validation is None and result.status != "diverged":
            shutil.rmtree(job.directory)  # it is of no use, and has to be done again when there is validation data
            expected = "a task with validation data (for classification, set data.validation_fraction)"
            raise ConfigError("tune", "no validation metric", expected)
        records.add(job.key, started, time.monotonic() - clock, result)
    return state_of(result)


def recorded(job: Job, records: Records) -> Record | None:
    """A job's record if its run is finished; to be called while holding its lock.

    A process may be killed after it wrote the result and before it recorded it. Such a run is recorded here: it ended
    when the result was written, and took its training time.
    """
    records.refresh()
    record = records.get(job.key)
    if record is not None:
        return record
    result = load_result(job.directory)
    if result is None:
        return None
    ended = datetime.fromtimestamp((job.directory / "result.json").stat().st_mtime, UTC)
    records.add(job.key, ended - timedelta(seconds=result.seconds), result.seconds, result, ended)
    return records.get(job.key)


def load_result(directory: Path) -> RunResult | None:
    """The result in a run's directory; None if there is none or a half-written one.

    A whole result that this version cannot read is a ConfigError, as running it again would overwrite it.
    """
    try:
        return RunResult.from_json(directory / "result.json")
    except IncompleteFile:
        return None
