"""Formulas as they stand in textbooks and in most projects, one eager operation after another.

They are what the layers are measured against, and what ``torch.compile`` is given. Written for plainness, not for
numerical care: E[x^2] - E[x]^2 loses the variance where the mean is large, which is part of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    count: int,
    eps: float,
    momentum: float,
    average: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Batch normalization of (N, C, *) by means of x and of its square, averaged over the processes.

    Args:
        x: (N, C, *), all processes' of one size.
        weight, bias, running_mean, running_var: (C,); the latter two are updated.
        count: elements a channel, over all processes.
        eps, momentum: as a layer's.
        average: both means (C,) to their averages over the processes.
    """
    dims = (0, *range(2, x.dim()))
    view = (1, -1, *(1,) * (x.dim() - 2))
    wide = x.float()
    mean, square = average(wide.mean(dims), wide.square().mean(dims))
    var = square - mean.square()
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / max(1, count - 1)), momentum)
    scale = weight * torch.rsqrt(var + eps)
    return ((wide - mean.view(view)) * scale.view(view) + bias.view(view)).to(x.dtype)


def batch_renorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
) -> Tensor:
    """Batch renormalization (Ioffe 2017) of (N, C, *) on one process, after its ramps. Arguments as above."""
    dims = (0, *range(2, x.dim()))
    view = (1, -1, *(1,) * (x.dim() - 2))
    wide = x.float()
    var, mean = torch.var_mean(wide, dims, correction=0)
    sigma_batch = torch.sqrt(var + eps)
    with torch.no_grad():
        sigma = torch.sqrt(running_var + eps)
        r = (sigma_batch / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
        count = x.numel() // max(1, x.shape[1])
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / max(1, count - 1)), momentum)
    normalized = (wide - mean.view(view)) / sigma_batch.view(view) * r.view(view) + d.view(view)
    return (normalized * weight.view(view) + bias.view(view)).to(x.dtype)


def ghost_loop(x: Tensor, layer: nn.Module, groups: int) -> Tensor:
    """A layer called on each of ``groups`` consecutive parts of the batch, as ghost batch normalization is pasted."""
    return torch.cat([layer(chunk) for chunk in x.chunk(groups)])
