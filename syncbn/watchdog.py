"""A hang becomes a sentence: which ranks do not come to a layer's reduction, and where they are."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import sysconfig
import threading
import time
import warnings
from types import FrameType
from typing import Any, NamedTuple, Self

import torch.distributed as dist

from syncbn import lockstep
from syncbn.error_report import report_error
from syncbn.torch_internals import group_of, host_of_store, store_of_world

EXIT_CODE = 86
"""Of a process that a watchdog ends."""
_END, _ENDS, _LOST = (f"syncbn-watchdog/{name}" for name in ("end", "ends", "lost"))
_CONNECTION = re.compile(r"gloo.transport|connection (closed|reset|was closed)|broken pipe", re.IGNORECASE)
"""In the errors of torch's backends and stores when another process is gone."""


class Status(NamedTuple):
    """What a rank tells the others."""

    beat: int
    """Counts up; -1 after its watchdog has been stopped."""
    position: str | None
    """The reduction that it waits in."""
    last: str | None
    """The reduction before."""
    line: str
    """The line of Python that it is at, outside torch and the layers."""
    host: str

    def __str__(self) -> str:
        if self.beat < 0:
            return f"has stopped its watchdog, on {self.host}"
        doing = f"waits in {self.position}" if self.position else f"is in no layer (the last was {self.last})"
        return f"{doing}, at {self.line} on {self.host}"


