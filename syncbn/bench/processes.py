"""Measurements on several gloo processes of this machine, which time together."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.bench.timing import Step, Timing, interleaved

GRACE_SECONDS = 5.0
"""After a first failure, for the others' own: one rank's error leaves the rest waiting in a collective."""


class ProcessError(RuntimeError):
    """A process has failed, with its traceback, or given no answer in time."""


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """``function(*args)`` on ``world_size`` fresh processes of one thread each, in a gloo world; the results by rank.

    Args:
        function: of a module, as it is sent by name.
        world_size: processes.
        args: sent to each.
        timeout: seconds for all of it, the start included.

    Raises:
        ProcessError: a process raised, ended, or was not done in time. All are ended then.
    """
    context = mp.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                where = (rank, world_size, str(Path(folder, "rendezvous")), timeout)
                process = context.Process(target=_work, args=(theirs, where, function, args), daemon=True)
                process.start()
                theirs.close()
                workers.append((process, ours))
            return _collect(workers, timeout)
        finally:
            for process, pipe in workers:
                process.join(GRACE_SECONDS if process.exitcode == 0 else 0.1)
                if process.is_alive():
                    process.kill()
                    process.join()
                pipe.close()


def interleaved_together(
    contenders: Mapping[str, Step], *, rounds: int, warmup: int = 2, group: dist.ProcessGroup | None = None
) -> dict[str, Timing]:
    """:func:`~syncbn.bench.timing.interleaved` on the CPU, called by every process of a group at once.

    A barrier stands before each sample, all make the same calls, and a sample is the slowest process's time, as no
    step of training is over before.
    """

    def largest(values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
        return [float(value) for value in tensor]

    timings = interleaved(
        contenders,
        rounds=rounds,
        device=torch.device("cpu"),
        warmup=warmup,
        before=lambda: dist.barrier(group=group),
        agree=lambda calls: int(largest([calls])[0]),
    )
    return {name: Timing(tuple(largest(list(timing.samples))), timing.calls) for name, timing in timings.items()}


def _work(
    pipe: Connection, where: tuple[int, int, str, float], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    rank, world_size, rendezvous, timeout = where
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        dist.barrier()  # one that is done and gone before another has connected to it would break that one
        answer = (True, function(*args))
    except Exception:
        answer = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch's own pickler sends tensors as handles that end with us
    if answer[0]:
        dist.destroy_process_group()


def _collect(workers: list[tuple[Any, Connection]], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                done, answer = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                process = workers[rank][0]
                process.join(GRACE_SECONDS)
                done, answer = False, f"the process ended with exit code {process.exitcode}"
            (results if done else failures)[rank] = answer
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise ProcessError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    if waiting:
        raise ProcessError(f"ranks {sorted(waiting.values())} of {len(workers)} gave no answer within {timeout:g} s")
    return [results[rank] for rank in range(len(workers))]
