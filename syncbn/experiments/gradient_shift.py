"""Internal covariate shift of gradients (Santurkar et al. 2018, definition 2.1)."""

from __future__ import annotations

import copy
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, trained
from syncbn.study import Setting


def run(setting: Setting) -> dict[str, float]:
    """Compare each layer's gradient before and after the layers below it have taken their steps.

    Reports ``cosine``, of the two gradients, ``distance``, of the two, and ``relative``, the distance over the length
    of the first, as means over the layers but the first. Returns their means over the first tenth of the training
    (``early_...``) and over the last half (``late_...``), and the test ``error``.
    """
    o = setting.options
    seen: list[tuple[int, dict[str, float]]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if step % o["look_every"] == 0:
            found = shift_of_gradients(model, images, labels, setting.config.optimizer.lr)
            seen.append((step, found))
            setting.report(step, **found)

    # Each weight matrix keeps the second moment of what goes through it: He et al.'s factor 2 is for ReLU.
    sizes, scale = (features(setting), o["width"], o["depth"], 10), math.sqrt(0.5)
    result = trained(setting, lambda: Perceptron(sizes, nn.Identity, scale=scale), probe).result
    steps = setting.config.budget.steps
    assert steps is not None, "the experiment counts steps"
    found = {"error": error_of(result)}
    for prefix, low, high in (("early_", 0, steps / 10), ("late_", steps / 2, steps)):
        part = [values for step, values in seen if low <= step < high]
        found |= {prefix + name: sum(values[name] for values in part) / len(part) for name in part[0]}
    return found


def shift_of_gradients(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> dict[str, float]:
    """``cosine``, ``distance`` and ``relative``, as means over the layers but the first."""
    walker = copy.deepcopy(model)
    groups: list[list[nn.Parameter]] = []
    for layer in walker.children():  # a layer's normalization belongs to it
        groups.extend([[]] if isinstance(layer, nn.Linear) else [])
        if groups:
            groups[-1].extend(layer.parameters())
    before = [_gradient(walker, group, images, labels) for group in groups]
    total = dict.fromkeys(("cosine", "distance", "relative"), 0.0)
    # Layer by layer, those below take the step of plain SGD; this one and those above stay.
    for i in range(1, len(groups)):
        with torch.no_grad():
            for p, g in zip(groups[i - 1], before[i - 1], strict=True):
                p.sub_(g, alpha=rate)
        first = torch.cat([g.flatten() for g in before[i]])
        second = torch.cat([g.flatten() for g in _gradient(walker, groups[i], images, labels)])
        total["cosine"] += float(cosine_similarity(first, second, dim=0))
        total["distance"] += float((first - second).norm())
        total["relative"] += float((first - second).norm() / first.norm())
    return {name: value / (len(groups) - 1) for name, value in total.items()}


def _gradient(model: nn.Module, of: list[nn.Parameter], images: Tensor, labels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(cross_entropy(model(images), labels), of))


def figure(runs: Runs) -> Figure:
    """The cosine and the distances along the steps."""
    drawn, axes = panels(runs, 3)
    words = {"cosine": "cosine", "distance": "distance", "relative": "distance / length"}
    for each, (quantity, label) in zip(axes, words.items(), strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve(quantity, arm.name))
        each.set(ylabel=label, xlabel="step", yscale="linear" if quantity == "cosine" else "log")
    return drawn
