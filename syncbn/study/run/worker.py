"""A worker process of a study: it imports torch once and then runs one job after another, each under its lock.

A job's log says what became of each attempt, in lines that begin with ``MARK``: that it began, and how it failed.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from syncbn.study.run.records import Record, Records
from syncbn.train.checkpoint import try_lock
from syncbn.train.config import ConfigError
from syncbn.train.config_io import save_config

if TYPE_CHECKING:
    from syncbn.train.config import RunConfig
    from syncbn.train.result import RunResult

MARK = "=="
"""Begin of the lines that a study adds to a run's log."""
STOP_SECONDS = 25.0
"""Time a worker gets to stop before it is killed; a launcher and its processes may take most of it."""


class TrainFunction(Protocol):
    """``syncbn.train.loop.train``, as far as a worker needs it."""

    def __call__(self, config: RunConfig, out: Path | None = None, *, resume: bool = False) -> object: ...


class LaunchFunction(Protocol):
    """``syncbn.train.launch.launch``."""

    def __call__(self, processes: int, arguments: Sequence[str], log: Path, timeout: float | None = None) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The two ways to do a run: here, or under real processes. A worker looks both up by name, as it is sent them."""

    train: TrainFunction | None = None
    """None is ``syncbn.train.loop.train``."""
    launch: LaunchFunction | None = None
    """None is ``syncbn.train.launch.launch``."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be done: in the worker itself, or under real processes that the worker launches."""

    id: str
    """Unique within a study; it names the record, the lock and the log."""
    label: str
    config: RunConfig
    directory: Path
    """Where the trainer writes; a readable ``result.json`` in it means that the run is done."""
    lock: Path
    log: Path
    processes: int | None = None
    """Real processes to launch; None trains in the worker."""
    timeout: float | None = None
    """Seconds that the launched processes may take."""
    repeats: str | None = None
    """Key of the cell that this job repeats with another number of processes."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a job: ran now, found done, locked by another study run, or failed with a message."""

    status: Literal["ran", "kept", "busy", "failed"]
    message: str = ""


@dataclass(frozen=True)
class Event:
    """A job was begun (``reply`` is None), or is over."""

    job: Job
    reply: Reply | None = None


Events = Generator[Event | None, None, None]
"""What happens to jobs, with None whenever nothing has for a while; closing it stops what is going on."""


def load_result(directory: Path) -> RunResult | None:
    """The result in a run's directory; None where there is none or a half-written one, which is the same as none.

    Raises:
        ConfigError: a whole result that this version cannot read.
        OSError: it is there and cannot be read.
    """
    from syncbn.train.result import RunResult

    path = directory / "result.json"
    try:
        return RunResult.from_json(path)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    except (TypeError, KeyError, AttributeError) as error:
        # Not to be taken for a half-written one: the run would be done again, over what another version can read.
        expected = f"a result that this version of syncbn can read ({type(error).__name__}: {error})"
        raise ConfigError(f"result of {directory.name}", str(path), expected) from None


def attempt(job: Job, trainer: Trainer, records: Records) -> Reply:
    """Do one job, if it is to be done; a failure is a reply, with a message of one line that also ends the log."""
    try:
        return Reply(status=execute(job, trainer, records))
    except Exception as error:  # whatever a run raises, the study goes on and reports it
        message, *more = f"{type(error).__name__}: {error}".splitlines()
        message = f"{message}: {last_error(job.log)}" if more else message
        note_failure(job.log, message)
        return Reply(status="failed", message=message)


def execute(job: Job, trainer: Trainer, records: Records) -> Literal["ran", "kept", "busy"]:
    """Do one job, and record it, unless it is done or another process is at it.

    Raises:
        Exception: whatever the run raised; the details are in the job's log.
    """
    with try_lock(job.lock) as held:
        if not held or is_held(job.directory / ".lock"):
            return "busy"
        # Under the lock: the process that held it before may just have finished this job.
        if recorded(job, records) is not None:
            return "kept"
        (job.directory / "result.json").unlink(missing_ok=True)  # half-written
        started, clock = datetime.now(UTC), time.monotonic()
        with output_to(job.log):
            print(f"{MARK} {_now()} began: {job.label}", flush=True)
            if job.processes is None:
                _train_here(job, trainer)
            else:
                _launch(job, _processes(job, records), trainer)
        result = load_result(job.directory)
        if result is None:
            raise RuntimeError(f"the run ended without a readable {job.directory / 'result.json'}")
        records.add(job.id, started, time.monotonic() - clock, result)
    return "ran"