class watchdog:  # a context manager, named like contextlib's
    """End all processes if one waits too long for the others in a layer's reduction, and say for whom it waited.

    A synchronized layer waits for all ranks of its process group. If one of them evaluates while the others train, has
    a batch less or is gone, the others wait until torch gives up: with gloo after 30 minutes, and without a name. With
    a watchdog, a process that has waited for ``timeout`` seconds in one reduction prints one line with the layer, the
    number of its call and the ranks that are not there, each with the line of Python that it is at. All processes then
    end with exit code 86. They also end if a process gives no sign of life for ``silence`` seconds, as when its node is
    gone, and if an error of a broken connection leaves the context because of such a process.

    Only layers and :func:`syncbn.uneven` are watched, and not torch's own collectives. ``syncbn train`` and studies
    have a watchdog already. Call it after ``init_process_group`` on every rank, once or as a context manager. A thread
    of each process then tells the others where it is, through the store of the process group. With one process it does
    nothing.

    On CUDA a reduction lasts until its work on the device is done; capture CUDA graphs outside the context manager.
    There, reductions in compiled graphs are not watched.

    Args:
        timeout: seconds that a process may wait in one reduction. Let it be longer than any rank is busy alone, for
            instance with an evaluation on rank 0.
        silence: seconds without a sign of life. A rank gives none while one call of compiled code keeps Python's lock,
            for instance while it reads a very large JSON file.

    Raises:
        ValueError: ``timeout`` or ``silence`` is not a positive number.

    Example:
        >>> import syncbn, torch
        >>> layer = syncbn.SyncBatchNorm(3)
        >>> with syncbn.watchdog(timeout=300):
        ...     y = layer(torch.randn(4, 3))
    """

    def __init__(self, timeout: float = 300.0, silence: float = 50.0) -> None:
        for name, seconds in (("timeout", timeout), ("silence", silence)):
            if not (isinstance(seconds, int | float) and seconds > 0):
                raise ValueError(f"{name} must be a positive number of seconds, got {seconds!r}")
        self._timeout, self._silence = timeout, silence
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        if not (dist.is_available() and dist.is_initialized()):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                warnings.warn("call syncbn.watchdog after init_process_group: it watches nothing", stacklevel=2)
            return
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size == 1:
            return
        self._world_size, self._neighbour = world_size, (self._rank + 1) % world_size
        # Each round makes four calls of the one store.
        self._interval = max(min(1.0, timeout / 5), world_size / 200)
        # A connection of its own: whoever waits in a call of a store keeps all others from it.
        self._store: Any = store_of_world().clone()  # type: ignore[attr-defined]  # its stub lacks it
        host = host_of_store(self._store)
        # torch lets the first rank, or its launcher, serve a store that has a host.
        served = "the process or node that serves" if host is None else f"rank 0 or its node, {host}, which serves"
        self._server_gone = f"{served} the store of the process group, is gone, or cannot be reached"
        self._main, self._process = threading.get_ident(), os.getpid()
        self._beat = 0
        self._clock = 0.0  # seconds of watching: a suspended process has waited for nobody
        self._seen: lockstep.Position | None = None
        self._seen_at = self._heard_at = 0.0
        self._heard = 0
        lockstep.watching += 1
        for function in (self._watch, self._guard):
            self._threads.append(threading.Thread(target=function, name="syncbn.watchdog", daemon=True))
            self._threads[-1].start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop watching. The other ranks are told, so that they do not take this one for dead."""
        if not self._threads or self._stopped.is_set() or os.getpid() != self._process:
            return
        self._stopped.set()
        for thread in self._threads:
            thread.join(5)
        lockstep.watching -= 1
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        watches = bool(self._threads) and not self._stopped.is_set()
        sentence = self._lost() if watches and _broken_connection(error) else None
        if sentence is not None:
            report_error(sentence, self._first_to_end(sentence))
        self.stop()
        if sentence is not None:
            raise SystemExit(EXIT_CODE) from error

    # -- the threads ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        try:
            while not self._stopped.wait(self._interval):
                now = time.monotonic()
                self._clock += min(now - before, 2 * self._interval)
                before = now
                self._tell(self._beat + 1)
                position = lockstep.oldest()
                if position is not self._seen:
                    self._seen, self._seen_at = position, self._clock
                elif position is not None and self._clock - self._seen_at > self._timeout:
                    self._end(self._waited(position))
                self._follow()
                self._beat += 1
            self._tell(-1)
        except Exception as error:
            warnings.warn(f"syncbn.watchdog has failed and watches no longer: {error!r}", stacklevel=1)
            self._stopped.set()

    def _guard(self) -> None:
        """End if the other thread does not come to its end: a call of the store waits for as long as the network does.

        It counts its own rounds, as the time that a suspended process sleeps is not silence.
        """
        beat, rounds = -1, 0
        while not self._stopped.wait(self._interval):
            beat, rounds = self._beat, rounds + 1 if self._beat == beat else 0
            if rounds * self._interval > self._silence:
                silent = f"rank {self._rank} has heard nothing of the other ranks for {self._silence:g} s"
                _exit(f"{silent}: {self._server_gone}")

    def _follow(self) -> None:
        """End if another rank has said so, or if the next rank is silent."""
        said = self._ask(_END)
        if said is not None:
            _exit(said.decode(), speaks=False)
        status = self._status(self._neighbour)
        if status is None or status.beat < 0 or status.beat != self._heard:
            self._heard, self._heard_at = 0 if status is None else status.beat, self._clock
        elif self._clock - self._heard_at > self._silence:
            gone = "its process or its node is gone, or cannot be reached"
            self._end(f"rank {self._neighbour} gives no sign of life for {self._silence:g} s: {gone}; it {status}")

    # -- the store -----------------------------------------------------------------------------------------------------

    def _tell(self, beat: int) -> None:
        now, last = lockstep.oldest(), lockstep.last
        words = [None if position is None else str(position) for position in (now, last)]
        line = _line(sys._current_frames().get(self._main))
        self._put(_key(self._rank), json.dumps([beat, *words, line, socket.gethostname()]))

    def _put(self, key: str, value: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, value)
            except RuntimeError:
                # It is served by a process that has ended. This may be a rank 0 that is done, so it is no alarm.
                self._store = None

    def _ask(self, key: str) -> bytes | None:
        """The value of a key; None if it has none or the store is gone."""
        if self._store is not None:
            try:
                return self._store.get(key) if self._store.check([key]) else None
            except RuntimeError:
                self._store = None
        return None

    def _status(self, rank: int) -> Status | None:
        told = self._ask(_key(rank))
        return None if told is None else Status(*json.loads(told))

    def _waited(self, position: lockstep.Position) -> str:
        """The sentence about a reduction in which this process has waited."""
        ranks = dist.get_process_group_ranks(group_of(position.group_name))
        found = {rank: self._status(rank) for rank in ranks}
        absent = {rank: status for rank, status in found.items() if status is None or status.position != str(position)}
        said = [f"rank {rank} {status or 'has no watchdog'}" for rank, status in absent.items()]
        if self._store is None:
            said = [
                "the process that served the store of the process group has ended, so nothing is known of the others"
            ]
        return (
            f"rank {self._rank} has waited for {self._timeout:g} s in {position}: "
            f"{'; '.join(said) or 'all ranks are there, but the network does not carry their data'}"
        )

    def _lost(self) -> str | None:
        """The sentence about ranks that are gone, after a connection broke; None if all live or have said farewell."""
        start, wait = f"rank {self._rank} has lost its connection to another rank", 5 * self._interval
        first = True
        with contextlib.suppress(RuntimeError, AttributeError):
            first = self._store.add(_LOST, 1) == 1
        others = [rank for rank in range(self._world_size) if rank != self._rank] if first else []
        before = {rank: self._status(rank) for rank in others}
        # Who is not the first waits for what the first says, and then ends in its other thread.
        time.sleep(wait if first else 2 * wait)
        after = {rank: self._status(rank) for rank in others}
        if self._store is None:
            return f"{start}: {self._server_gone}"
        gone = [
            f"rank {rank}" if status is None else f"rank {rank} on {status.host}"
            for rank, status in after.items()
            if before[rank] == status and (status is None or status.beat >= 0)
        ]
        if not gone:
            with contextlib.suppress(RuntimeError, AttributeError):
                self._store.add(_LOST, -1)  # the next broken connection has a first rank again
            return None
        return (
            f"{start}: {', '.join(gone)} gives no sign of life; the process or its node is gone, or cannot be reached"
        )

    def _first_to_end(self, sentence: str) -> bool:
        """Tell the other ranks why all end; whether no other rank has done so."""
        with contextlib.suppress(RuntimeError, AttributeError):
            first: bool = self._store.add(_ENDS, 1) == 1
            self._store.set(_END, sentence)
            return first
        return True

    def _end(self, sentence: str) -> None:
        """End this process; the first of all ranks to do so says why."""
        # This process may serve the store, in which the others look once in each round.
        _exit(sentence, speaks=self._first_to_end(sentence), after=2 * self._interval)


def _broken_connection(error: BaseException | None) -> bool:
    """Whether this error, or one that it comes of, is of torch's connections to other processes."""
    while error is not None:
        if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _key(rank: int) -> str:
    return f"syncbn-watchdog/{rank}"


def _exit(sentence: str, speaks: bool = True, after: float = 0.0) -> None:
    """End the process from a thread: the main thread waits in a call that nothing interrupts."""
    try:
        report_error(sentence, speaks)
        # In a thread, as the main one may hold the lock of a stream.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        time.sleep(after)
    finally:
        os._exit(EXIT_CODE)


def _line(frame: FrameType | None) -> str:
    """The innermost line of a thread outside torch, the layers and Python's library: where its user would look."""
    library, found = sysconfig.get_path("stdlib"), "an unknown line"
    while frame is not None:
        module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        inner = module.split(".")[0] == "torch" or (module.startswith("syncbn.") and module.count(".") == 1)
        if not inner and (not file.startswith(library) or "site-packages" in file) and not file.startswith("<"):
            return f"{os.path.basename(file)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return found
