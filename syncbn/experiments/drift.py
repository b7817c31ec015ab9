"""Drift of activations in training (Ioffe and Szegedy 2015, section 4.1)."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, trained
from syncbn.study import Setting

PERCENTILES = (0.15, 0.5, 0.85)


def run(setting: Setting) -> dict[str, float]:
    """Train three layers of sigmoids, and watch the inputs of the last layer of sigmoids on one fixed batch.

    Reports the percentiles of one unit. Returns ``error``, that of the test set at the end; ``early``, at the first
    evaluation; ``drift``, how far a unit's median moves from the first to the last step, as a mean over the units in
    the unit's spread (85th minus 15th percentile) at the end; ``divergence``, the mean of :func:`divergence` of the
    units from the first to the last step.
    """
    o = setting.options
    fixed: list[Tensor] = []
    seen: list[Tensor] = []  # (3, units) each
    inputs: list[Tensor] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        fixed.extend([images] if not fixed else [])
        if step % o["look_every"] == 0:
            x = _inputs_of_last_sigmoid(model, fixed[0])
            at = torch.quantile(x, x.new_tensor(PERCENTILES), dim=0)
            seen.append(at)
            inputs[1:] = [x]
            named = zip(("p15", "p50", "p85"), at[:, 0].tolist(), strict=True)
            setting.report(step, **dict(named))

    result = trained(setting, lambda: Perceptron((features(setting), 100, 3, 10), nn.Sigmoid, o["std"]), probe).result
    for entry in result.history:
        setting.report(entry["step"] - 1, error=entry["test"]["error"])
    first, last = seen[0], seen[-1]
    moved = (last[1] - first[1]).abs() / (last[2] - last[0])
    return {
        "error": error_of(result),
        "early": result.history[0]["test"]["error"],
        "drift": float(moved.mean()),
        "divergence": float(divergence(inputs[0], inputs[-1]).mean()),
    }


def divergence(old: Tensor, new: Tensor) -> Tensor:
    """Kullback-Leibler divergence (units,) of two Gaussians: that of ``new`` (N, units) from that of ``old``."""
    (var, mean), (new_var, new_mean) = torch.var_mean(old, 0), torch.var_mean(new, 0)
    return ((new_var + (new_mean - mean).square()) / var - 1 + (var / new_var).log()) / 2


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
    """The test error along the steps, and the percentiles of a unit, without and with the normalization."""
    drawn, (errors, *units) = panels(runs, 3)
    units[1].sharey(units[0])
    for axes, name in zip(units, ("none", "batch"), strict=True):
        for quantity in ("p15", "p50", "p85"):
            trace(axes, runs, name, runs.curve(quantity, name))
        trace(errors, runs, name, runs.curve("error", name), marked=True)
        axes.set(xlabel="step", title=next(arm.label for arm in runs.study.arms if arm.name == name))
    units[0].set_ylabel("15th, 50th, 85th percentile")
    errors.set(ylabel="test error", xlabel="step", yscale="log")
    return drawn
