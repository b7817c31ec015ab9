"""``python -m syncbn.train.torchrun``: torchrun, with the exit code 85 if its processes were stopped by a signal.

torchrun sends SIGTERM on to its processes, and SIGKILL after ``--shutdown-timeout`` seconds. Here it does the same with
SIGUSR1. It always ends with code 1, which does not tell a run that can be continued from one that failed. And it waits
for as long as the network does, 15 minutes and more, if the node is gone that serves the store where the nodes meet.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from syncbn.train.stopping import MARK, STOP_SIGNALS, STOPPED

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
STUCK_SECONDS = 20
"""torchrun looks at its processes ten times a second. If all have ended for so long unnoticed, it waits elsewhere."""


def main(arguments: list[str]) -> int:
    """torchrun with these arguments; returns its exit code."""
    endpoint = dict(itertools.pairwise(arguments)).get("--rdzv-endpoint", "")
    threading.Thread(target=_guard, args=[endpoint], name="syncbn.guard", daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="syncbn-torchrun-") as folder:
        mark = Path(folder) / "stopped"
        os.environ[MARK] = str(mark)
        try:
            # torchrun leaves its own folder of logs behind.
            run.main([f"--signals-to-handle={SIGNALS}", "--log-dir", str(Path(folder) / "logs"), *arguments])
        except SignalException as error:
            # Processes that had not come to their first step have left no mark, and nothing is lost.
            if not (mark.exists() or error.sigval in STOP_SIGNALS):
                raise
            return STOPPED
        except ChildFailedError as error:
            return STOPPED if mark.exists() else _failed(error)
        except RendezvousConnectionError as error:
            return _no_store(endpoint, f"has no connection to it ({error.__cause__ or error})")
    return 0


def _failed(error: ChildFailedError) -> int:
    """Print torchrun's summary, which ends with what the first process to fail has said; returns the exit code."""
    print(error, file=sys.stderr, flush=True)
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        killed = f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}"
        print(f"syncbn: error: {killed}", file=sys.stderr, flush=True)
    return 1


def _no_store(endpoint: str, what: str) -> int:
    store = f"the store where the nodes meet{endpoint and f' ({endpoint})'}"
    gone = "the process or node that serves it is gone, or cannot be reached"
    place = f"torchrun on {socket.gethostname()}"
    print(f"syncbn: error: {place} needs {store}, and {what}: {gone}", file=sys.stderr, flush=True)
    return 1


def _guard(endpoint: str) -> None:
    """End torchrun if it does not notice that its processes have ended. While one lives, it may wait for that one.

    It counts its own rounds, as the time that a suspended process sleeps does not count.
    """
    rounds = 0
    while rounds < STUCK_SECONDS:
        time.sleep(1)
        rounds = rounds + 1 if _has_uncollected_children_alone() else 0
    os._exit(_no_store(endpoint, "waits for its answer"))


def _has_uncollected_children_alone() -> bool:
    try:
        children = psutil.Process().children()
        return bool(children) and all(child.status() == psutil.STATUS_ZOMBIE for child in children)
    except psutil.NoSuchProcess:  # a child was collected meanwhile
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
