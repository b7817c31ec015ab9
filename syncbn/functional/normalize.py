"""The elementwise step and its gradient. Shapes as in :mod:`syncbn.functional.stats`."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.functional.stats import WIRE_DTYPE, compute_dtype, merge_samples, per_sample, spread


def split_mean(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``mean`` (G, C) float64 as (the part that ``x``'s arithmetic can represent, the rest), both float64.

    ``x - mean`` is exact in float32 for values near the mean only if the mean is itself a float32; the rest is folded
    into the constant term. Without this an input with mean 1e4 and std 1 is shifted by up to 5e-4 standard deviations.
    """
    high = mean.to(compute_dtype(x)).to(WIRE_DTYPE)
    return high, mean - high


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor, shift: Tensor, groups: Tensor | None = None
) -> Tensor:
    """``(x - mean) * invstd * scale + shift``.

    Args:
        x: (N, C, *).
        mean, invstd, scale, shift: (G, C) float64.
        groups: (N,) int64 or None.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    high, low = split_mean(mean, x)
    slope = invstd * scale
    constant = shift - low * slope
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    return torch.addcmul(spread(constant, groups, x), centred, spread(slope, groups, x)).to(x.dtype)


def backward_sums(
    grad_output: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, groups: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * xhat)`` of each channel in each group, with ``xhat = (x - mean) * invstd``.

    Args:
        grad_output, x: (N, C, *).
        mean, invstd: (G, C) float64.
        groups: (N,) int64 or None.
        num_groups: G.

    Returns:
        Two (G, C) float64 tensors: the gradients of ``shift`` and ``scale`` from this process's samples.
    """
    high, low = split_mean(mean, x)
    dims = per_sample(x)
    dy = grad_output.to(compute_dtype(x))
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    product = dy * centred
    if dims:
        dy, product = dy.sum(dims), product.sum(dims)
    sums = merge_samples(torch.cat((dy, product), 1).to(WIRE_DTYPE), groups, num_groups)
    sum_dy, sum_dy_xmu = sums.chunk(2, 1)
    return sum_dy, (sum_dy_xmu - low * sum_dy) * invstd


def grad_input(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    groups: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`normalize` with respect to ``x``, through the mean and the variance as well.

    Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3, with the gradients of ``xhat`` already averaged.

    Args:
        grad_output, x: (N, C, *).
        mean, invstd, scale: (G, C) float64.
        mean_dy, mean_dy_xhat: (G, C) float64, ``scale * dy`` and ``scale * dy * xhat`` averaged over the whole group,
            all processes included.
        groups: (N,) int64 or None.

    Returns:
        ``invstd * (scale * dy - mean_dy - xhat * mean_dy_xhat)`` in the shape, dtype and memory format of ``x``.
    """
    high, low = split_mean(mean, x)
    slope_dy = invstd * scale
    slope_x = -invstd.square() * mean_dy_xhat
    constant = -invstd * mean_dy - slope_x * low
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    result = torch.addcmul(spread(constant, groups, x), centred, spread(slope_x, groups, x))
    return torch.addcmul(result, grad_output.to(compute_dtype(x)), spread(slope_dy, groups, x)).to(x.dtype)
