"""The elementwise step and its gradient. Shapes as in :mod:`syncbn.functional.statistics`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue, activate, activation_grad
from syncbn.functional.statistics import (
    ONE_GROUP,
    WIRE_DTYPE,
    Groups,
    compute_dtype,
    merge_samples,
    per_sample,
    spread,
)


class Affine(NamedTuple):
    """The normalization of each group and channel: ``(x - mean) * invstd * scale + shift``."""

    mean: Tensor
    """(G, C) float64."""
    invstd: Tensor
    """(G, C) float64."""
    scale: Tensor | None = None
    """(G, C) of any floating dtype and any strides; None is 1."""
    shift: Tensor | None = None
    """(G, C) of any floating dtype and any strides; None is 0."""


def split_mean(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``mean`` (G, C) float64 as the part that the arithmetic on ``x`` can represent and the rest, both float64.

    ``x - mean`` is exact in float32 for values near the mean only if the mean is itself a float32. The rest is added to
    the constant term. Without this an input with mean 1e4 and std 1 is shifted by up to 5e-4 standard deviations.
    """
    high = mean.to(compute_dtype(x)).to(WIRE_DTYPE)
    return high, mean - high


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, r: Tensor | None, d: Tensor | None, num_groups: int
) -> tuple[Tensor | None, Tensor | None]:
    """The factor and the offset of the normalized values: ``weight * r`` and ``weight * d + bias``, (G, C).

    Args:
        weight, bias: (C,); None is 1 or 0.
        r, d: (G, C) float64; both None are 1 and 0.
        num_groups: G.

    Returns:
        (G, C) floating, an expanded view of the parameter if there are no corrections, or None.
    """
    if r is None or d is None:
        scale, shift = (None if t is None else t.expand(num_groups, t.shape[0]) for t in (weight, bias))
        return scale, shift
    scale, shift = (r, d) if weight is None else (weight * r, weight * d)
    return scale, shift if bias is None else shift + bias


def normalize(x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """``activation((x - mean) * invstd * scale + shift + residual)``.

    Args:
        x: (N, C, *).
        affine: mean, invstd, scale and shift of each group.
        groups: the group of each sample.
        epilogue: residual and activation, if any.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    return activate(_preactivation(x, affine, groups, epilogue), epilogue).to(x.dtype)


def _preactivation(x: Tensor, affine: Affine, groups: Groups, epilogue: Epilogue) -> Tensor:
    """z, in the compute dtype of ``x``."""
    high, low = split_mean(affine.mean, x)
    slope = affine.invstd if affine.scale is None else affine.invstd * affine.scale
    constant = -low * slope if affine.shift is None else affine.shift - low * slope
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    z = torch.addcmul(spread(constant, groups, x), centred, spread(slope, groups, x))
    return z if epilogue.residual is None else z + epilogue.residual.to(z.dtype)


def backward_sums(
    grad_output: Tensor, x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, Epilogue, Tensor]:
    """``sum(dz)`` and ``sum(dz * xhat)`` of each channel in each group, with ``xhat = (x - mean) * invstd``.

    Args:
        grad_output, x: (N, C, *).
        affine, groups, epilogue: those of :func:`normalize`; scale and shift matter only if there is an activation.

    Returns:
        dz, the epilogue that is not part of dz yet, and the two sums, (G, 2, C) float64, which are the gradients of
        ``shift`` and ``scale`` from this process's samples. Here dz is the gradient with respect to z, which is also
        the residual's, and no epilogue is left. A kernel may instead return ``grad_output`` and leave the activation
        to :func:`grad_input`, which reads x anyway, if there is no residual.
    """
    dz = grad_output
    if epilogue.activation is not None:
        z = _preactivation(x, affine, groups, epilogue)
        dz = activation_grad(grad_output.to(z.dtype), z, epilogue).to(x.dtype)
    high, low = split_mean(affine.mean, x)
    dims = per_sample(x)
    dy = dz.to(compute_dtype(x))
    product = dy * (x.to(compute_dtype(x)) - spread(high, groups, x))
    if dims:
        dy, product = dy.sum(dims), product.sum(dims)
    sums = merge_samples(torch.cat((dy, product), 1).to(WIRE_DTYPE), groups)
    sum_dz, sum_dz_xmu = sums.chunk(2, 1)
    return dz, NO_EPILOGUE, torch.stack((sum_dz, (sum_dz_xmu - low * sum_dz) * affine.invstd), 1)


def grad_input(
    dz: Tensor,
    x: Tensor,
    affine: Affine,
    means: Tensor,
    groups: Groups = ONE_GROUP,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """Gradient of :func:`normalize` with respect to ``x``, including the paths through the mean and the variance.

    Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3, with the gradients of ``xhat`` already averaged.

    Args:
        dz, x: (N, C, *).
        affine, groups: those of :func:`normalize`; shift matters only if there is an activation.
        means: (G, 2, C) float64, ``scale * dz`` and ``scale * dz * xhat`` averaged over the group on all processes.
        epilogue: the part that :func:`backward_sums` left to this function; it has no residual.

    Returns:
        ``invstd * (scale * dz - means[:, 0] - xhat * means[:, 1])`` in the shape, dtype and memory format of ``x``.
    """
    if epilogue.activation is not None:
        z = _preactivation(x, affine, groups, epilogue)
        dz = activation_grad(dz.to(z.dtype), z, epilogue)
    invstd = affine.invstd
    high, low = split_mean(affine.mean, x)
    mean_dz, mean_dz_xhat = means.unbind(1)
    slope_dz = invstd if affine.scale is None else invstd * affine.scale
    slope_x = -invstd.square() * mean_dz_xhat
    constant = -invstd * mean_dz - slope_x * low
    centred = x.to(compute_dtype(x)) - spread(high, groups, x)
    result = torch.addcmul(spread(constant, groups, x), centred, spread(slope_x, groups, x))
    return torch.addcmul(result, dz.to(compute_dtype(x)), spread(slope_dz, groups, x)).to(x.dtype)
