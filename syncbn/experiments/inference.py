"""Which statistics one sample is normalized by, and averages in training (Ioffe and Szegedy 2015; Ioffe 2017)."""

from __future__ import annotations

import copy

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs, Trace
from syncbn.experiments.training import error_of, report_errors, trained, whole
from syncbn.study import Setting


class AverageNorm(nn.Module):
    """Normalization of (N, C, H, W) by running averages, also in training, where they follow the batches.

    The averages are constants in the backward pass, so no gradient goes through them.
    """

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        if self.training:
            with torch.no_grad():
                found_var, found_mean = torch.var_mean(x, dim=(0, 2, 3))
                mean.lerp_(found_mean, self.momentum)
                var.lerp_(found_var, self.momentum)
        return nn.functional.batch_norm(x, mean.clone(), var.clone(), self.weight, self.bias, eps=self.eps)


def run(setting: Setting) -> dict[str, float]:
    """Train a convolutional network, and test it an image at a time, with three kinds of statistics.

    ``error`` is the test error with running statistics; ``population``, with those of the training set; ``batch``, with
    those of each image, on ``images`` of the test set. With ``averages``, training normalizes by the running
    averages.
    """
    o = setting.options

    def network() -> nn.Module:
        layers: list[nn.Module] = []
        channels = 1
        for width in (o["width"], 2 * o["width"], 4 * o["width"]):
            norm = AverageNorm(width) if o["averages"] else nn.BatchNorm2d(width)
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), norm, nn.ReLU()]
            channels = width
        # The run replaces a BatchNorm: in each arm there is one of the inputs, which are standardized anyway.
        end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
        return nn.Sequential(nn.BatchNorm2d(1, affine=False), *layers, *end)

    result, model, sets = trained(setting, network)
    images, labels = whole(sets.test)
    report_errors(setting, result)
    kinds = {entry["statistics"]: entry["test"] for entry in result.evaluations}
    population = (kinds.get("population") or {}).get("error")
    some = slice(None, None, max(1, len(labels) // o["images"]))  # of all classes
    found = {"error": error_of(result), "batch": _error_one_by_one(model, images[some], labels[some])}
    return found | ({} if population is None else {"population": population})


@torch.no_grad()
def _error_one_by_one(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The error with the statistics of each image by itself."""
    copied = copy.deepcopy(model).train()
    guessed = torch.cat([copied(image[None]).argmax(1) for image in images])
    return float((guessed != labels).double().mean())


def figure(runs: Runs) -> Figure:
    """The test error along the training, and at its end by statistics."""
    drawn, (top, bottom) = panels(runs, 2, height=2.4)
    kinds = {"error": "running", "population": "population", "batch": "one image"}
    for arm in runs.study.arms:
        trace(top, runs, arm.name, runs.curve("error", arm.name), marked=True)
        found = {kind: runs.values(kind, arm.name) for kind in kinds}
        shown = [kind for kind in kinds if found[kind]]
        values = np.array([list(found[kind].values()) for kind in shown])
        trace(bottom, runs, arm.name, Trace([list(kinds).index(kind) for kind in shown], values), marked=True)
    top.set(ylabel="test error", xlabel="step", yscale="log")
    bottom.set(ylabel="test error", yscale="log", xlim=(-0.3, 2.3))
    bottom.set_xticks(range(len(kinds)), list(kinds.values()))
    return drawn
