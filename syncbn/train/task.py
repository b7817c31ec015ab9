"""What a run trains: model, data, loss and metrics, apart from its normalization and the processes it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.train.result import Metric


@dataclass(frozen=True)
class Sum:
    """A mean that has not been divided yet.

    Numerators and denominators are added over batches, logical GPUs and processes before they are divided, so the
    result does not depend on how the samples were divided among them.

    Example:
        >>> import torch
        >>> from syncbn.train import Sum
        >>> hits, pixels = torch.tensor([30.0, 0.0, 5.0]), torch.tensor([40.0, 0.0, 20.0])
        >>> Sum(hits, pixels).mean()  # of 30 / 40 and 5 / 20: the second class has no pixels
        0.5
    """

    total: Tensor | float
    """Numerator: a number, or one for each class (K,)."""
    count: Tensor | float
    """Denominator, of the same shape: samples, pixels, boxes."""

    def mean(self) -> float:
        """The mean over the classes with a count of ``total / count``; NaN if all counts are zero."""
        total, count = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (self.total, self.count))
        return float((total / count)[count != 0].mean())


@dataclass(frozen=True)
class Datasets:
    """The data of a task: map-style datasets of pairs (inputs, targets), each a tensor or a tree of tensors."""

    train: Any
    test: Any
    validation: Any = None
    """Samples for choices such as that of a learning rate; None if nothing is chosen."""
    collate: Callable[[list[Any]], tuple[Any, Any]] | None = None
    """From a list of items to a batch (inputs, targets), samples first; None is torch's ``default_collate``."""


class Task:
    """What is trained. A user's task is a subclass; a configuration names it as ``task: {name: my_module:MyTask}``.

    The model is called with the inputs of a batch. Its samples are in dimension 0 of inputs, targets and outputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from syncbn.train import Datasets, Metric, RunConfig, Sum, Task, train
        >>> class Sign(Task):
        ...     metric = Metric("accuracy", higher_is_better=True, of_samples=True)
        ...     def model(self):
        ...         return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        ...     def data(self, seed):
        ...         x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
        ...         y = (x.sum(1) > 0).long()
        ...         return Datasets(train=TensorDataset(x[:64], y[:64]), test=TensorDataset(x[64:], y[64:]))
        ...     def loss(self, outputs, targets):
        ...         return nn.functional.cross_entropy(outputs, targets)
        ...     def metrics(self, outputs, targets):
        ...         return {"accuracy": Sum((outputs.argmax(1) == targets).sum(), len(targets))}
        >>> result = train(RunConfig(gpus=4, per_gpu_batch_size=4, device="cpu"), task=Sign())
        >>> result.status, result.metric.name, result.score > 0.7
        ('ok', 'accuracy', True)
    """

    metric: Metric = Metric("loss", percent=False)
    """The metric that runs are compared by: one of those that :meth:`metrics` returns, or ``loss``."""

    def model(self) -> nn.Module:
        """The network, on the CPU, with torch's BatchNorm layers where the normalization of the run is to stand.

        Its initial weights are drawn from torch's global generator, which the run has seeded.
        """
        raise NotImplementedError

    def data(self, seed: int) -> Datasets:
        """The data, the same on every process. ``seed`` is the run's.

        Random numbers of torch, NumPy and ``random`` that a training dataset draws for an item are seeded by the run's
        seed, the epoch and the item: an augmentation does not depend on the process that loads it.
        """
        raise NotImplementedError

    def outputs(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """What the model makes of a batch; for models that are not called with ``inputs`` alone."""
        return model(inputs)

    def loss(self, outputs: Any, targets: Any) -> Sum | Tensor:
        """The training loss of a batch.

        A :class:`Sum` is divided by the counts of the whole optimizer step: the loss of a step with 1,000 labelled
        pixels on one GPU and 10 on another is the mean over the 1,010. A scalar is taken as the mean over the samples
        of one logical GPU; the loss is then computed for each logical GPU by itself, and in evaluation for each sample.
        """
        raise NotImplementedError

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Sum]:
        """Metrics of a batch in evaluation, by name."""
        return {}

    def predictions(self, outputs: Any, targets: Any) -> Sequence[Any] | None:
        """What :meth:`metrics_of_set` needs of each sample of a batch, such as its scores and its class; else None.

        Each is a tensor or a tree of tensors and numbers. They come to the CPU and to all processes.
        """
        return None

    def metrics_of_set(self, predictions: list[Any]) -> Mapping[str, float]:
        """Metrics that are no mean over samples, such as an average precision, by name.

        ``predictions`` are those of all samples, in the order of the data set.
        """
        return {}
