"""Gradients through depth, by batch size (Yang et al. 2019): how much they grow from layer to layer at the start."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn.experiments.drawing import log_axis, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.study import Setting
from syncbn.study.report.figures import arm_marks


class Layer(nn.Module):
    """``activation(norm(W x))``, or the same added to x."""

    def __init__(self, width: int, activation: str, scale: float, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=torch.float64)
        gain = 2.0 if activation == "relu" else 1.0  # keeps the second moment without a norm (He et al. 2015)
        nn.init.normal_(self.linear.weight, std=scale * math.sqrt(gain / width))
        self.norm = nn.BatchNorm1d(width, eps=1e-12, dtype=torch.float64)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.linear(x)))
        return x + y if self.residual else y


def run(setting: Setting) -> dict[str, float]:
    """The squared norm of the gradient of each layer's output, and its growth from layer to layer.

    ``growth`` is the factor by which it grows in one layer towards the input, from a line through the logarithms of all
    layers but the first and last tenth; ``ratio`` that from the last layer to the first.
    """
    o = setting.options
    depth, width = o["depth"], o["width"]
    layers = [Layer(width, o["activation"], o["scale"], o["residual"]) for _ in range(depth)]
    network = setting.normalize(nn.Sequential(*layers)).to(setting.device).children()
    x, dy = torch.randn(2, setting.batch_size, width, dtype=torch.float64).to(setting.device)
    outputs = [x.requires_grad_()]
    for layer in network:
        outputs.append(layer(outputs[-1]))
    norms = [float(g.square().sum()) for g in torch.autograd.grad(outputs[-1], outputs, dy)]
    for i, norm in enumerate(norms[:-1]):
        setting.report(depth - i, gradient=norm / norms[-1])
    cut = depth // 10
    logs = torch.tensor(norms, dtype=torch.float64).log()[cut : depth - cut]
    places = torch.arange(len(logs), dtype=torch.float64)
    slope = ((places - places.mean()) * (logs - logs.mean())).sum() / (places - places.mean()).square().sum()
    return {"growth": float(torch.exp(-slope)), "ratio": norms[0] / norms[-1]}


def figure(runs: Runs) -> Figure:
    """The squared gradient against the layer, counted from the last one, at the largest batch; growth by batch.

    Dashed are the paper's ``pi / (pi - 1)`` for ReLU, and its ``(B - 2) / (B - 3)`` for the linear network.
    """
    sizes = runs.study.axes["per_gpu_batch_size"]
    drawn, (left, right) = panels(runs, 2, height=2.9)
    for arm in runs.study.arms:
        trace(left, runs, arm.name, runs.curve("gradient", arm.name, {"per_gpu_batch_size": sizes[-1]}))
        trace(right, runs, arm.name, runs.along("growth", arm.name, "per_gpu_batch_size"), marked=True)
    marks = arm_marks(runs.study)
    right.axhline(math.pi / (math.pi - 1), color=marks["relu"].colour, linestyle="--", linewidth=1)
    batches = [size for size in sizes if isinstance(size, int)]
    right.plot(batches, [(b - 2) / (b - 3) for b in batches], color=marks["linear"].colour, linestyle="--", linewidth=1)
    left.set(yscale="log", xlabel="layers below the last one", ylabel="squared gradient")
    left.set_title(f"{sizes[-1]} samples on each GPU")
    right.set(xlabel="samples on each GPU", ylabel="growth in a layer")
    log_axis(right, sizes)
    return drawn
