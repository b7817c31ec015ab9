"""The tensors of one layer's training step, the same for all contenders."""

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
    """One process's part of a layer's step."""

    shape: Shape
    x: Tensor  # of ``shape.size``, in the shape's memory format; it does not require a gradient
    grad_output: Tensor
    residual: Tensor
    weight: Tensor
    """(C,) float32, as ``bias``, ``running_mean`` and ``running_var``, whatever the dtype of ``x``. The running
    statistics are close to the batch's, so that r and d of BatchRenorm are not clipped."""
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    groups: int  # number of ghost groups, for the contenders that have them
    group: dist.ProcessGroup | None  # the processes that share statistics; None for one process alone

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def num_features(self) -> int:
        return self.shape.size[1]

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else self.group.size()


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
    """Draw normal numbers that depend only on the shape and the rank; ``mean`` and ``std`` are those of x.

    Every process can make the parts of the other ranks too.
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
        group=group,
    )
