"""A worker process of a study: it imports torch once and then runs one job after another, each under its lock."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from syncbn.train.checkpoint import try_lock
from syncbn.train.config_io import save_config

if TYPE_CHECKING:
    from syncbn.train.config import RunConfig
    from syncbn.train.result import RunResult

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
    """Unique within a study; it names the lock and the log."""
    label: str
    config: RunConfig
    directory: Path
    """Where the trainer writes; a readable ``result.json`` in it means that the job is done."""
    lock: Path
    log: Path
    processes: int | None = None
    """Real processes to launch; None trains in the worker."""
    timeout: float | None = None
    """Seconds that the launched processes may take."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a job: ran now, found done, locked by another study run, or failed with a message."""

    status: Literal["ran", "kept", "busy", "failed"]
    message: str = ""


def load_record(directory: Path) -> RunResult | None:
    """The result in a run's directory; None where there is none or a half-written one, which is the same as none."""
    from syncbn.train.result import RunResult

    try:
        return RunResult.from_json(directory / "result.json")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def execute(job: Job, trainer: Trainer) -> Literal["ran", "kept", "busy"]:
    """Do one job unless it is done or another process is at it.

    Raises:
        Exception: whatever the run raised; the details are in the job's log.
    """
    with try_lock(job.lock) as held:
        if not held or not _is_free(job.directory):
            return "busy"
        # Under the lock: the process that held it before may just have finished this job.
        if load_record(job.directory) is not None:
            return "kept"
        (job.directory / "result.json").unlink(missing_ok=True)  # half-written
        with _output_to(job.log):
            if job.processes is None:
                _train_here(job, trainer)
            else:
                _launch(job, job.processes, trainer)
        if load_record(job.directory) is None:
            raise RuntimeError(f"the run ended without a readable {job.directory / 'result.json'}")
    return "ran"


def worker_main(connection: Connection, trainer: Trainer) -> None:
    """Body of a worker process: answers each :class:`Job` it receives with a :class:`Reply`, until the pipe closes."""
    # A Ctrl-C reaches the whole foreground process group; only the runner acts on it, and stops the workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_cleanly)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("torch").set_num_threads(1)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(job, trainer))


def last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line; empty without a log."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    # The launcher's own error only says that a rank failed; the rank's error stands above it.
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line) and "ChildFailed" not in line]
    return next((line for line in reversed(errors or lines) if line), "")


def _attempt(job: Job, trainer: Trainer) -> Reply:
    try:
        return Reply(status=execute(job, trainer))
    except Exception as error:  # whatever a run raises, the study goes on and reports it
        message, *more = f"{type(error).__name__}: {error}".splitlines()
        return Reply(status="failed", message=f"{message}: {last_error(job.log)}" if more else message)


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
    save_config(job.config, config)
    arguments = ["train", "--config", str(config), "--out", str(job.directory), "--resume"]
    (trainer.launch or launch)(processes, arguments, job.log, job.timeout)


def _is_free(directory: Path) -> bool:
    """False while processes that outlived their worker write to a run's directory: the trainer locks it too."""
    with try_lock(directory / ".lock") as free:
        return free


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
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
