"""The noise of small normalization batches as a regularizer (Luo et al. 2019), and what representations look like."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from sklearn.metrics import silhouette_score

from syncbn.experiments.drawing import log_axis, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, trained
from syncbn.study import Setting


def run(setting: Setting) -> dict[str, float]:
    """Train, and compare the loss on the test set with that on the training set, both at the same training loss.

    ``gap`` is the test loss minus the training loss of the epoch before the first evaluation with a training loss below
    the target, or of the last one; ``at_loss`` is that training loss. At the end, ``error`` is the test error, and
    ``silhouette`` tells how far the classes form clusters in the last hidden layer, on the test set (Rousseeuw 1987):
    1 is apart, 0 is mixed.
    """
    o = setting.options
    result, model, images, labels = trained(setting, lambda: Perceptron((784, 100, o["depth"], 10)))
    evaluated = [entry for entry in result.history if entry["test"] is not None]
    at = next((entry for entry in evaluated if entry["train_loss"] < o["target"]), evaluated[-1])
    for entry in evaluated:
        setting.report(entry["step"], train_loss=entry["train_loss"], test_loss=entry["test"]["loss"])
    some = slice(None, None, max(1, len(labels) // o["silhouette_samples"]))  # of all classes
    hidden = images[some]
    with torch.no_grad():
        for layer in list(model.children())[:-1]:
            hidden = layer(hidden)
    return {
        "gap": at["test"]["loss"] - at["train_loss"],
        "at_loss": at["train_loss"],
        "error": error_of(result),
        "silhouette": float(silhouette_score(hidden.numpy(), labels[some].numpy())),
    }


def figure(runs: Runs) -> Figure:
    """The gap, the error and the clustering against the samples of a GPU."""
    sizes = runs.study.axes["per_gpu_batch_size"]
    drawn, axes = panels(runs, 3, height=2.0)
    words = ("test - training loss", "test error", "silhouette")
    for each, quantity, label in zip(axes, ("gap", "error", "silhouette"), words, strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.along(quantity, arm.name, "per_gpu_batch_size"), marked=True)
        each.set_ylabel(label)
        log_axis(each, sizes)
    axes[-1].set_xlabel("samples on each GPU")
    return drawn
