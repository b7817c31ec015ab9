"""Length and direction of normalized weights (Salimans and Kingma 2016; van Laarhoven 2017; Wan et al. 2021)."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, trained
from syncbn.study import Setting
from syncbn.study.report.figures import INK

SCALES = (0.01, 0.1, 10.0, 100.0)
"""Factors of the weights that must not change a normalized network."""


def run(setting: Setting) -> dict[str, float]:
    """Train a perceptron with weight decay, and look at the weights of its second layer.

    At the start: ``output``, the largest relative change of the network's outputs when the layer's weights are scaled
    by 0.01 to 100; ``slope``, the exponent p in ``|gradient| ~ scale^p``; ``orthogonal``, the cosine of a unit's
    weights and its gradient, the largest of all units. In the last fifth of the training: ``turn``, the angle of a step
    over ``sqrt(2 * lr * weight decay)``, where it settles in theory; and the test ``error``.
    """
    o = setting.options
    c = setting.config.optimizer
    found: dict[str, float] = {}
    before: list[Tensor] = []
    angles: list[tuple[int, float]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        w = _linear_layers(model)[1].weight.detach().double()
        if step == 0:
            found.update(_invariance(model, 1, images, labels))
        if before:
            cosine = cosine_similarity(before.pop(), w, dim=1).clamp(max=1)
            angles.append((step, float(torch.acos(cosine).square().mean().sqrt())))
        if step % 5 == 0:
            before.append(w.clone())
            setting.report(step, length=float(w.norm(dim=1).mean()), angle=angles[-1][1] if angles else math.nan)

    result = trained(setting, lambda: Perceptron((features(setting), 100, o["depth"], 10), eps=1e-12), probe).result
    settled = math.sqrt(2 * c.lr * c.weight_decay)
    late = [angle for step, angle in angles if step >= 0.8 * result.steps]
    return {"error": error_of(result), "turn": sum(late) / len(late) / settled, **found}


def _invariance(model: nn.Module, layer: int, images: Tensor, labels: Tensor) -> dict[str, float]:
    """How outputs and gradients, in float64, depend on the length of a layer's weights."""
    copied = copy.deepcopy(model).double()
    weight = _linear_layers(copied)[layer].weight
    kept = weight.detach().clone()
    outputs, gradients = [], []
    for scale in (1.0, *SCALES):
        with torch.no_grad():
            weight.copy_(kept * scale)
        y = copied(images.double())
        (g,) = torch.autograd.grad(cross_entropy(y, labels), weight)
        outputs.append(y.detach())
        gradients.append(g)
    change = max(float((y - outputs[0]).abs().max() / outputs[0].abs().max()) for y in outputs[1:])
    norms = torch.stack([g.norm() for g in gradients[1:]]).log()
    slope = np.polyfit(np.log(SCALES), norms.cpu().numpy(), 1)[0]
    return {"output": change, "slope": float(slope), "orthogonal": _largest_cosine(gradients[0], kept)}


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.children() if isinstance(module, nn.Linear)]


def _largest_cosine(first: Tensor, second: Tensor) -> float:
    return float(cosine_similarity(first, second, dim=1).abs().max())


def figure(runs: Runs) -> Figure:
    """The length of the weights and the angle of a step along the training; dashed is the angle of the theory."""
    drawn, axes = panels(runs, 2)
    for each, quantity, label in zip(
        axes, ("length", "angle"), ("length of a unit's weights", "angle of a step"), strict=True
    ):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve(quantity, arm.name))
        each.set(yscale="log", ylabel=label, xlabel="step")
    optimizer = runs.study.base["optimizer"]
    settled = math.sqrt(2 * optimizer["lr"] * optimizer["weight_decay"])
    axes[1].axhline(settled, color=INK, linestyle="--", linewidth=1)
    return drawn
