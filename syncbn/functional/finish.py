"""From a step's reduced sums to all that the elementwise step needs, and the running statistics on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional.renorm import correction_limits, corrections, snapshot
from syncbn.functional.running import RunningUpdate, update_running
from syncbn.functional.stats import moments


class Running(NamedTuple):
    """A layer's running statistics and how a step enters them: the arguments of :func:`update_running`."""

    mean: Tensor
    """(C,) floating, as ``var``."""
    var: Tensor
    num_batches_tracked: Tensor
    """() int64, as ``num_nonfinite_batches``."""
    num_nonfinite_batches: Tensor
    momentum: float | None
    mode: RunningUpdate = "mean"
    divisor: float | None = None


class Limits(NamedTuple):
    """Renorm's limits and their ramps: the arguments of :func:`correction_limits`."""

    r_max: float
    d_max: float
    warmup_steps: int
    r_ramp_end: int
    d_ramp_end: int


@dataclass
class Statistics:
    """Of each group over all processes; float64."""

    count: Tensor
    """(G, 1); the others are (G, C)."""
    mean: Tensor
    var: Tensor
    """Biased."""
    invstd: Tensor
    r: Tensor | None
    d: Tensor | None


def finish(
    sums: Tensor, eps: float, running: Running | None = None, limits: Limits | None = None, update: bool = True
) -> Statistics:
    """Moments, renorm's corrections and the update of the running statistics, which are changed in place.

    Args:
        sums: (G, 2C + 1) float64, reduced.
        eps: added to the variance under the root.
        running: the running statistics, or None.
        limits: with them, r and d are computed, from the running statistics as they were before this step's update.
        update: whether to update the running statistics.

    Nothing of it is part of a gradient: r and d are constants, and what depends on the mean and the variance is in the
    backward pass of the elementwise step.
    """
    count, mean, var = moments(sums)
    invstd = torch.rsqrt(var + eps)
    r = d = None
    if limits is not None:
        assert running is not None, "corrections are relative to running statistics"
        before = (running.num_batches_tracked, running.mean, running.var)
        if torch.compiler.is_compiling():
            before = tuple(snapshot(buffer) for buffer in before)
        steps, running_mean, running_var = before
        r, d = corrections(mean, var, running_mean, running_var, eps, *correction_limits(steps, *limits))
    if running is not None and update:
        buffers, rule = running[:4], running[4:]
        update_running(*buffers, count, mean, var, *rule)
    return Statistics(count, mean, var, invstd, r, d)
