"""Statistics in low precision: the variance of values far from zero, by formula and dtype."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from syncbn.experiments.drawing import log_axis, panels, positive, trace
from syncbn.experiments.runs import Runs
from syncbn.study import Setting

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def run(setting: Setting) -> dict[str, float]:
    """``error``, the relative error of the variance of ``values`` numbers with a standard deviation of 1.

    Its truth is the variance, in float64, of the numbers as the dtype has them: its rounding does not count.
    ``formula`` is ``squares``, ``E[x^2] - E[x]^2`` in the dtype; ``two_pass``, ``E[(x - E[x])^2]`` in the dtype;
    ``torch`` or ``syncbn``, the layer. The error is at most 1, and 1 where the result is no finite number.
    """
    o = setting.options
    x = (o["mean"] + torch.randn(o["values"], dtype=torch.float64)).to(DTYPES[o["dtype"]])
    truth = float(x.double().var(correction=0))
    found = float(_variance(x, o["formula"]))
    error = abs(found - truth) / truth if truth > 0 else float(found != 0)  # 0: rounding leaves one value
    return {"error": min(error, 1.0) if math.isfinite(found) else 1.0, "finite": float(math.isfinite(found))}


def _variance(x: Tensor, formula: str) -> Tensor:
    if formula == "squares":
        return (x * x).mean() - x.mean() ** 2
    if formula == "two_pass":
        return ((x - x.mean()) ** 2).mean()
    layer = nn.BatchNorm1d(1, momentum=1.0) if formula == "torch" else SyncBatchNorm(1, momentum=1.0)
    layer(x[:, None])
    assert layer.running_var is not None, "made with running statistics"
    return layer.running_var.detach()[0] * (len(x) - 1) / len(x)


def figure(runs: Runs) -> Figure:
    """The error against the mean, for each dtype."""
    dtypes, means = (runs.study.axes[f"task.options.{name}"] for name in ("dtype", "mean"))
    drawn, axes = panels(runs, len(dtypes))
    for each, dtype in zip(axes, dtypes, strict=True):
        for arm in runs.study.arms:
            place = {"task.options.dtype": dtype}
            found = positive(runs.along("error", arm.name, "task.options.mean", place))
            trace(each, runs, arm.name, found, marked=True)
        each.set(yscale="log", ylim=(1e-9, 2), xlabel="mean / standard deviation")
        log_axis(each, means)
        each.set_title(str(dtype))
    axes[0].set_ylabel("relative error")
    return drawn
