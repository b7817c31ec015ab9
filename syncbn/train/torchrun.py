"""``python -m syncbn.train.torchrun``: torchrun, with the exit code 85 if its processes were stopped by a signal.

torchrun sends SIGTERM on to its processes, and SIGKILL after ``--shutdown-timeout`` seconds. Here it does the same with
SIGUSR1. It always ends with code 1, which does not tell a run that can be continued from one that failed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from syncbn.train.stopping import MARK, STOPPED

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(arguments: list[str]) -> int:
    """torchrun with these arguments; returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "stopped"
        os.environ[MARK] = str(mark)
        try:
            # torchrun leaves its own folder of logs behind.
            run.main([f"--signals-to-handle={SIGNALS}", "--log-dir", str(Path(folder) / "logs"), *arguments])
        except (SignalException, ChildFailedError):
            if not mark.exists():
                raise
            return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
