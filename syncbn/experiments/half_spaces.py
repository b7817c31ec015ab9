"""Learning a half-space from Gaussian inputs (Kohler et al. 2018): length and direction descended apart."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import expit
from torch import Tensor

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.study import Setting

_NODES = np.linspace(-10, 10, 20_001)  # many, as phi'' is narrow beside a long w
_WEIGHTS = np.exp(-(_NODES**2) / 2)


def run(setting: Setting) -> dict[str, float]:
    """Minimize ``E phi(w' z)`` for z with mean u and covariance S, with the exact gradient.

    By Stein's lemma the gradient is ``E[phi'] u + E[phi''] S w``, where both are expectations over one Gaussian
    variable, here by the trapezoidal rule. ``plain`` descends on w with the step that the largest curvature allows.
    ``decoupled`` is algorithm 1 of the paper: the direction with its adaptive step, then the length by bisection.

    Returns ``gap``, ``1 - cos^2`` of the angle to the best direction ``S^-1 u`` in the metric of S, at the end;
    ``halved``, the same after half of the steps; ``order``, the p in ``gap ~ steps^-p`` over the last half, which is
    bounded for a sublinear descent, and grows with the steps for a linear one.
    """
    o = setting.options
    d, steps = o["dimensions"], o["steps"]
    s = torch.logspace(-math.log10(o["kappa"]), 0, d, dtype=torch.float64)
    u = -s * torch.randn(d, dtype=torch.float64) / math.sqrt(d)
    w = torch.randn(d, dtype=torch.float64)
    w = w if u @ w < 0 else -w
    gaps = []
    for step in range(steps + 1):
        gap = float(1 - (u @ w) ** 2 / ((w @ (s * w)) * (u @ (u / s))))
        gaps.append(max(gap, 1e-16))
        if step % max(1, steps // 200) == 0:
            setting.report(step, gap=gaps[-1])
        w = _decoupled(w, u, s) if o["decoupled"] else _plain(w, u, s, o["loss"])
    halved = gaps[steps // 2]
    return {"gap": gaps[-1], "halved": halved, "order": math.log2(halved / gaps[-1])}


def _plain(w: Tensor, u: Tensor, s: Tensor, loss: str) -> Tensor:
    first, second = _expectations(float(u @ w), float((w @ (s * w)).sqrt()), loss)
    steepest = 0.25 if loss == "softplus" else 1 / (6 * math.sqrt(3))  # the largest |phi''|
    curvature = steepest * float(s.max() + u @ u)  # at least the largest eigenvalue of the Hessian
    return w - (first * u + second * s * w) / curvature


def _decoupled(w: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """A step of the direction. The length, which the bisection finds, does not enter it; it is kept at 1 in S."""
    squared, along = w @ (s * w), u @ w
    w = w + (squared / along * u - s * w) / s.max()
    return w / (w @ (s * w)).sqrt()


def _expectations(mean: float, std: float, loss: str) -> tuple[float, float]:
    """``E phi'`` and ``E phi''`` of a Gaussian variable."""
    p = expit(mean + std * _NODES)
    slope = p if loss == "softplus" else p * (1 - p)
    bend = p * (1 - p) if loss == "softplus" else p * (1 - p) * (1 - 2 * p)
    total = _WEIGHTS.sum()
    return float(_WEIGHTS @ slope / total), float(_WEIGHTS @ bend / total)


def figure(runs: Runs) -> Figure:
    """The gap along the steps, for each loss."""
    drawn, axes = panels(runs, 2)
    for each, loss in zip(axes, runs.study.axes["task.options.loss"], strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve("gap", arm.name, {"task.options.loss": loss}))
        each.set(yscale="log", ylabel="1 - cos² of the angle", xlabel="step")
        each.set_title({"softplus": "logistic loss"}.get(str(loss), f"{loss} loss"))
    return drawn
