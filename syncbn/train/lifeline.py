"""A process that ends with the one that started it, even if that one is killed: nobody is left to end it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "SYNCBN_PARENT"
"""Environment variable with the process number of who starts :func:`torchrun`."""
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def end_with_parent(how: signal.Signals, parent: int | None = None) -> None:
    """Ask the kernel (Linux) for the signal ``how`` when the process that started this one ends.

    If it is not ``parent`` any more, it has ended already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(how), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), how)


def torchrun() -> None:
    """torchrun with this process's arguments, which ends with its parent: on SIGTERM it ends its processes."""
    from torch.distributed.run import main

    end_with_parent(signal.SIGTERM, int(os.environ.pop(PARENT)))
    main()
