"""Times of several contenders, taken in turns, and their ratios.

A machine's speed drifts, with its clock, its heat and its other users. Contenders that take turns meet the same drift,
so the ratio of two of them *within a round* is steadier than either time: ratios are what is reported first.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

Step = Callable[[], object]
Clock = Callable[[], float]

MIN_SAMPLE_SECONDS = 1e-3
"""A sample shorter than this is made of several calls: clocks and events are good to about a microsecond."""

MAX_CALLS = 1000


class Spread(NamedTuple):
    """A median and the quartiles around it, of times in seconds or of ratios."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True)
class Timing:
    """What one contender took, one sample a round."""

    samples: tuple[float, ...]
    """Seconds a call, by round."""
    calls: int = 1
    """Calls that each sample is the mean of."""

    @property
    def spread(self) -> Spread:
        return spread(self.samples)

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.samples)


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles; a single value is all three."""
    values = sorted(values)
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(numerator: Timing, denominator: Timing) -> Spread:
    """Median and quartiles of the rounds' ratios, for two contenders of one :func:`interleaved`."""
    return spread(a / b for a, b in zip(numerator.samples, denominator.samples, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: that of the inverse ratios is its inverse. Of positive values."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def geometric_mean_of_ratios(ratios: Iterable[Spread]) -> Spread:
    """Of the medians, and of each quartile: the spread there would be if all shapes erred together, so an upper one."""
    ratios = list(ratios)
    median, low, high = (geometric_mean(ratio[i] for ratio in ratios) for i in range(3))
    return Spread(median, low, high)


def interleaved(
    contenders: Mapping[str, Step],
    *,
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    min_sample: float = MIN_SAMPLE_SECONDS,
    before: Step | None = None,
    agree: Callable[[int], int] | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time each contender once a round, in an order that is drawn for each round, the same in all processes.

    In a fixed order, or one that rotates, each would find the caches as always the same one leaves them.

    On CUDA a sample is the time between two events around its calls, which follow one another without a pause, as
    layers do in a training step: where the host cannot launch as fast as the device works, that is part of the time.
    Nothing clears the L2 cache between calls; all contenders of a shape find the same one, and tensors that matter for
    bandwidth are larger than it.

    Args:
        contenders: functions of no argument, by name.
        rounds: samples of each.
        device: where the work is done.
        warmup: calls of each before anything is timed; the last one says how many calls make a sample.
        min_sample: seconds that a sample takes at least, by repeating short calls.
        before: called before each sample, untimed, such as a barrier between processes.
        agree: given the calls a sample, returns those to make, such as the most that any process has found.
        clock: seconds; default is the device's own.
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got {rounds} and {warmup}")
    measure = _stopwatch(device, clock)
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    calls: dict[str, int] = {}
    collecting = gc.isenabled()
    gc.disable()  # a collection would hit one contender for all
    try:
        for name in names:
            for _ in range(warmup - 1):
                contenders[name]()
            if before is not None:
                before()
            once = measure(contenders[name], 1)
            wanted = min(MAX_CALLS, max(1, math.ceil(min_sample / max(once, 1e-9))))
            calls[name] = wanted if agree is None else agree(wanted)
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                if before is not None:
                    before()
                samples[name].append(measure(contenders[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(samples[name]), calls[name]) for name in names}


def _stopwatch(device: torch.device, clock: Clock | None) -> Callable[[Step, int], float]:
    """A function that makes some calls and returns the seconds that one took."""
    if clock is None and device.type == "cuda":
        return _time_by_events
    read = clock or time.perf_counter

    def measure(step: Step, calls: int) -> float:
        start = read()
        for _ in range(calls):
            step()
        return (read() - start) / calls

    return measure


def _time_by_events(step: Step, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / calls / 1e3
