"""A study that a signal asks to stop: its runs are ended after a checkpoint, and the same command goes on with them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from syncbn.study.run.jobs import TrainFunction
from syncbn.train import loop
from syncbn.train.stopping import STOP_SIGNALS


class StudyStopped(BaseException):
    """A signal ends the study, as Ctrl-C does: what catches the errors of runs lets it through. It says which one."""


def _stop(number: int, frame: FrameType | None) -> None:
    for each in STOP_SIGNALS:  # a second one would interrupt the end of the workers
        signal.signal(each, signal.SIG_IGN)
    raise StudyStopped(signal.Signals(number).name)


@contextmanager
def stopping() -> Iterator[None]:
    """Raise :class:`StudyStopped` at the first stop signal within this context."""
    if threading.current_thread() is not threading.main_thread():  # Python sets signals in the main thread alone
        yield
        return
    before = {each: signal.signal(each, _stop) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stoppable(train: TrainFunction) -> TrainFunction:
    """``train``, which stops at a signal after a checkpoint if it is the trainer.

    A training loop of the user's knows nothing of this, and the signal ends its process.
    """
    return partial(train, stop_on=STOP_SIGNALS) if train is loop.train else train
