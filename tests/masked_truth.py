"""The definition of a layer with a mask: each group's valid rows, gathered, are normalized in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.layers import SmallBatchNorm

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("SyncBatchNorm", {}),
    "ghost": ("GhostBatchNorm", {"ghost_batch_size": 2}),
    "renorm": ("BatchRenorm", {}),
    "renorm of ghosts": ("BatchRenorm", {"ghost_batch_size": 2}),
}
"""Class and options."""
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.01), "silu": F.silu}


def made(name: str, **options: Any) -> SmallBatchNorm:
    """A layer of three channels in float64, whose parameters and running statistics are not the first ones."""
    kind, own = LAYERS[name]
    if kind == "BatchRenorm":
        own = {**own, "warmup_steps": 0, "r_ramp_end": 0, "d_ramp_end": 0, "r_max": 1.5, "d_max": 0.5, "momentum": 0.1}
    layer: SmallBatchNorm = getattr(syncbn, kind)(3, **own, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.3, 0.0, -0.7]))
        layer.running_mean.copy_(torch.tensor([1.0, -1.0, 0.0]))
        layer.running_var.copy_(torch.tensor([1.0, 0.1, 2.0]))
    return layer


def groups_of(name: str, n: int) -> Tensor:
    """The group of each of a rank's ``n`` samples."""
    size = LAYERS[name][1].get("ghost_batch_size", max(n, 1))
    return torch.arange(n) // size


def by_definition(layer: nn.Module, x: Tensor, mask: Tensor, groups: Tensor, residual: Tensor | None = None) -> Tensor:
    """What ``layer`` returns in training for ``x`` (N, C, *), with a ``mask`` (N, *) and ``groups`` (N,).

    The running statistics of ``layer`` are updated. Its arithmetic is not used.
    """
    rows, means, variances = x.movedim(1, -1), [], []
    y = torch.zeros_like(rows)
    for group in groups.unique():
        here = mask & (groups == group).view(-1, *(1,) * (mask.dim() - 1))
        valid = rows[here]
        if not len(valid):
            continue
        mean, var = valid.mean(0), valid.var(0, correction=0)
        z = (valid - mean) / (var + layer.eps).sqrt()
        if isinstance(layer, syncbn.BatchRenorm):
            sigma = (layer.running_var + layer.eps).sqrt()
            r = ((var + layer.eps).sqrt() / sigma).clamp(1 / layer.r_max, layer.r_max)
            d = ((mean - layer.running_mean) / sigma).clamp(-layer.d_max, layer.d_max)
            z = z * r.detach() + d.detach()
        z = z * layer.weight + layer.bias
        if residual is not None:
            z = z + residual.movedim(1, -1)[here]
        y = y.index_put((here,), ACTIVATIONS[layer.activation](z))
        means.append(mean.detach())
        variances.append(valid.detach().var(0))
    if means:
        layer.running_mean.lerp_(torch.stack(means).mean(0), layer.momentum)
        layer.running_var.lerp_(torch.stack(variances).mean(0), layer.momentum)
        layer.num_batches_tracked += 1
    return y.movedim(-1, 1)


def draw(seed: int, *shape: int) -> Tensor:
    """Channels whose means are some standard deviations from zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 3


def draw_mask(seed: int, *shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
