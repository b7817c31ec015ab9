"""A run that a signal asks to stop: the signal is noted, and the processes end together, after a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOPPED = 85
"""Exit code of ``syncbn train`` if a signal stopped it and ``--resume`` continues."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals that stop ``syncbn train``. Slurm sends the second one as a warning, with ``--signal=USR1@60``."""
MARK = "SYNCBN_STOPPED"
"""Environment variable with the file that a stopped process makes, as launchers do not pass on an exit code."""


class Stopped(Exception):
    """A signal has ended a training run before its last step. ``train(..., resume=True)`` continues it.

    Attributes:
        step: the optimizer steps that were taken.
        cause: who stopped it, in words.
        checkpoint: folder with the checkpoint; None if the run has no folder.
    """

    def __init__(self, step: int, cause: str, checkpoint: Path | None) -> None:
        where = "nothing was saved, as the run has no folder"
        if checkpoint is not None:
            where = f"the checkpoint is in {checkpoint}; --resume continues"
        super().__init__(f"stopped by {cause} at step {step}; {where}")
        self.step, self.cause, self.checkpoint = step, cause, checkpoint


class Noted:
    """A handler that notes the first signal and lets the process go on."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    @property
    def cause(self) -> str:
        """Who stops the run, in words."""
        return "a signal to another process" if self.received is None else self.received.name


@contextmanager
def noting(signals: Sequence[signal.Signals]) -> Iterator[Noted]:
    """Note these signals within this context, which has to be entered in the main thread if there are any."""
    noted = Noted()
    before = {each: signal.signal(each, noted) for each in signals}
    try:
        yield noted
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


def leave_signals_to_parent(_: int = 0) -> None:
    """In a loader process: ignore the signals that the training process notes, as it needs its loaders until it stops.

    Slurm sends a signal to all processes of a job.
    """
    for each in STOP_SIGNALS:
        if isinstance(signal.getsignal(each), Noted):
            signal.signal(each, signal.SIG_IGN)


def leave_mark() -> None:
    """Tell the launcher that this process was stopped. From here on, its signals are ignored: it ends anyway."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if MARK in os.environ:
        Path(os.environ[MARK]).touch()
