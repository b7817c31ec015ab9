"""The loss along the gradient (Santurkar et al. 2018, section 3.1)."""

from __future__ import annotations

import copy

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from syncbn.experiments.drawing import band, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, trained
from syncbn.study import Setting

FACTORS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Step sizes at which the loss is looked at, in learning rates, as in the paper."""


def run(setting: Setting) -> dict[str, float]:
    """Walk from a point of the training along its gradient, on its batch, and back.

    Reports ``lowest`` and ``highest``, the smallest and largest loss on the way; ``change``, the largest distance of
    the gradient from that of the start; ``beta``, the largest such distance over the length of the way. Returns the
    means of ``range``, the largest minus the smallest loss, and of the other two over the first hundred steps
    (``early_...``) and over the rest, and the test ``error``.
    """
    o = setting.options
    seen: list[tuple[int, float, float, float]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if step % o["look_every"] == 0:
            (lowest, highest), change, beta = _walk(model, images, labels, setting.config.optimizer.lr)
            seen.append((step, highest - lowest, change, beta))
            setting.report(step, lowest=lowest, highest=highest, change=change, beta=beta)

    result = trained(setting, lambda: Perceptron((features(setting), 100, o["depth"], 10)), probe).result
    found = {"error": error_of(result)}
    for i, name in enumerate(("range", "change", "beta"), start=1):
        for prefix, part in (("early_", [s[i] for s in seen if s[0] < 100]), ("", [s[i] for s in seen if s[0] >= 100])):
            found[prefix + name] = sum(part) / len(part)
    return found


def _walk(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> tuple[tuple[float, float], float, float]:
    walker = copy.deepcopy(model)
    parameters = list(walker.parameters())
    start = [p.detach().clone() for p in parameters]
    loss, gradient = _loss_and_gradient(walker, images, labels)
    length = _norm(gradient)
    losses, changes, betas = [loss], [0.0], [0.0]
    for factor in FACTORS:
        with torch.no_grad():
            for p, w, g in zip(parameters, start, gradient, strict=True):
                p.copy_(w - factor * rate * g)
        loss, there = _loss_and_gradient(walker, images, labels)
        losses.append(loss)
        changes.append(_norm([a - b for a, b in zip(there, gradient, strict=True)]))
        betas.append(changes[-1] / (factor * rate * length))
    return (min(losses), max(losses)), max(changes), max(betas)


def _loss_and_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    loss = cross_entropy(model(images), labels)
    return float(loss.detach()), list(torch.autograd.grad(loss, list(model.parameters())))


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def figure(runs: Runs) -> Figure:
    """The losses on the way, and the two quantities of the gradient, along the steps."""
    drawn, axes = panels(runs, 3)
    for arm in runs.study.arms:
        band(axes[0], runs, arm.name, runs.curve("lowest", arm.name), runs.curve("highest", arm.name))
        trace(axes[1], runs, arm.name, runs.curve("change", arm.name))
        trace(axes[2], runs, arm.name, runs.curve("beta", arm.name))
    words = ("losses along the gradient", "change of the gradient", "effective beta")
    for each, label in zip(axes, words, strict=True):
        each.set(yscale="log", ylabel=label, xlabel="step")
    return drawn
