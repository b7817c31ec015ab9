"""Running statistics: one update of the exponential (or cumulative) moving averages from a step's groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RunningUpdate = Literal["mean", "sequential", "total"]


def unbiased(var: Tensor, count: Tensor) -> Tensor:
    """The unbiased variance (G, C) from the biased one and the count (G, 1)."""
    return var * (count / (count - 1).clamp(min=1))


def group_average(count: Tensor, mean: Tensor, var: Tensor, divisor: float | None = None) -> tuple[Tensor, Tensor]:
    """Mean over the groups that hold samples of their means and of their unbiased variances, each (C,).

    ``divisor`` replaces the number of such groups: where the processes of a run hold different numbers of groups, each
    divides by the average number, so that the mean over processes is the mean over all groups.
    """
    filled = (count > 0).to(mean.dtype)
    number = filled.sum().clamp(min=1) if divisor is None else divisor
    weight = filled / number
    return (mean * weight).sum(0), (unbiased(var, count) * weight).sum(0)


def group_total(count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all groups' samples together, each (C,): within plus between."""
    total = count.sum()
    weight = count / total.clamp(min=1)
    overall = (mean * weight).sum(0)
    spread = ((var + (mean - overall).square()) * weight).sum(0)
    return overall, unbiased(spread, total)


def sequential_weights(filled: Tensor, momentum: float | None, tracked: Tensor) -> tuple[Tensor, Tensor]:
    """What G updates in a row amount to: the weight that the old value keeps, and each group's weight (G, 1).

    ``filled`` (G, 1) is 1 for groups that hold samples and 0 for those that do not, which update nothing. ``tracked``
    is the number of updates so far, which a cumulative average (``momentum`` None) needs.
    """
    number = filled.sum()
    if momentum is None:
        return tracked / (tracked + number).clamp(min=1), filled / (tracked + number).clamp(min=1)
    later = number - filled.cumsum(0)
    keep = 1.0 - momentum
    return keep**number, filled * momentum * keep**later


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    num_nonfinite_batches: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    mode: RunningUpdate = "mean",
    divisor: float | None = None,
) -> None:
    """Update the four buffers in place, without a host synchronization.

    Args:
        running_mean, running_var: (C,) floating.
        num_batches_tracked, num_nonfinite_batches: () int64.
        count, mean, var: (G, 1), (G, C), (G, C) float64; the biased variance.
        momentum: weight of the new value; None is the cumulative average.
        mode: ``mean`` takes one update with the average over groups of mean and unbiased variance; ``sequential`` one
            update for each group in turn, as gradient accumulation over ghost batches would (Hoffer et al. 2017, arXiv
            1705.08741, algorithm 1); ``total`` one update with the mean and variance of all samples together.
        divisor: see :func:`group_average`; given, the step counts as one with samples even if this process has none.

    A step without any sample changes nothing. A step with a non-finite statistic changes nothing either, save that it
    is counted in ``num_nonfinite_batches``.
    """
    tracked = num_batches_tracked.to(mean.dtype)
    filled = (count > 0).to(mean.dtype)
    if mode == "sequential":
        keep, weights = sequential_weights(filled, momentum, tracked)
        new_mean = running_mean * keep + (mean * weights).sum(0)
        new_var = running_var * keep + (unbiased(var, count) * weights).sum(0)
        updates = filled.sum()
    else:
        step_mean, step_var = (
            group_total(count, mean, var) if mode == "total" else group_average(count, mean, var, divisor)
        )
        factor = 1.0 / (tracked + 1.0) if momentum is None else momentum
        new_mean = running_mean + factor * (step_mean - running_mean)
        new_var = running_var + factor * (step_var - running_var)
        updates = torch.ones_like(tracked)
    present = count.sum() > 0 if divisor is None else torch.ones_like(tracked, dtype=torch.bool)
    # Finite in the buffers' own dtype: a float64 statistic may overflow the float32 that keeps it.
    new_mean, new_var = new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)
    finite = torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()
    accept = finite & present
    running_mean.copy_(torch.where(accept, new_mean, running_mean))
    running_var.copy_(torch.where(accept, new_var, running_var))
    num_batches_tracked.add_(torch.where(accept, updates, 0.0).to(num_batches_tracked.dtype))
    num_nonfinite_batches.add_((present & ~finite).to(num_nonfinite_batches.dtype))
