"""Batch renormalization's corrections (Ioffe 2017, arXiv 1702.03275, algorithm 1 and section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """The limits of r and d, and the training steps at which their ramps begin and end."""

    r_max: float
    d_max: float
    warmup_steps: int
    r_ramp_end: int
    d_ramp_end: int


@torch.library.custom_op("syncbn::snapshot", mutates_args=())
def snapshot(buffer: Tensor) -> Tensor:
    """A copy of a buffer, as it was before the update, that a compiled graph keeps for its backward pass.

    The compiler would otherwise recompute r and d in the backward pass, from the updated buffer
    (pytorch/pytorch#197039). It never repeats an operator that it does not know.
    """
    return buffer.clone()


@snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


def ramp(steps: Tensor, start: int, end: int) -> Tensor:
    """0 until ``start`` steps, 1 from ``end`` on, linear in between. ``steps`` is () int64, the result () float64."""
    position = (steps.to(torch.float64) - start) / max(end - start, 1)
    # If start == end the limit holds from that step on; `position` alone would reach it one step later.
    return torch.where(steps >= end, 1.0, position.clamp(0.0, 1.0))


def correction_limits(steps: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """The limits in force after ``steps`` training steps: () float64 tensors (r_max, d_max).

    (1, 0), which is batch normalization, for ``warmup_steps``; then linear to ``r_max`` at ``r_ramp_end`` and to
    ``d_max`` at ``d_ramp_end`` (section 4.1 has 5k, 40k and 25k steps for limits of 3 and 5).
    """
    r_max, d_max, start, r_end, d_end = limits
    return 1.0 + (r_max - 1.0) * ramp(steps, start, r_end), d_max * ramp(steps, start, d_end)


def corrections(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_limit: Tensor,
    d_limit: Tensor,
) -> tuple[Tensor, Tensor]:
    """The clipped corrections r and d, which map batch statistics to running statistics.

    ``r = clip(sigma_B / sigma, 1/r_max, r_max)`` and ``d = clip((mean_B - mean) / sigma, -d_max, d_max)`` with
    ``sigma_B = sqrt(var + eps)`` and ``sigma = sqrt(running_var + eps)``.

    Args:
        mean, var: (G, C) float64, of the batch; the variance is biased. Both are constants for the gradient.
        running_mean, running_var: (C,), as they were before this step's update.
        eps: added to the variance under the root.
        r_limit, d_limit: () tensors from :func:`correction_limits`.

    Returns:
        r and d, (G, C) float64.
    """
    sigma = torch.sqrt(running_var.to(var.dtype) + eps)
    r = torch.sqrt(var + eps) / sigma
    d = (mean - running_mean.to(mean.dtype)) / sigma
    return torch.clamp(r, 1.0 / r_limit, r_limit), torch.clamp(d, -d_limit, d_limit)
