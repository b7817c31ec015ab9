"""The smoothing theorem (Santurkar et al. 2018, 4.1 and 4.2): the gradient and the curvature behind a normalization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn.experiments.drawing import log_axis, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.study import Setting


class Sides(NamedTuple):
    """The two sides of the theorems for a loss L of ``z = gamma * xhat + beta``, where y (m,) is the layer's input."""

    first: float
    """``|dL/dy|^2``"""
    bound: float
    """``gamma^2 / var * (|g|^2 - <1, g>^2 / m - <g, xhat>^2 / m)``, where g (m,) is dL/dz."""
    blog: float
    """The same with ``mean(g)^2`` and ``<g, xhat>^2 / sqrt(m)``, the form of the authors' blog."""
    second: float
    """``v' (d2L/dy2) v`` with ``v = dL/dy``."""
    second_bound: float
    """``gamma^2 / var * v' (d2L/dz2) v - gamma / (m var) * <g, xhat> |v|^2``"""


def run(setting: Setting) -> dict[str, float]:
    """The largest relative difference between the sides over random losses, and how often the blog's form is violated.

    With several logical GPUs, m, the mean and the variance are those of all of them, as a synchronized layer has them.
    """
    found = [_trial(setting) for _ in range(setting.options["trials"])]
    return {
        "first": max(abs(t.first - t.bound) / max(t.first, t.bound) for t in found),
        "second": max(abs(t.second - t.second_bound) / max(abs(t.second), abs(t.second_bound)) for t in found),
        "violated": sum(t.first > t.blog * (1 + 1e-9) for t in found) / len(found),
    }


def _trial(setting: Setting) -> Sides:
    m = setting.batch_size
    layer = nn.BatchNorm1d(1, eps=1e-14, dtype=torch.float64)
    nn.init.uniform_(layer.weight, 0.2, 3.0)
    nn.init.normal_(layer.bias)
    norm = setting.normalize(nn.Sequential(layer))
    mean, std = torch.randn(2, dtype=torch.float64).unbind()
    y = (10 * mean + std.exp() * torch.randn(m, dtype=torch.float64)).requires_grad_()
    mixing = torch.randn(m, m, dtype=torch.float64) / math.sqrt(m)
    weights = torch.randn(m, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return torch.tanh(mixing @ z + 0.3) @ weights

    v, hessian_v = _gradient_and_curvature(lambda y: loss(norm(y[:, None])[:, 0]), y, None)
    z = norm(y[:, None])[:, 0].detach().requires_grad_()
    g, hessian_of_z = _gradient_and_curvature(loss, z, v)
    gamma, var = float(layer.weight.detach()), y.detach().var(correction=0)
    xhat = (y.detach() - y.detach().mean()) / var.sqrt()
    along = g @ xhat
    factor = gamma**2 / var
    return Sides(
        first=float(v @ v),
        bound=float(factor * (g @ g - g.sum() ** 2 / m - along**2 / m)),
        blog=float(factor * (g @ g - g.mean() ** 2 - along**2 / math.sqrt(m))),
        second=float(hessian_v),
        second_bound=float(factor * hessian_of_z - gamma / (m * var) * along * (v @ v)),
    )


def _gradient_and_curvature(
    loss: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient g (m,) of ``loss`` and ``v' H v`` () along ``direction``, by default g itself."""
    (g,) = torch.autograd.grad(loss(at), at, create_graph=True)
    v = (g if direction is None else direction).detach()
    (product,) = torch.autograd.grad(g, at, v)
    return g.detach(), v @ product


def figure(runs: Runs) -> Figure:
    """The relative difference between the two sides, and the share of losses that violate the blog's form."""
    sizes = runs.study.axes["per_gpu_batch_size"]
    drawn, axes = panels(runs, 3)
    words = ("gradient: difference", "curvature: difference", "blog's form: violated")
    for each, quantity, label in zip(axes, ("first", "second", "violated"), words, strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.along(quantity, arm.name, "per_gpu_batch_size"), marked=True)
        each.set(ylabel=label, yscale="linear" if quantity == "violated" else "log")
        log_axis(each, sizes)
        each.set_xlabel("samples on each GPU")
    return drawn
