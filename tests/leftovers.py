"""What a test leaves behind: processes that it started, by whatever way, and files that were to be temporary."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

MARK = "SYNCBN_TEST_SESSION"
"""Environment variable by which the processes of a session are known after their parent has ended."""
POOL = "pool-of-the-tests"
"""Begins the names of the workers that live for a whole session."""
SECONDS = 30.0
"""How long processes may take to end, such as a worker whose parent was killed."""
_LIVE_FOR_THE_SESSION = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


def start_of_session() -> None:
    os.environ[MARK] = f"{os.getpid()} at {time.time_ns()}"


def processes() -> dict[int, str]:
    """Processes of this session, other than this one, and their command lines."""
    mark, this = f"{MARK}={os.environ[MARK]}".encode(), os.getpid()
    parents = _parents()
    pool = {process.pid for process in multiprocessing.active_children() if process.name.startswith(POOL)}
    found = {}
    for pid, parent in parents.items():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            ours = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") or _descends(pid, this, parents)
        except OSError:  # it has ended
            continue
        lives_on = pid in pool or (parent == this and any(name in words for name in _LIVE_FOR_THE_SESSION))
        if ours and words and pid != this and not lives_on:
            found[pid] = words.replace(b"\0", b" ").decode(errors="replace")
    return found


def wait_until_gone(before: dict[int, str]) -> dict[int, str]:
    """The processes that are there and were not before, once they had time to end."""
    deadline = time.monotonic() + SECONDS
    while (left := {pid: words for pid, words in processes().items() if pid not in before}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    return left


def files_in(folder: Path, temporary: Path) -> list[Path]:
    """Entries of the folder for temporary files, and in ``folder`` files under the name of a write that has not ended.

    Some temporary files are those of a session: a rendezvous of a pool, a socket of multiprocessing, torch's cache.
    torchrun leaves a folder of its own each time, but not where this package starts it.
    """
    unfinished = [path for path in folder.rglob(".*") if path.name != ".lock"]
    return unfinished + [
        path
        for path in temporary.iterdir()
        if not path.name.startswith((POOL, "pymp-", "torchinductor_", "torchelastic_"))
    ]


def _parents() -> dict[int, int]:
    """By process, its parent; without those that have ended and wait for their parent to ask."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False
