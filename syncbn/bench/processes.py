"""Functions that run on several gloo processes of this machine, and contenders that are timed there."""

from __future__ import annotations

import datetime
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from syncbn.bench.timing import MIN_SAMPLE_SECONDS, Call, Timing, interleaved

GRACE_SECONDS = 5.0
"""How long processes may take to end by themselves after one has failed."""


class ProcessError(RuntimeError):
    """A process failed, with its traceback, or did not finish in time."""


def progress(text: str) -> None:
    """Write a line to stderr, on one process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Run ``function(*args)`` in a gloo world of new processes with one thread each; returns the answers by rank.

    The function is sent by name, so it must be one of a module. ProcessError if a process raises, ends, or does not
    finish within ``timeout`` seconds, the start included; no process is left then.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(_work, (world_size, folder, timeout, function, args), world_size, join=False, daemon=True)
        try:
            while not context.join(max(0.0, deadline - time.monotonic()), GRACE_SECONDS):
                if time.monotonic() >= deadline:
                    late = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise ProcessError(f"ranks {late} of {world_size} gave no answer within {timeout:g} s")
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise ProcessError(f"rank {error.error_index}: {error.msg.strip()}") from None
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(folder, f"answer-{rank}").read_bytes()) for rank in range(world_size)]


def _work(
    rank: int, world_size: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder, 'rendezvous')}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    dist.barrier()  # a process that ended before another has connected to it would break that one
    Path(folder, f"answer-{rank}").write_bytes(pickle.dumps(function(*args)))
    dist.destroy_process_group()


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
