"""The small step on the CPU: few operations, as each costs as much as some thousand elements of the large ones."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.functional import finish as reference
from syncbn.functional.finish import Limits, Running, Statistics

LARGE = 1e30
"""A variance or mean square beyond this may be infinite in a float32 buffer: the twin looks at it closely."""


def finish(
    sums: Tensor, eps: float, running: Running | None = None, limits: Limits | None = None, update: bool = True
) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`; for one group, whose count the host can read, in few operations."""
    count = sums[:, :1].clone()  # what is kept for the backward pass must not keep the sums alive
    n = float(count) if len(sums) == 1 else 0.0
    if n < 2 or sums.shape[1] == 1 or (running is not None and (running.mode != "mean" or running.divisor is not None)):
        return reference.finish(sums, eps, running, limits, update)
    if not float(torch.linalg.vector_norm(sums, torch.inf)) / n < LARGE:
        return reference.finish(sums, eps, running, limits, update)
    total, squares = sums[:, 1:].chunk(2, 1)
    mean = total / n
    var = (squares / n).addcmul_(mean, mean, value=-1).clamp_(min=0)
    invstd = (var + eps).rsqrt_()
    r = d = None
    if limits is not None:
        assert running is not None, "corrections are relative to running statistics"
        r, d = host_corrections(mean, invstd, running, eps, limits)
    if running is not None and update:
        update_running(running, mean[0], var[0], n)
    return Statistics(count, mean, var, invstd, r, d)


def update_running(running: Running, mean: Tensor, var: Tensor, n: float) -> None:
    """One update with the mean and biased variance (C,) of ``n`` > 1 values, which are finite in the buffers' dtype."""
    move_running(running, mean, var * (n / (n - 1.0)))


def move_running(running: Running, mean: Tensor, unbiased_var: Tensor) -> None:
    """One update with these (C,), which are finite in the buffers' dtype."""
    new = (mean.to(running.mean.dtype), unbiased_var.to(running.var.dtype))
    torch._foreach_lerp_([running.mean, running.var], new, weight_of_new(running))
    running.num_batches_tracked.add_(1)


def weight_of_new(running: Running) -> float:
    """The momentum, or what it comes to at this step of a cumulative average."""
    if running.momentum is None:
        return 1.0 / (float(running.num_batches_tracked) + 1.0)
    return running.momentum


def host_corrections(
    mean: Tensor, invstd: Tensor, running: Running, eps: float, limits: Limits
) -> tuple[Tensor, Tensor]:
    """As :func:`syncbn.functional.renorm.corrections`, from (G, C) or (C,), with the limits as numbers."""
    r_limit, d_limit = _host_limits(running, limits)
    invsigma = (running.var.to(mean.dtype) + eps).rsqrt_()
    r = (invsigma / invstd).clamp_(1.0 / r_limit, r_limit)
    d = (mean - running.mean).mul_(invsigma).clamp_(-d_limit, d_limit)
    return r, d


def _host_limits(running: Running, limits: Limits) -> tuple[float, float]:
    """As :func:`syncbn.functional.renorm.correction_limits`, as numbers."""
    steps = int(running.num_batches_tracked)
    r_part = _ramp(steps, limits.warmup_steps, limits.r_ramp_end)
    return 1.0 + (limits.r_max - 1.0) * r_part, limits.d_max * _ramp(steps, limits.warmup_steps, limits.d_ramp_end)


def _ramp(steps: int, start: int, end: int) -> float:
    """As :func:`syncbn.functional.renorm.ramp`, of a number."""
    return 1.0 if steps >= end else max(0.0, (steps - start) / max(end - start, 1))
