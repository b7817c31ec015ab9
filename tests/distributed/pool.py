"""Worker processes that live for the whole test session, one set for each world size.

Importing torch in a fresh process costs seconds, so a test sends a function to workers that are already there. The
rendezvous is a file, so no port is used; everything has a timeout; a failure in any worker fails the test.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from leftovers import POOL

COLLECTIVE_TIMEOUT_S = 60
START_TIMEOUT_S = 120


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    pipe.send((True, "ready"))
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """``world_size`` gloo processes with an initialised world, which run functions of test modules."""

    def __init__(self, world_size: int, method: str = "spawn") -> None:
        self.world_size = world_size
        self._method = method
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call ``function(*args)`` on every rank; the results by rank.

        Raises AssertionError with a worker's traceback when one fails, and TimeoutError when one does not answer; the
        workers are then replaced, as their process group may be in any state.
        """
        self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        return self._collect(timeout)

    def stop(self) -> None:
        for process, pipe in self._workers:
            if process.is_alive():
                pipe.send(None)
        for process, _ in self._workers:
            process.join(10)
        self._kill()

    def _start(self) -> None:
        if self._workers and all(process.is_alive() for process, _ in self._workers):
            return
        self._kill()
        self._folder = tempfile.TemporaryDirectory(prefix=POOL)
        context: Any = mp.get_context(self._method)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            rendezvous = os.path.join(self._folder.name, "rendezvous")
            arguments = (rank, self.world_size, rendezvous, theirs)
            process = context.Process(target=_serve, args=arguments, name=f"{POOL}, rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._collect(START_TIMEOUT_S)

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        # One rank's error leaves the others waiting in a collective: a moment for their own errors, no more.
        while len(results) + len(failures) < self.world_size and time.monotonic() < deadline:
            for rank, (process, pipe) in enumerate(self._workers):
                if rank in results or rank in failures:
                    continue
                try:
                    if pipe.poll(0.01):
                        ok, value = pipe.recv()
                        (results if ok else failures)[rank] = value
                except (EOFError, ConnectionResetError):
                    process.join(5)
                    failures[rank] = f"the process ended with exit code {process.exitcode}"
            if failures:
                deadline = min(deadline, time.monotonic() + 5)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        silent = [rank for rank in range(self.world_size) if rank not in results and rank not in failures]
        self._kill()
        if failures:
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        raise TimeoutError(f"ranks {silent} of {self.world_size} gave no answer within {timeout} s")

    def _kill(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join(10)
            pipe.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def pools_by_size(method: str = "spawn") -> Iterator[Callable[[int], Pool]]:
    """The fixture ``pools``: ``pools(4)`` is the session's set of four workers, started when first asked for."""
    made: dict[int, Pool] = {}
    yield lambda world_size: made.setdefault(world_size, Pool(world_size, method))
    for pool in made.values():
        pool.stop()
