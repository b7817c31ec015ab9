"""The launch scripts, started as a user does, and the processes that come of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(script, config, out, *arguments, place=(), **environment):
    """``place`` is a command that runs another one elsewhere."""
    return subprocess.Popen(
        [*place, "bash", f"launch/{script}", "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CONFIG": str(config), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=120):
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def workers_of(out):
    """Processes, other than launchers, that run a training into ``out``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"syncbn.train.torchrun" not in words and b"bash" not in words:
            found.append(int(entry.parent.name))
    return found


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def running(*marks):
    """Processes whose command line has all of these texts."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:  # it has ended
            continue
        if all(mark.encode() in words for mark in marks):
            found.append(int(entry.parent.name))
    return found
