"""A problem that contenders are set: the tensors of one layer's step, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.bench.shapes import Shape

EPS = 1e-5
MOMENTUM = 0.1
R_MAX, D_MAX = 3.0, 5.0


@dataclass(frozen=True)
class Problem:
    """The step of a layer on this process. ``rank`` and ``world_size`` say which part of the whole batch it is."""

    shape: Shape
    x: Tensor
    """shape.size, in its memory format; not a leaf that requires a gradient."""
    grad_output: Tensor
    residual: Tensor
    weight: Tensor
    """(C,) float32, as ``bias``, ``running_mean`` and ``running_var``: layers keep them so whatever the input's dtype,
    and the running statistics are near the batch's, so that renorm corrects without clipping."""
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    groups: int
    """Ghost groups, of the contenders that have them."""
    rank: int
    world_size: int
    group: dist.ProcessGroup | None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def num_features(self) -> int:
        return self.shape.size[1]


def make_problem(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    groups: int = 32,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    mean: float = 0.3,
    std: float = 1.5,
) -> Problem:
    """Normal numbers that depend on the shape and the rank alone.

    Args:
        shape, dtype, device: of x.
        groups: ghost groups.
        rank: whose part of the batch; any process can make the others' parts too.
        group: the processes that share statistics, None for one alone.
        mean, std: of x.
    """
    generator = torch.Generator(device).manual_seed(1000 * shape.elements + rank)
    channels = torch.Generator(device).manual_seed(shape.size[1])

    def normal(size: tuple[int, ...], source: torch.Generator) -> Tensor:
        return torch.randn(size, generator=source, device=device)

    x, grad_output, residual = (normal(shape.size, generator) for _ in range(3))
    c = (shape.size[1],)
    return Problem(
        shape=shape,
        x=shape.arrange((x * std + mean).to(dtype)),
        grad_output=shape.arrange(grad_output.to(dtype)),
        residual=shape.arrange(residual.to(dtype)),
        weight=1 + 0.1 * normal(c, channels),
        bias=0.1 * normal(c, channels),
        running_mean=mean + 0.1 * normal(c, channels),
        running_var=std**2 * (1 + 0.1 * torch.rand(c, generator=channels, device=device)),
        groups=groups,
        rank=rank,
        world_size=1 if group is None else group.size(),
        group=group,
    )
