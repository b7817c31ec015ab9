"""Least squares with a batch normalization (Cai, Li and Shen 2019): which learning rates converge, and how fast."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.study import Setting
from syncbn.study.report.figures import arm_marks

LARGEST = 1e30
"""A gap from which a descent does not come back: it has diverged."""
TRIED = 60
"""Learning rates from which ``tuned`` takes the best, evenly spaced on a logarithmic axis."""


def run(setting: Setting) -> dict[str, float]:
    """Descend on ``E (y - f(x))^2 / 2`` with the exact gradient, where x has the covariance H and ``y = u' x``.

    ``f(x) = w' x`` for plain gradient descent, and ``a * w' x / sqrt(w' H w)``, which is the normalization by the
    whole population, with ``normalized``. H has eigenvalues from 1 / kappa to 1.

    Returns ``gap``, the excess loss after the last step relative to that of the start, at most 1e30; ``steps`` until it
    is below 1e-6; ``diverged``, 0 or 1. With ``tuned``, those of the learning rate that needs the fewest steps.
    """
    o = setting.options
    eigenvalues = torch.logspace(-math.log10(o["kappa"]), 0, o["dimensions"], dtype=torch.float64)
    u, w = torch.randn(2, o["dimensions"], dtype=torch.float64).unbind()
    rates = torch.logspace(-3, 3, TRIED).tolist() if o["tuned"] else [setting.config.optimizer.lr]
    found = [_descend(eigenvalues, u, w.clone(), rate, o["steps"], o["normalized"]) for rate in rates]
    best = min(found, key=lambda gaps: (_steps_to(1e-6, gaps, o["steps"]), gaps[-1]))
    for step in range(0, len(best), max(1, len(best) // 200)):
        setting.report(step, gap=best[step])
    steps = _steps_to(1e-6, best, o["steps"])
    return {"gap": best[-1], "steps": float(steps), "diverged": float(best[-1] >= LARGEST)}


def _descend(h: Tensor, u: Tensor, w: Tensor, rate: float, steps: int, normalized: bool) -> list[float]:
    """The relative gap before each step and after the last one."""
    g = h * u
    best = u @ g  # the loss of f = 0, from which what the optimum leaves is nothing
    a = (w @ g) / (w @ (h * w)).sqrt()
    gaps = []
    for _ in range(steps + 1):
        sigma = (w @ (h * w)).sqrt()
        effective = a * w / sigma if normalized else w
        difference = effective - u
        gap = float(difference @ (h * difference) / best)
        gaps.append(gap if gap < LARGEST else LARGEST)
        if not gap < LARGEST:
            return gaps
        if normalized:
            along = (w @ g) / sigma
            w, a = w + rate * a / sigma * (g - along / sigma * (h * w)), a + min(rate, 1.0) * (along - a)
        else:
            w = w + rate * (g - h * w)
    return gaps


def _steps_to(level: float, gaps: list[float], most: int) -> int:
    return next((step for step, gap in enumerate(gaps) if gap < level), most)


def figure(runs: Runs) -> Figure:
    """The gap after the last step against the learning rate, and the steps that it takes; dashed, at the best rate."""
    drawn, axes = panels(runs, 2)
    for each, quantity, label in zip(axes, ("gap", "steps"), ("gap after the last step", "steps to 1e-6"), strict=True):
        for arm in runs.study.arms:
            if not arm.only:
                trace(each, runs, arm.name, runs.along(quantity, arm.name, "optimizer.lr"), marked=True)
        each.set(xscale="log", yscale="log", ylabel=label, xlabel="learning rate x largest eigenvalue")
    for arm in runs.study.arms:
        if arm.only and (steps := runs.values("steps", arm.name)):
            colour = arm_marks(runs.study)[arm.name].colour
            axes[1].axhline(sum(steps.values()) / len(steps), color=colour, linestyle="--", linewidth=1.5)
    axes[0].set_ylim(1e-32, 1e32)
    return drawn
