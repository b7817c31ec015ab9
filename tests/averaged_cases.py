"""Models whose weights are averaged, and the population statistics of a model written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import syncbn
from syncbn.compat import import_timm

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "sync": syncbn.SyncBatchNorm,
    "ghost": lambda c: syncbn.GhostBatchNorm(c, 20, remainder="smaller"),
    "renorm": lambda c: syncbn.BatchRenorm(c, momentum=0.1, warmup_steps=4, r_ramp_end=5, d_ramp_end=5),
    "renorm-sync": lambda c: syncbn.BatchRenorm(c, sync=True, momentum=0.1, warmup_steps=4, r_ramp_end=5, d_ramp_end=5),
    "torch": nn.BatchNorm1d,
}


def model_of(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), LAYERS[kind](4), nn.Tanh(), nn.Linear(4, 3), LAYERS[kind](3)).double()


def batch(step: int, samples: int) -> Tensor:
    """(samples, 5)"""
    return 2 + torch.randn(samples, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def average(model: nn.Module, how: str) -> tuple[Any, Callable[[], None]]:
    """An averaged model, and what to call after each step."""
    if "timm" in how:
        ema = import_timm("utils").ModelEmaV3(model, decay=0.9, exclude_buffers="without" in how)
        first = iter([True])
        return ema, lambda: ema.set(model) if next(first, False) else ema.update(model)
    function = get_ema_multi_avg_fn(0.9) if "ema" in how else None
    averaged = AveragedModel(model, multi_avg_fn=function, use_buffers="with buffers" in how)
    return averaged, lambda: averaged.update_parameters(model)


def trained(
    kind: str,
    how: str | None,
    steps: int = 12,
    after: Callable[[nn.Module], None] | None = None,
    part: Callable[[Tensor], Tensor] = lambda x: x,
) -> Any:
    """The average over ``steps`` large steps of training on ``part`` of each batch; without ``how``, the model."""
    model = model_of(kind)
    averaged, update = (model, lambda: None) if how is None else average(model, how)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.5)
    for step in range(steps):
        optimizer.zero_grad()
        y = model(part(batch(step, 10)))
        (y * torch.linspace(1, 2, 3, dtype=y.dtype)).sin().square().mean().backward()
        optimizer.step()
        with torch.no_grad():  # the same on all ranks, and large, so that an average differs from the last weights
            model[0].weight.add_(torch.full_like(model[0].weight, 0.2))
        update()
        if after is not None:
            after(model)
    return averaged


def population(model: Any, batches: Sequence[Tensor], estimator: str = "total") -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of the inputs of both norms, each batch being normalized by itself, in float64."""
    found, inputs = [], list(batches)
    for linear in (model[0], model[3]):
        inputs = [linear(x).detach() for x in inputs]
        whole = torch.cat(inputs)
        variances = torch.stack([len(x) * x.var(0) for x in inputs]).sum(0) / len(whole)
        found.append((whole.mean(0), whole.var(0) if estimator == "total" else variances))
        inputs = [((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).tanh() for x in inputs]
    return found
