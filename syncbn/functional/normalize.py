"""The elementwise step and its gradient. Shapes as in :mod:`syncbn.functional.stats`."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue, activate, activation_grad
from syncbn.functional.stats import WIRE_DTYPE, compute_dtype, merge_samples, per_sample, spread


def split_mean(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``mean`` (G, C) float64 as (the part that ``x``'s arithmetic can represent, the rest), both float64.

    ``x - mean`` is exact in float32 for values near the mean only if the mean is itself a float32; the rest is folded
    into the constant term. Without this an input with mean 1e4 and std 1 is shifted by up to 5e-4 standard deviations.
    """
    high = mean.to(compute_dtype(x)).to(WIRE_DTYPE)
    return high, mean - high


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, r: Tensor | None, d: Tensor | None, num_groups: int
) -> tuple[Tensor | None, Tensor | None]:
    """What weight, bias and renorm's corrections amount to: ``weight * r`` and ``weight * d + bias``, (G, C).

    Args:
        weight, bias: (C,) or None, which is 1 or 0.
        r, d: (G, C) float64, or both None, which is 1 and 0.
        num_groups: G.

    Returns:
        (G, C) floating, an expanded view of the parameter where there are no corrections, or None.
    """
    if r is None or d is None:
        scale, shift = (None if t is None else t.expand(num_groups, t.shape[0]) for t in (weight, bias))
        return scale, shift
    scale, shift = (r, d) if weight is None else (weight * r, weight * d)
    return scale, shift if bias is None else shift + bias


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """``activation((x - mean) * invstd * scale + shift + residual)``.

    Args:
        x: (N, C, *).
        mean, invstd: (G, C) float64.
        scale, shift: (G, C) of any floating dtype and any strides, or None, which is 1 or 0.
        groups: (N,) int64 or None.
        epilogue: residual and activation, if any.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    return activate(_preactivation(x, mean, invstd, scale, shift, groups, epilogue), epilogue).to(x.dtype)


def _preactivation(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """z, in the compute dtype of ``x``."""
    high, low = split_mean(mean, x)
    slope = invstd if scale is None else invstd * scale
    constant = -low * slope if shift is None else shift - low * slope
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    z = torch.addcmul(spread(constant, groups, x), centred, spread(slope, groups, x))
    return z if epilogue.residual is None else z + epilogue.residual.to(z.dtype)


def backward_sums(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue = NO_EPILOGUE,
) -> tuple[Tensor, Epilogue, Tensor]:
    """``sum(dz)`` and ``sum(dz * xhat)`` of each channel in each group, with ``xhat = (x - mean) * invstd``.

    Args:
        grad_output, x: (N, C, *).
        mean, invstd, scale, shift, groups: as :func:`normalize`'s; scale and shift are looked at with an activation.
        num_groups: G.
        epilogue: that of the forward pass.

    Returns:
        dz and what of the epilogue is not in it yet, as :func:`grad_input` takes them: here dz is the gradient with
        respect to z, which is the residual's too, and nothing is left; without a residual a kernel may return
        ``grad_output`` itself and leave the activation to :func:`grad_input`, as both read x anyway. Then the two sums,
        (G, 2, C) float64: the gradients of ``shift`` and ``scale`` from this process's samples.
    """
    dz = grad_output
    if epilogue.activation is not None:
        z = _preactivation(x, mean, invstd, scale, shift, groups, epilogue)
        dz = activation_grad(grad_output.to(z.dtype), z, epilogue).to(x.dtype)
    high, low = split_mean(mean, x)
    dims = per_sample(x)
    dy = dz.to(compute_dtype(x))
    product = dy * (x.to(compute_dtype(x)) - spread(high, groups, x))
    if dims:
        dy, product = dy.sum(dims), product.sum(dims)
    sums = merge_samples(torch.cat((dy, product), 1).to(WIRE_DTYPE), groups, num_groups)
    sum_dz, sum_dz_xmu = sums.chunk(2, 1)
    return dz, NO_EPILOGUE, torch.stack((sum_dz, (sum_dz_xmu - low * sum_dz) * invstd), 1)


def grad_input(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    means: Tensor,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """Gradient of :func:`normalize` with respect to ``x``, through the mean and the variance as well.

    Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3, with the gradients of ``xhat`` already averaged.

    Args:
        dz, x: (N, C, *).
        mean, invstd, scale, shift, groups: as :func:`normalize`'s; shift is looked at with an activation.
        means: (G, 2, C) float64, ``scale * dz`` and ``scale * dz * xhat`` averaged over the whole group, all processes
            included.
        epilogue: what :func:`backward_sums` left to do to ``dz``; it has no residual.

    Returns:
        ``invstd * (scale * dz - means[:, 0] - xhat * means[:, 1])`` in the shape, dtype and memory format of ``x``.
    """
    if epilogue.activation is not None:
        z = _preactivation(x, mean, invstd, scale, shift, groups, epilogue)
        dz = activation_grad(dz.to(z.dtype), z, epilogue)
    high, low = split_mean(mean, x)
    mean_dz, mean_dz_xhat = means.unbind(1)
    slope_dz = invstd if scale is None else invstd * scale
    slope_x = -invstd.square() * mean_dz_xhat
    constant = -invstd * mean_dz - slope_x * low
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    result = torch.addcmul(spread(constant, groups, x), centred, spread(slope_x, groups, x))
    return torch.addcmul(result, dz.to(compute_dtype(x)), spread(slope_dz, groups, x)).to(x.dtype)
