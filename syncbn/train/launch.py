"""Starting the processes of a run on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class LaunchError(RuntimeError):
    """The processes failed. The message ends with their last output, or is the user's mistake that they reported."""

    def __init__(self, message: str, mistake: bool = False) -> None:
        super().__init__(message)
        self.mistake = mistake


def launch(processes: int, arguments: Sequence[str], log: Path, timeout: float | None = None) -> None:
    """Run ``python -m syncbn ARGUMENTS`` in ``processes`` processes under torchrun, on a free port.

    Their output goes to ``log``. All of them have ended when this function returns or raises.

    Raises:
        LaunchError: they failed, or did not end within ``timeout`` seconds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "-m", "syncbn", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"not finished after {timeout:.0f} s; see {log}\n{_tail(log)}") from None
        finally:
            _end(process)
    if code and (said := re.findall(r"syncbn: error: (.+)", log.read_text(errors="replace"))):
        raise LaunchError(said[-1], mistake=True)
    if code:
        raise LaunchError(f"{processes} processes ended with exit code {code}; see {log}\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the launcher and its children, which form a process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
