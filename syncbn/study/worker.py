"""A worker process of a study: it imports torch once and then runs one job after another, each under its lock."""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from syncbn.train.config import RunConfig
    from syncbn.train.result import RunResult

STOP_SECONDS = 20.0
"""Time a launcher and its processes get to stop before they are killed."""


class TrainFunction(Protocol):
    """What a worker calls for one run; it is looked up by name in the worker, so it must be a module's function."""

    def __call__(self, config: RunConfig, out: Path | None = None, *, resume: bool = False) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be done: in the worker itself, or by a command that the worker starts."""

    id: str
    """Unique within a study; it names the lock and the log."""
    label: str
    config: RunConfig
    directory: Path
    """Where the trainer writes; a readable ``result.json`` in it means that the job is done."""
    lock: Path
    log: Path
    command: tuple[str, ...] | None = None
    """Launches the run under real processes; None trains in the worker."""
    timeout: float | None = None
    """Seconds that ``command`` may take."""


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


@contextmanager
def job_lock(path: Path) -> Iterator[int | None]:
    """Hold the advisory lock of one job: yields its file descriptor, or None if another process holds it.

    The kernel releases it when the holder ends, however it ends. The file stays: removing it would let two processes
    hold locks on two files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        try:
            yield descriptor if held else None
        finally:
            if held:  # explicitly, as a forked loader process may still hold a copy of the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def execute(job: Job, train: TrainFunction | None = None) -> Literal["ran", "kept", "busy"]:
    """Do one job unless it is done or another process is at it.

    Raises:
        Exception: whatever the run raised; its traceback is in the job's log.
    """
    with job_lock(job.lock) as lock:
        if lock is None:
            return "busy"
        # Under the lock: the process that held it before may just have finished this job.
        if load_record(job.directory) is not None:
            return "kept"
        job.directory.mkdir(parents=True, exist_ok=True)
        with _output_to(job.log):
            try:
                if job.command is not None:
                    _launch(job, job.command, lock)
                else:
                    (train or _trainer())(job.config, job.directory, resume=True)
                if load_record(job.directory) is None:
                    raise RuntimeError(f"the run ended without a readable {job.directory / 'result.json'}")
            except Exception:
                traceback.print_exc()
                raise
    return "ran"


def worker_main(connection: Connection, train: TrainFunction | None) -> None:
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
        connection.send(_attempt(job, train))


def last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line; empty without a log."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    # The launcher's own error only says that a rank failed; the rank's error stands above it.
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line) and "ChildFailed" not in line]
    return next((line for line in reversed(errors or lines) if line), "")


def _attempt(job: Job, train: TrainFunction | None) -> Reply:
    try:
        return Reply(status=execute(job, train))
    except Exception as error:  # whatever a run raises, the study goes on and reports it
        return Reply(status="failed", message=f"{type(error).__name__}: {error}")


def _trainer() -> TrainFunction:
    from syncbn.train.loop import train

    return train


_launched: list[subprocess.Popen[bytes]] = []
"""The command this worker is waiting for, for the thread that has to stop it when the runner is gone."""


def _launch(job: Job, command: tuple[str, ...], lock: int) -> None:
    """Run a job's command to its end, or stop it at the timeout; it keeps the lock should this worker be killed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lock,))
    _launched.append(process)
    try:
        code = process.wait(job.timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"took longer than {job.timeout:.0f} s and was stopped") from None
    finally:
        _stop(process)
        _launched.remove(process)
    if code != 0:
        raise RuntimeError(f"exit code {code}: {last_error(job.log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # torchrun stops its own processes on SIGTERM
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
    sys.exit(128 + signal.SIGTERM)  # as an exception, so that a launched command is stopped on the way out


def _exit_with_parent() -> None:
    """Wait for the runner to end, even by SIGKILL, then end at once: the run goes on from its checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    for process in _launched:
        process.terminate()
    os._exit(1)
