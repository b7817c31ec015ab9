"""The formulas as textbooks and most projects have them, one eager operation after another.

The layers are compared with them, and ``torch.compile`` is given them. They take no numerical care: E[x^2] - E[x]^2
loses the variance if the mean is large, and the bench shows that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.bench.problem import D_MAX, EPS, MOMENTUM, R_MAX


class LayerTensors(NamedTuple):
    """(C,) float32 each; the running statistics are updated in place."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def batch_norm(
    x: Tensor, layer: LayerTensors, count: int, average: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> Tensor:
    """Batch normalization of x (N, C, *), of one size on all processes, with ``count`` elements per channel in all.

    ``average`` maps the means (C,) of x and of its square to their averages over the processes.
    """
    dims, view = _dims(x)
    wide = x.float()
    mean, square = average(wide.mean(dims), wide.square().mean(dims))
    var = square - mean.square()
    _update(layer, mean, var, count)
    scale = layer.weight * torch.rsqrt(var + EPS)
    return ((wide - mean.view(view)) * scale.view(view) + layer.bias.view(view)).to(x.dtype)


def batch_renorm(x: Tensor, layer: LayerTensors) -> Tensor:
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275) of (N, C, *) on one process, after its warm-up."""
    dims, view = _dims(x)
    wide = x.float()
    var, mean = torch.var_mean(wide, dims, correction=0)
    sigma_batch = torch.sqrt(var + EPS)
    with torch.no_grad():
        sigma = torch.sqrt(layer.running_var + EPS)
        r = (sigma_batch / sigma).clamp(1 / R_MAX, R_MAX)
        d = ((mean - layer.running_mean) / sigma).clamp(-D_MAX, D_MAX)
    _update(layer, mean, var, x.numel() // max(1, x.shape[1]))
    normalized = (wide - mean.view(view)) / sigma_batch.view(view) * r.view(view) + d.view(view)
    return (normalized * layer.weight.view(view) + layer.bias.view(view)).to(x.dtype)


def _dims(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions to reduce over, and the shape in which a tensor (C,) broadcasts over x."""
    return (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))


def _update(layer: LayerTensors, mean: Tensor, var: Tensor, count: int) -> None:
    with torch.no_grad():
        layer.running_mean.lerp_(mean, MOMENTUM)
        layer.running_var.lerp_(var * (count / max(1, count - 1)), MOMENTUM)
