"""Training a network on images by the package's trainer, with a look at it before each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncbn.study import Setting
from syncbn.train import Datasets, Metric, RunResult, Sum, Task, train
from syncbn.train.config import DataConfig, ModelConfig
from syncbn.train.tasks.classification import Classification

Probe = Callable[[int, nn.Module, Tensor, Tensor], None]
"""Called before each step with its number, the model, and the batch: images (N, ...) and labels (N,)."""
FEATURES = {"mnist5k": 784, "fashion_mnist": 784, "cifar10": 3072}
"""Values of an image, of the data sets that the option ``data`` may name."""


def features(setting: Setting) -> int:
    """Inputs of a perceptron for the setting's images."""
    return FEATURES[setting.options.get("data", "mnist5k")]


class Perceptron(nn.Sequential):
    """Fully connected layers, each but the last with a batch normalization, which the run replaces, and an activation.

    Args:
        sizes: features of an image, units of a hidden layer, hidden layers, classes.
        activation: makes the activation of a layer.
        std: standard deviation of the Gaussian weights; None is He et al.'s, ``sqrt(2 / inputs)`` of each layer, times
            ``scale``.
        norm_after: whether the normalization stands after the activation and not before it.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        activation: Callable[[], nn.Module] = nn.ReLU,
        std: float | None = None,
        *,
        norm_after: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
        scale: float = 1.0,
    ) -> None:
        inputs, width, depth, classes = sizes
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(depth):
            hidden = [nn.BatchNorm1d(width, eps=eps), activation()]
            layers += [nn.Linear(inputs, width), *(reversed(hidden) if norm_after else hidden)]
            layers += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        super().__init__(*layers, nn.Linear(inputs, classes))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=scale * math.sqrt(2 / layer.in_features) if std is None else std)
                nn.init.zeros_(layer.bias)


class Images(Task):
    """Classification by a network of the experiment's of 5,000 images of MNIST, or as the options say.

    ``data`` is the name of a data set, ``train_samples`` a number of its images, and ``model`` the name of a network of
    the trainer's or a library's, in place of the experiment's.
    """

    metric = Metric("error", of_samples=True)

    def __init__(
        self,
        setting: Setting,
        network: Callable[[], nn.Module],
        probe: Probe | None,
        prepare: Callable[[nn.Module], nn.Module],
    ) -> None:
        o = setting.options
        data = DataConfig(name=o.get("data", "mnist5k"), train_samples=o.get("train_samples"))
        named = o.get("model")
        self._images = Classification(data, ModelConfig(name=named or "convnet"), 0.0, setting.device)
        self._network, self._probe, self._prepare = self._images.model if named else network, probe, prepare
        self._step = 0
        self.seen: nn.Module | None = None
        """The network that was trained."""
        self.sets: Datasets | None = None

    def model(self) -> nn.Module:
        return self._prepare(self._network())

    def data(self, seed: int) -> Datasets:
        self.sets = self._images.data(seed)
        return self.sets

    def outputs(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        if model.training and self._probe is not None:
            with torch.random.fork_rng(devices=[]):
                self._probe(self._step, model, inputs, targets)
        self._step += model.training
        self.seen = model
        return model(inputs)

    def loss(self, outputs: Any, targets: Any) -> Sum | Tensor:
        return self._images.loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Sum]:
        return self._images.metrics(outputs, targets)


class Trained(NamedTuple):
    """A run, its network in evaluation mode, and its data, the test set in the order of its classes."""

    result: RunResult
    """Its history has the test error of each evaluation."""
    model: nn.Module
    sets: Datasets


def whole(data: Any) -> tuple[Tensor, Tensor]:
    """All images (n, ...) and labels (n,) of a data set."""
    images, labels = data.__getitems__([(0, index) for index in range(len(data))])
    return images, labels


def trained(
    setting: Setting,
    network: Callable[[], nn.Module],
    probe: Probe | None = None,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Trained:
    """Train the network, or that of the option ``model``, prepared, by the setting's configuration."""
    task = Images(setting, network, probe, prepare)
    result = train(setting.config, task=task)
    assert task.seen is not None, "it was trained"
    assert task.sets is not None, "its data were loaded"
    return Trained(result, task.seen.eval(), task.sets)


def report_errors(setting: Setting, result: RunResult) -> None:
    """Report the test error of each evaluation, for curves."""
    for entry in result.history:
        if entry["test"] is not None:
            setting.report(entry["step"], error=entry["test"]["error"])


def error_of(result: RunResult) -> float:
    """The test error, that of guessing among ten classes if the run diverged."""
    return result.score if result.status == "ok" else 0.9
