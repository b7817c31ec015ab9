"""The log of a run: what it printed, and lines that begin with ``==`` and say when it began and how it failed."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import UTC, datetime
from pathlib import Path

from syncbn.train.result import naming

MARK = "=="
"""Start of the lines that the study adds."""


def note_begin(label: str) -> None:
    """Print that an attempt begins; its output is in the log."""
    print(f"{MARK} {_now()} began: {label}", flush=True)


def note_failure(log: Path, message: str) -> None:
    """Add to a log why the attempt failed."""
    with suppress(OSError):  # a full disk may be the reason for the failure
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{MARK} {_now()} failed: {message}\n")


def failure(log: Path) -> str | None:
    """Why the last attempt failed; None if it did not fail, or was cut off."""
    message = None
    if log.exists():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := re.match(rf"{MARK} \S+ (began|failed): (.*)", line.strip()):
                message = found[2] if found[1] == "failed" else None
    return message


def error_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append what this process and its children print to ``log``, so that it does not disturb the progress bar."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with _Log(log) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            # In a notebook, what Python prints does not go to these descriptors.
            with redirect_stdout(file), redirect_stderr(file):
                yield
    finally:
        with suppress(OSError):  # the log's disk may be full
            sys.stdout.flush()
            sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


class _Log(io.TextIOWrapper):
    """A file to which what is printed is added at once. An error, as of a full disk, names it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("ab", buffering=0), encoding="utf-8", errors="replace", write_through=True)
        self._path = path

    def write(self, text: str) -> int:
        with naming(self._path):
            return super().write(text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
