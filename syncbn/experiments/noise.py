"""Batch normalization with noise behind it (Santurkar et al. 2018, section 2.1): does stability make it fast?"""

from __future__ import annotations

import itertools

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, report_errors, trained
from syncbn.study import Setting

MEAN, STD, SPREAD = 0.5, 1.25, 0.1
"""Of the noise in appendix A of the paper: largest mean, largest standard deviation, and their spread over samples."""


class Noise(nn.Module):
    """In training, ``s * x + m``; each unit and sample (N, C) has its own, from a distribution that changes each step.

    The mean of m is drawn from [-0.5, 0.5] and that of s from [1, 1.25] for each unit and step; the samples' own values
    are spread around them by 0.1.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mean = torch.empty_like(x[:1]).uniform_(-MEAN, MEAN)
        scale = torch.empty_like(x[:1]).uniform_(1, STD)
        m = mean + torch.empty_like(x).uniform_(-SPREAD, SPREAD)
        s = scale + SPREAD * torch.randn_like(x)
        return s * x + m


def noisy(model: nn.Module) -> nn.Module:
    """``model`` with a noise behind each batch normalization."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, nn.Sequential(child, Noise()))
    return model


def run(setting: Setting) -> dict[str, float]:
    """Train a deep perceptron; ``error`` of the test set, and how unstable the inputs of its last layer are.

    ``instability`` is the mean change, from one step to the next, of the mean of a unit's values over the batch, in the
    unit's standard deviation over the batch.
    """
    o = setting.options
    means: list[Tensor] = []

    def prepare(model: nn.Module) -> nn.Module:
        last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        last.register_forward_pre_hook(note)
        return noisy(model) if o["noise"] else model

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            x = inputs[0].detach()
            means.append(torch.stack((x.mean(0), x.std(0))))

    sizes = (features(setting), 100, o["depth"], 10)
    result = trained(setting, lambda: Perceptron(sizes), prepare=prepare).result
    changes = [(b[0] - a[0]).abs() / (a[1] + 1e-6) for a, b in itertools.pairwise(means)]
    report_errors(setting, result)
    kept = [c[c < 100].mean() for c in changes]  # not of units that are dead in a batch
    return {"error": error_of(result), "instability": float(torch.stack(kept).nanmean())}


def figure(runs: Runs) -> Figure:
    """The test error along the steps, for each learning rate."""
    rates = runs.study.axes["optimizer.lr"]
    drawn, axes = panels(runs, len(rates))
    for each, rate in zip(axes, rates, strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve("error", arm.name, {"optimizer.lr": rate}), marked=True)
        each.set(yscale="log", ylabel="test error", xlabel="step")
        each.set_title(f"learning rate {rate:g}")
    return drawn
