"""Training a perceptron of images by the package's trainer, with a look at it before each step."""

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


class Perceptron(nn.Sequential):
    """Fully connected layers, each but the last with a batch normalization, which the run replaces, and an activation.

    Args:
        sizes: features of an image, units of a hidden layer, hidden layers, classes.
        activation: makes the activation of a layer.
        std: standard deviation of the Gaussian weights; None is He et al.'s, ``sqrt(2 / inputs)`` of each layer.
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
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features) if std is None else std)
                nn.init.zeros_(layer.bias)


class Images(Task):
    """Classification of 5,000 images of MNIST, or of the option ``train_samples``, by a network of the experiment's."""

    metric = Metric("error", of_samples=True)

    def __init__(self, setting: Setting, network: Callable[[], nn.Module], probe: Probe | None) -> None:
        data = DataConfig(train_samples=setting.options.get("train_samples"))
        self._images = Classification(data, ModelConfig(), 0.0, setting.device)
        self._network, self._probe = network, probe
        self._step = 0
        self.seen: nn.Module | None = None
        """The network that was trained."""
        self.test: tuple[Tensor, Tensor] | None = None
        """Images (n, ...) and labels (n,) of the test set."""

    def model(self) -> nn.Module:
        return self._network()

    def data(self, seed: int) -> Datasets:
        found = self._images.data(seed)
        self.test = found.test.__getitems__([(0, index) for index in range(len(found.test))])
        return found

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
    """A run, its network in evaluation mode, and the test set, in the order of its classes."""

    result: RunResult
    """Its history has the test error of each evaluation."""
    model: nn.Module
    images: Tensor
    labels: Tensor


def trained(setting: Setting, network: Callable[[], nn.Module], probe: Probe | None = None) -> Trained:
    """Train the network by the setting's configuration."""
    task = Images(setting, network, probe)
    result = train(setting.config, task=task)
    assert task.seen is not None, "it was trained"
    assert task.test is not None, "its data were loaded"
    return Trained(result, task.seen.eval(), *task.test)


def report_errors(setting: Setting, result: RunResult) -> None:
    """Report the test error of each evaluation, for curves."""
    for entry in result.history:
        if entry["test"] is not None:
            setting.report(entry["step"], error=entry["test"]["error"])


def error_of(result: RunResult) -> float:
    """The test error, that of guessing among ten classes if the run diverged."""
    return result.score if result.status == "ok" else 0.9
