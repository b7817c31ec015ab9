"""What the workers run in the layers' tests, and the truth that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.functional.epilogue import Epilogue, activate


@dataclass(frozen=True)
class Case:
    """A layer, and the pieces of a batch that the ranks hold, for a few steps of training."""

    layer: str
    sizes: Sequence[int]
    options: dict[str, Any] = field(default_factory=dict)
    shape: Sequence[int] = (3, 4, 5)
    """Channels and what follows."""
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    autocast: torch.dtype | None = None
    steps: int = 3
    loc: float = 10.0
    """Mean of the input in standard deviations."""
    residual: bool = False
    """Call the layer with a residual too."""


def batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Input and output gradient of a step, the whole batch's."""
    generator = torch.Generator().manual_seed(step)
    shape = (sum(case.sizes), *case.shape)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    offset = torch.linspace(-case.loc, case.loc, case.shape[0], dtype=torch.float64).reshape(-1, *(1,) * (x.dim() - 2))
    x, dy = (x + offset).to(case.dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x, dy


def set_affine(layer: nn.Module, dtype: torch.dtype) -> None:
    for name, low in (("weight", 0.5), ("bias", -1.0)):
        parameter = getattr(layer, name)
        if parameter is not None:
            with torch.no_grad():
                parameter.copy_(torch.linspace(low, low + 1.5, len(parameter), dtype=dtype))


def train_layer(case: Case) -> dict[str, Any]:
    """Train on this rank's pieces; outputs and input gradients of every step, summed parameter gradients, buffers."""
    rank = dist.get_rank()
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    layer = getattr(syncbn, case.layer)(case.shape[0], **case.options, dtype=wide)
    set_affine(layer, wide)
    start = sum(case.sizes[:rank])
    outputs, gradients, formats = [], [], []
    for step in range(case.steps):
        x, dy = (t[start : start + case.sizes[rank]].detach() for t in batch(case, step))
        x.requires_grad_()
        # The input itself is its residual too, read from other memory: its gradient then has both parts.
        with torch.autocast("cpu", case.autocast or torch.bfloat16, enabled=case.autocast is not None):
            y = layer(x, 2 * x) if case.residual else layer(x)
        y.backward(dy)
        outputs.append(y.detach())
        gradients.append(x.grad)
        formats.append(y.stride() == x.stride() and y.dtype == x.dtype and x.grad.stride() == x.stride())
    parameters = {name: p.grad for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())
    return {"y": outputs, "dx": gradients, "grad": parameters, "buffers": buffers, "layout": all(formats)}


def batchnorm(case: Case) -> nn.Module:
    """torch's layer for the case, in float64."""
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(case.shape) - 1]
    known = {k: v for k, v in case.options.items() if k in ("eps", "momentum", "affine", "track_running_stats")}
    layer = kind(case.shape[0], **known, dtype=torch.float64)
    if case.options.get("bias") is False:
        layer.register_parameter("bias", None)  # not every torch from 2.11 on has this argument
    set_affine(layer, torch.float64)
    return layer


def reference(case: Case, layer: nn.Module | None = None) -> dict[str, Any]:
    """``layer``, or else float64 ``nn.BatchNorm``, in one process on the whole batch."""
    layer = batchnorm(case) if layer is None else layer
    outputs, gradients = [], []
    for step in range(case.steps):
        x, dy = (t.detach().double() for t in batch(case, step))
        x.requires_grad_()
        y = layer(x) + 2 * x if case.residual else layer(x)
        y = activate(y, Epilogue(None, case.options.get("activation"), case.options.get("negative_slope", 0.01)))
        y.backward(dy)
        outputs.append(y.detach())
        gradients.append(x.grad)
    parameters = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": outputs, "dx": gradients, "grad": parameters, "buffers": dict(layer.named_buffers())}


def check_against(results: list[dict[str, Any]], truth: dict[str, Any], rtol: float, atol: float) -> None:
    """The ranks' results, put together, against the whole batch's."""
    for key in ("y", "dx"):
        for step, expected in enumerate(truth[key]):
            joined = torch.cat([r[key][step] for r in results]).double()
            torch.testing.assert_close(joined, expected, rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    for name, expected in truth["grad"].items():
        total = sum(r["grad"][name].double() for r in results)
        # A sum over the batch: its error grows with the number of terms, its size need not.
        torch.testing.assert_close(total, expected, rtol=rtol, atol=10 * atol, msg=lambda m, k=name: f"{k}: {m}")
    for result in results:
        for name, expected in truth["buffers"].items():
            torch.testing.assert_close(result["buffers"][name].to(expected.dtype), expected, rtol=rtol, atol=atol)
    assert all(result["layout"] for result in results), "output or gradient changed the memory format or dtype"
