"""Times of several contenders, measured in turns on one process or on several, and their ratios.

A machine's speed drifts with its clock, its temperature and its other users. Contenders that take turns see the same
drift, so the ratio of two times *within a round* is steadier than either time.
"""

from __future__ import annotations

import datetime
import gc
import math
import multiprocessing
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

Call = Callable[[], object]
Clock = Callable[[], float]

MIN_SAMPLE_SECONDS = 1e-3
"""Shorter calls are repeated to make a sample: clocks and CUDA events are accurate to about a microsecond."""
MAX_CALLS = 1000


class Spread(NamedTuple):
    """A median with the first and the third quartile, of times in seconds or of ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


class Timing(NamedTuple):
    """The times of one contender."""

    samples: tuple[float, ...]  # seconds per call, one sample for each round
    calls: int = 1  # number of calls in a sample

    @property
    def spread(self) -> Spread:
        return spread(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles; a single value is all three.

    >>> spread([4.0, 1.0, 3.0, 2.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    values = sorted(values)
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(numerator: Timing, denominator: Timing) -> Spread:
    """Median and quartiles of the ratios within the rounds of one :func:`interleaved`."""
    return spread(a / b for a, b in zip(numerator.samples, denominator.samples, strict=True))


def geometric_mean_of_ratios(ratios: Iterable[Spread]) -> Spread:
    """Geometric mean of the medians and of each quartile.

    The quartiles are what they would be if all ratios erred in the same direction: an upper bound of the spread.
    """
    return Spread(*(statistics.geometric_mean(values) for values in zip(*ratios, strict=True)))


def interleaved(
    contenders: Mapping[str, Call],
    *,
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    min_sample: float = MIN_SAMPLE_SECONDS,
    together: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time each contender once per round. The order is drawn anew for each round, and is the same in all processes.

    In a fixed order each contender would always find the caches as the same other one leaves them.

    On CUDA a sample is the time between two events around its calls, which follow one another without a pause, as
    layers do in a training step: if the host launches more slowly than the device works, that counts. L2 stays warm.

    Args:
        rounds: samples of each contender.
        device: where the work is done.
        warmup: untimed calls of each; the last one determines how many calls make a sample.
        min_sample: least seconds of a sample; shorter calls are repeated.
        together: all processes of the world call this at once. There is a barrier before each sample, all make the same
            number of calls, and a sample is the time of the slowest process, because a training step ends with it.
        clock: returns seconds; not used on CUDA.
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got {rounds} and {warmup}")
    barrier, largest = (dist.barrier, _largest) if together else (lambda: None, lambda values: values)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    calls: dict[str, int] = {}
    collecting = gc.isenabled()
    gc.disable()  # a collection would hit one contender for all
    try:
        for name, call in contenders.items():
            for _ in range(warmup - 1):
                call()
            barrier()
            seconds = max(_seconds_per_call(call, 1, device, clock), 1e-9)
            calls[name] = int(largest([min(MAX_CALLS, max(1, math.ceil(min_sample / seconds)))])[0])
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(list(contenders), len(contenders)):
                barrier()
                samples[name].append(_seconds_per_call(contenders[name], calls[name], device, clock))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(largest(samples[name])), calls[name]) for name in contenders}


def _seconds_per_call(call: Call, calls: int, device: torch.device, clock: Clock) -> float:
    if device.type != "cuda":
        began = clock()
        for _ in range(calls):
            call()
        return (clock() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / calls / 1e3


def _largest(values: Sequence[float]) -> list[float]:
    """Each value's maximum over the processes."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


class ProcessError(RuntimeError):
    """A process failed, with its traceback, or did not finish in time."""


def progress(text: str) -> None:
    """Write a line to stderr, on one process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run_with_environment(variables: Mapping[str, str], function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(*args)`` in a new process with these environment variables; returns its answer.

    For what libraries read once, when they are loaded. The function is sent by name, so it must be one of a module.
    What it raises is raised here, and ProcessError if the process ends.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool as error:
        raise ProcessError(f"{function.__name__} with {dict(variables)}: {error}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Run ``function(*args)`` in a gloo world of new processes with one thread each; returns the answers by rank.

    The function is sent by name, so it must be one of a module. ProcessError if a process raises, ends, or does not
    finish within ``timeout`` seconds, the start included; no process is left then.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(_work, (world_size, folder, timeout, function, args), world_size, join=False, daemon=True)
        try:
            # After one process has failed, the others have 5 s to end by themselves.
            while not context.join(max(0.0, deadline - time.monotonic()), 5.0):
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
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", limit, world_size, rank)
    dist.barrier()  # a process that ended before another has connected to it would break that one
    Path(folder, f"answer-{rank}").write_bytes(pickle.dumps(function(*args)))
    # gloo's thread holds on to the work of the last backward pass, and must not let go of it while Python ends.
    dist.barrier()
    dist.destroy_process_group()