def recorded(job: Job, records: Records) -> Record | None:
    """A job's record, if it is done; to be called under its lock.

    A run whose process was killed between the result and the record is recorded here, by what its result says: it ended
    when that was written, after its training time.
    """
    records.refresh()
    record = records.get(job.id)
    if record is not None:
        return record
    result = load_result(job.directory)
    if result is None:
        return None
    ended = datetime.fromtimestamp((job.directory / "result.json").stat().st_mtime, UTC)
    records.add(job.id, ended - timedelta(seconds=result.seconds), result.seconds, result, ended)
    return records.get(job.id)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock; processes that outlived their worker still hold the lock of the run's folder."""
    if not lock.exists():
        return False
    with try_lock(lock) as free:
        return not free


def worker_main(connection: Connection, trainer: Trainer, out: Path) -> None:
    """Body of a worker process: answers each :class:`Job` it receives with a :class:`Reply`, until the pipe closes."""
    prepare_worker()
    records = Records(out)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(attempt(job, trainer, records))


def prepare_worker() -> None:
    """Make this process a worker: it computes in one thread, and ends with the process that started it."""
    # A Ctrl-C reaches the whole foreground process group; only the runner acts on it, and stops the workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_cleanly)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("torch").set_num_threads(1)
    forget_launcher()


def forget_launcher() -> None:
    """A run of this process is none of the launcher's, which may have started a study with a single process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def last_error(log: Path) -> str:
    """The last line of the log of an attempt that names an error, else its last line; empty without a log."""
    lines = _last_attempt(log)
    # The launcher's own error only says that a rank failed; the rank's error stands above it.
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line) and "ChildFailed" not in line]
    return next((line for line in reversed(errors or lines) if line and not line.startswith(f"{MARK} ")), "")


def failure(log: Path) -> str | None:
    """Why the last attempt that a log tells of failed; None where it did not, or was cut off."""
    for line in reversed(_last_attempt(log)):
        if found := re.match(rf"{MARK} \S+ failed: (.*)", line):
            return found[1]
    return None


def note_failure(log: Path, message: str) -> None:
    """End a log with why the attempt failed."""
    with suppress(OSError):  # a full disk is what it may be about
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{MARK} {_now()} failed: {message}\n")


def _last_attempt(log: Path) -> list[str]:
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return []
    began = [number for number, line in enumerate(lines) if re.match(rf"{MARK} \S+ began: ", line)]
    return lines[began[-1] if began else 0 :]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processes(job: Job, records: Records) -> int:
    """Processes of a repeat: one, where real processes did the cell itself; else the number that the study says."""
    assert job.processes is not None
    cell = records.get(job.repeats) if job.repeats is not None else None
    return job.processes if cell is None or cell.result.processes == 1 else 1


def _train_here(job: Job, trainer: Trainer) -> None:
    from syncbn.train.loop import train

    try:
        (trainer.train or train)(job.config, job.directory, resume=True)
    except Exception:
        traceback.print_exc()
        raise


def _launch(job: Job, processes: int, trainer: Trainer) -> None:
    from syncbn.train.launch import launch

    config = job.directory.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    save_config(job.config, config)
    arguments = ["train", "--config", str(config), "--out", str(job.directory), "--resume"]
    (trainer.launch or launch)(processes, arguments, job.log, job.timeout)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append what this process and its children print to ``log``, so that it does not run through the progress bar."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def _exit_cleanly(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the clean-up short
    sys.exit(128 + signal.SIGTERM)  # as an exception, so that launched processes are stopped on the way out


def _exit_with_parent() -> None:
    """Wait for the runner to end, even by SIGKILL, then stop: the run goes on from its checkpoint next time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)
