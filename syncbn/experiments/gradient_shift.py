"""Internal covariate shift of gradients (Santurkar et al. 2018, definition 2.1)."""

from __future__ import annotations

import copy

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, trained
from syncbn.study import Setting


def run(setting: Setting) -> dict[str, float]:
    """Compare each layer's gradient before and after the layers below it have taken their steps.

    Reports ``cosine``, of the two gradients, and ``distance``, of the two over the length of the first, as means over
    the layers but the first. Returns their means over the first tenth of the training (``early_...``) and over the last
    half (``late_...``), and the test ``error``.
    """
    o = setting.options
    seen: list[tuple[int, float, float]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if step % o["look_every"] == 0:
            cosine, distance = _shift(model, images, labels, setting.config.optimizer.lr)
            seen.append((step, cosine, distance))
            setting.report(step, cosine=cosine, distance=distance)

    activation = nn.Identity if o["linear"] else nn.ReLU
    result = trained(setting, lambda: Perceptron((784, o["width"], o["depth"], 10), activation, o["std"]), probe).result
    steps = setting.config.budget.steps
    assert steps is not None, "the experiment counts steps"
    found = {"error": error_of(result)}
    for prefix, low, high in (("early_", 0, steps / 10), ("late_", steps / 2, steps)):
        part = [s for s in seen if low <= s[0] < high]
        found |= {f"{prefix}cosine": sum(s[1] for s in part) / len(part)}
        found |= {f"{prefix}distance": sum(s[2] for s in part) / len(part)}
    return found


def _shift(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> tuple[float, float]:
    """Mean over the layers of the cosine, and of the relative distance."""
    walker = copy.deepcopy(model)
    layers = [layer for layer in walker.children() if isinstance(layer, nn.Linear)]
    groups = [list(layer.parameters()) for layer in layers]
    before = [_gradient(walker, group, images, labels) for group in groups]
    cosines, distances = [], []
    # Layer by layer, those below take the step of plain SGD; this one and those above stay.
    for i in range(1, len(groups)):
        with torch.no_grad():
            for p, g in zip(groups[i - 1], before[i - 1], strict=True):
                p.sub_(g, alpha=rate)
        first = torch.cat([g.flatten() for g in before[i]])
        second = torch.cat([g.flatten() for g in _gradient(walker, groups[i], images, labels)])
        cosines.append(float(cosine_similarity(first, second, dim=0)))
        distances.append(float((first - second).norm() / first.norm()))
    return sum(cosines) / len(cosines), sum(distances) / len(distances)


def _gradient(model: nn.Module, of: list[nn.Parameter], images: Tensor, labels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(cross_entropy(model(images), labels), of))


def figure(runs: Runs) -> Figure:
    """The cosine and the distance along the steps."""
    drawn, axes = panels(runs, 2, height=2.3)
    for each, quantity, label in zip(axes, ("cosine", "distance"), ("cosine", "relative distance"), strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve(quantity, arm.name))
        each.set_ylabel(label)
    axes[1].set(yscale="log", xlabel="step")
    return drawn
