"""The noise of small normalization batches as a regularizer (Luo et al. 2019), and what representations look like."""

from __future__ import annotations

import copy

import torch
from matplotlib.figure import Figure
from sklearn.metrics import silhouette_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from syncbn.experiments.drawing import log_axis, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, trained, whole
from syncbn.study import Setting


def run(setting: Setting) -> dict[str, float]:
    """Train, and compare the loss on the test set with that on the training set, both at the same training loss.

    Both are of the network in evaluation mode, with running statistics: in training, the loss of a batch has the noise
    of its statistics in it. ``gap`` is the test loss minus the training loss at the first look with a training loss
    below the target, or at the last one; ``at_loss`` is that training loss. At the end, ``error`` is the test error,
    and ``silhouette`` tells how far the classes form clusters in the last hidden layer, on the test set (Rousseeuw
    1987): 1 is apart, 0 is mixed.
    """
    o = setting.options
    looks: list[tuple[int, nn.Module]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if step % o["look_every"] == 0:
            looks.append((step, copy.deepcopy(model).eval()))

    result, model, sets = trained(setting, lambda: Perceptron((features(setting), 100, o["depth"], 10)), probe)
    training, test = whole(sets.train), whole(sets.test)
    looks.append((result.steps, model))
    losses = [(step, _loss(seen, *training), _loss(seen, *test)) for step, seen in looks]
    for step, train_loss, test_loss in losses:
        setting.report(step, train_loss=train_loss, test_loss=test_loss)
    _, train_loss, test_loss = next((entry for entry in losses if entry[1] < o["target"]), losses[-1])
    some = slice(None, None, max(1, len(test[1]) // o["silhouette_samples"]))  # of all classes
    hidden = _hidden(model, test[0][some])
    return {
        "gap": test_loss - train_loss,
        "at_loss": train_loss,
        "error": error_of(result),
        "silhouette": float(silhouette_score(hidden.flatten(1).cpu().numpy(), test[1][some].cpu().numpy())),
    }


@torch.no_grad()
def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    total = sum(
        cross_entropy(model(part), right, reduction="sum").double()
        for part, right in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return float(total) / len(labels)


@torch.no_grad()
def _hidden(model: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer gets."""
    found: list[Tensor] = []
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return found[0]


def figure(runs: Runs) -> Figure:
    """The gap, the error and the clustering against the samples of a GPU."""
    sizes = runs.study.axes["per_gpu_batch_size"]
    drawn, axes = panels(runs, 3)
    words = ("test - training loss", "test error", "silhouette")
    for each, quantity, label in zip(axes, ("gap", "error", "silhouette"), words, strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.along(quantity, arm.name, "per_gpu_batch_size"), marked=True)
        each.set_ylabel(label)
        log_axis(each, sizes)
        each.set_xlabel("samples on each GPU")
    return drawn
