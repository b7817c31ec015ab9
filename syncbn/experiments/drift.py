"""Drift of activations in training (Ioffe and Szegedy 2015, section 4.1)."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, trained
from syncbn.study import Setting

PERCENTILES = (0.15, 0.5, 0.85)


def run(setting: Setting) -> dict[str, float]:
    """Train three layers of sigmoids, and watch the inputs of the last layer of sigmoids on one fixed batch.

    Reports the percentiles of one unit. Returns ``error``, that of the test set at the end; ``early``, at the first
    evaluation; ``drift``, how far a unit's median moves from the first to the last step, as a mean over the units in
    the unit's spread (85th minus 15th percentile) at the end.
    """
    o = setting.options
    fixed: list[Tensor] = []
    seen: list[Tensor] = []  # (3, units) each

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        fixed.extend([images] if not fixed else [])
        if step % o["look_every"] == 0:
            x = _inputs_of_last_sigmoid(model, fixed[0])
            at = torch.quantile(x, torch.tensor(PERCENTILES, dtype=x.dtype), dim=0)
            seen.append(at)
            named = zip(("p15", "p50", "p85"), at[:, 0].tolist(), strict=True)
            setting.report(step, **dict(named))

    result = trained(setting, lambda: Perceptron((784, 100, 3, 10), nn.Sigmoid, o["std"]), probe).result
    for entry in result.history:
        setting.report(entry["step"] - 1, error=entry["test"]["error"])
    first, last = seen[0], seen[-1]
    moved = (last[1] - first[1]).abs() / (last[2] - last[0])
    return {"error": error_of(result), "early": result.history[0]["test"]["error"], "drift": float(moved.mean())}


@torch.no_grad()
def _inputs_of_last_sigmoid(model: nn.Module, images: Tensor) -> Tensor:
    """(N, units), with the statistics of the batch, as training has them; running statistics stay as they are."""
    kept = [buffer.clone() for buffer in model.buffers()]
    layers = list(model.children())
    last = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Sigmoid))
    for layer in layers[:last]:
        images = layer(images)
    for buffer, old in zip(model.buffers(), kept, strict=True):
        buffer.copy_(old)
    return images


def figure(runs: Runs) -> Figure:
    """The percentiles of a unit along the steps, and the test error."""
    drawn, axes = panels(runs, 2, height=2.6)
    for arm in runs.study.arms:
        for quantity in ("p15", "p50", "p85"):
            trace(axes[0], runs, arm.name, runs.curve(quantity, arm.name))
        trace(axes[1], runs, arm.name, runs.curve("error", arm.name), marked=True)
    axes[0].set(ylabel="15th, 50th, 85th percentile")
    axes[1].set(ylabel="test error", xlabel="step", yscale="log")
    return drawn
