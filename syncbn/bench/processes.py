"""Functions that run on several gloo processes of this machine, and contenders that are timed there."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.bench.timing import MIN_SAMPLE_SECONDS, Call, Timing, interleaved

GRACE_SECONDS = 5.0
"""After a first failure, to collect those of the others: the error of one rank leaves the rest in a collective."""


class ProcessError(RuntimeError):
    """A process failed, with its traceback, or did not finish in time."""


def progress(text: str) -> None:
    """Write a line to stderr, on one process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Run ``function(*args)`` in a gloo world of new processes with one thread each.

    Args:
        function: one of a module, because it is sent by name.
        world_size: number of processes.
        args: sent to each process.
        timeout: seconds, including the start.

    Returns:
        What the function returned, by rank.

    Raises:
        ProcessError: a process raised, ended, or did not finish in time. No process is left then.
    """
    context = mp.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    with tempfile.TemporaryDirectory() as folder:
        world = {"init_method": f"file://{Path(folder, 'rendezvous')}", "world_size": world_size}
        world["timeout"] = datetime.timedelta(seconds=timeout)
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, world | {"rank": rank}, function, args), daemon=True
                )
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
    contenders: Mapping[str, Call], *, rounds: int, warmup: int = 2, min_sample: float = MIN_SAMPLE_SECONDS
) -> dict[str, Timing]:
    """:func:`~syncbn.bench.timing.interleaved` on the CPU, called by all processes of the world at once.

    There is a barrier before each sample, all processes make the same number of calls, and a sample is the time of the
    slowest process, because a training step ends with it.
    """
    timings = interleaved(
        contenders,
        rounds=rounds,
        device=torch.device("cpu"),
        warmup=warmup,
        min_sample=min_sample,
        before=dist.barrier,
        agree=lambda calls: int(_largest([calls])[0]),
    )
    return {name: Timing(tuple(_largest(timing.samples)), timing.calls) for name, timing in timings.items()}


def _largest(values: Any) -> list[float]:
    """Each value's maximum over the processes."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def _work(pipe: Connection, world: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", **world)
        dist.barrier()  # a process that ended before another has connected to it would break that one
        answer = (True, function(*args))
    except Exception:
        answer = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch's own pickler sends handles that end with this process
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
