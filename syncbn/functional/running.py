"""Running statistics: the update of the exponential (or cumulative) moving averages from a step's groups."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from syncbn.functional.renorm import Limits

RunningUpdate = Literal["mean", "sequential", "total"]
"""How a step's groups enter the running statistics:

* ``mean``: one update with the average over groups of mean and unbiased variance;
* ``sequential``: one update for each group in turn, as gradient accumulation over ghost batches would do (Hoffer et al.
  2017, arXiv 1705.08741, algorithm 1);
* ``total``: one update with the mean and variance of all samples together.
"""


class Running(NamedTuple):
    """A layer's running statistics, and how a step updates and uses them."""

    mean: Tensor
    """(C,) floating."""
    var: Tensor
    """(C,) floating."""
    num_batches_tracked: Tensor
    """() int64."""
    num_nonfinite_batches: Tensor | None
    """() int64, or None if they are not counted."""
    momentum: float | None
    """Weight of the new value; None is a cumulative average."""
    mode: RunningUpdate = "mean"
    divisor: float | None = None
    """See :func:`group_average`. If given, the step counts as one with samples even if this process has none."""
    limits: Limits | None = None
    """If given, batch renormalization's r and d are computed, from the values before this step's update."""
    update: bool = True
    """Whether this step updates the statistics."""


def unbiased(var: Tensor, count: Tensor) -> Tensor:
    """The unbiased variance (G, C) from the biased one and the count (G, 1)."""
    return var * (count / (count - 1).clamp(min=1))


def group_average(count: Tensor, mean: Tensor, var: Tensor, divisor: float | None = None) -> tuple[Tensor, Tensor]:
    """The average mean and the average unbiased variance of the groups that have samples, each (C,).

    ``divisor`` replaces the number of such groups. If the processes of a run hold different numbers of groups, each
    divides by the average number: the mean over processes is then the mean over all groups.
    """
    filled = (count > 0).to(mean.dtype)
    number = filled.sum().clamp(min=1) if divisor is None else divisor
    weight = filled / number
    return (mean * weight).sum(0), (unbiased(var, count) * weight).sum(0)


def group_total(count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance, within plus between groups, of all samples together, each (C,)."""
    total = count.sum()
    weight = count / total.clamp(min=1)
    overall = (mean * weight).sum(0)
    spread = ((var + (mean - overall).square()) * weight).sum(0)
    return overall, unbiased(spread, total)


def sequential_weights(filled: Tensor, momentum: float | None, tracked: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of G updates in a row: the weight that the old value keeps, and each group's weight (G, 1).

    ``filled`` (G, 1) is 1 for groups that have samples and 0 for the others, which update nothing. ``tracked`` is the
    number of updates so far, which a cumulative average (``momentum`` None) needs.
    """
    number = filled.sum()
    if momentum is None:
        return tracked / (tracked + number).clamp(min=1), filled / (tracked + number).clamp(min=1)
    later = number - filled.long().cumsum(0)  # of integers: CUDA's cumsum of floats is not deterministic
    keep = 1.0 - momentum
    return keep**number, filled * momentum * keep**later


def update_running(running: Running, count: Tensor, mean: Tensor, var: Tensor) -> None:
    """Update the tensors of ``running`` in place, without a host synchronization.

    A step without any sample changes nothing. A step with a non-finite statistic is counted in
    ``num_nonfinite_batches`` and changes nothing else.

    Args:
        running: the buffers, and how they are updated.
        count, mean, var: (G, 1), (G, C), (G, C) float64; the biased variance.
    """
    present = count.sum() > 0 if running.divisor is None else torch.ones_like(count.sum(), dtype=torch.bool)
    if running.mode == "sequential":
        filled = (count > 0).to(mean.dtype)
        tracked = running.num_batches_tracked.to(mean.dtype)
        keep, weights = sequential_weights(filled, running.momentum, tracked)
        new_mean = running.mean * keep + (mean * weights).sum(0)
        new_var = running.var * keep + (unbiased(var, count) * weights).sum(0)
        _write(running, new_mean, new_var, filled.sum(), present)
    elif running.mode == "total":
        update_once(running, *group_total(count, mean, var), present)
    else:
        update_once(running, *group_average(count, mean, var, running.divisor), present)


def update_once(running: Running, mean: Tensor, var: Tensor, present: Tensor) -> None:
    """One update of ``running`` with a step's mean and unbiased variance, (C,) float64.

    ``present`` () bool tells whether the step had samples; without any, nothing changes.
    """
    tracked = running.num_batches_tracked.to(mean.dtype)
    factor = 1.0 / (tracked + 1.0) if running.momentum is None else running.momentum
    new_mean = running.mean + factor * (mean - running.mean)
    new_var = running.var + factor * (var - running.var)
    _write(running, new_mean, new_var, torch.ones_like(tracked), present)


def _write(running: Running, new_mean: Tensor, new_var: Tensor, updates: Tensor, present: Tensor) -> None:
    # Checked in the buffers' own dtype: a float64 statistic may overflow the float32 buffer.
    new_mean, new_var = new_mean.to(running.mean.dtype), new_var.to(running.var.dtype)
    finite = torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()
    accept = finite & present
    running.mean.copy_(torch.where(accept, new_mean, running.mean))
    running.var.copy_(torch.where(accept, new_var, running.var))
    running.num_batches_tracked.add_(torch.where(accept, updates, 0.0).to(running.num_batches_tracked.dtype))
    if running.num_nonfinite_batches is not None:
        running.num_nonfinite_batches.add_((present & ~finite).to(running.num_nonfinite_batches.dtype))
