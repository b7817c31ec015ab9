"""From a step's reduced sums to the arguments of the elementwise step, and the update of the running statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional.renorm import correction_limits, corrections, snapshot
from syncbn.functional.running import Running, update_running
from syncbn.functional.statistics import moments


class Statistics(NamedTuple):
    """Statistics of each group over all processes, float64."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """(G, 1), elements per channel."""
    mean: Tensor
    """(G, C)."""
    invstd: Tensor
    """(G, C), ``1 / sqrt(var + eps)``."""
    r: Tensor | None = None
    """(G, C), batch renormalization's correction; None if the layer has none."""
    d: Tensor | None = None
    """(G, C), as r."""
    var: Tensor | None = None
    """(G, C), biased; None if nothing reads it."""


def finish(sums: Tensor, eps: float, running: Running | None = None) -> Statistics:
    """Moments, renorm's corrections, and the update of the running statistics, which are changed in place.

    All results are constants for autograd: the backward pass of the elementwise step contains the derivatives with
    respect to the mean and the variance, and r and d are constants by definition.

    Args:
        sums: (G, 2C + 1) float64, reduced over the processes.
        eps: added to the variance under the root.
        running: the running statistics, or None.
    """
    count, mean, var = moments(sums)
    invstd = torch.rsqrt(var + eps)
    r = d = None
    if running is not None and running.limits is not None:
        before = (running.num_batches_tracked, running.mean, running.var)
        if torch.compiler.is_compiling():
            before = tuple(snapshot(buffer) for buffer in before)
        steps, running_mean, running_var = before
        r, d = corrections(mean, var, running_mean, running_var, eps, *correction_limits(steps, running.limits))
    if running is not None and running.update:
        update_running(running, count, mean, var)
    return Statistics(count, mean, invstd, r, d, var)
