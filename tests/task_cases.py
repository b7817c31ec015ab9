"""Tasks as users write them, for the tests of the trainer."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from syncbn.train import Datasets, Metric, Sum, Task


def numbers(samples, seed):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


class Sign(Task):
    """The sign of the sum of four numbers. The loss is a scalar, which means: of each logical GPU."""

    metric = Metric("accuracy", higher_is_better=True, of_samples=True)

    def __init__(self, width=8, validation=24):
        self.width, self.validation = width, validation

    def model(self):
        return nn.Sequential(nn.Linear(4, self.width), nn.BatchNorm1d(self.width), nn.ReLU(), nn.Linear(self.width, 2))

    def data(self, seed):
        validation = numbers(self.validation, 1) if self.validation else None
        return Datasets(train=numbers(64, 0), validation=validation, test=numbers(32, 2))

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": Sum((outputs.argmax(1) == targets).sum(), len(targets))}


class Weighted(Sign):
    """Samples of one class count three times, those of the other half: the counts differ between GPUs and batches."""

    def loss(self, outputs, targets):
        weight = torch.where(targets == 1, 3.0, 0.5).to(outputs.dtype)
        each = functional.cross_entropy(outputs, targets, reduction="none")
        return Sum((weight * each).sum(), weight.sum())


class Uneven(Sign):
    """A scalar loss that is no mean over samples: the largest error of a logical GPU."""

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction="none").max()


class Drawn(Dataset):
    """Items that are drawn by all three generators at each access; inputs and targets are trees."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        noise = torch.rand(2), torch.tensor(np.random.rand(2), dtype=torch.float32), torch.tensor(random.random())  # noqa: NPY002
        x = torch.cat([part.flatten() for part in noise])
        return {"x": x, "index": torch.tensor(index)}, [{"y": (x.sum() > 2.5).long()}]


class Trees(Task):
    """Inputs and targets in dictionaries and lists, a model that is called with keywords, data drawn at each access."""

    metric = Metric("loss", percent=False)

    def model(self):
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def data(self, seed):
        return Datasets(train=Drawn(22), test=Drawn(10))

    def outputs(self, model, inputs, targets):
        return {"logits": model(inputs["x"])}

    def loss(self, outputs, targets):
        return Sum(functional.cross_entropy(outputs["logits"], targets[0]["y"], reduction="sum"), len(targets[0]["y"]))


class Ranked(Sign):
    """Compared by the area under the curve of the test set, which is no mean over samples."""

    metric = Metric("auc", higher_is_better=True)

    def __init__(self):
        super().__init__()
        self.seen = []

    def predictions(self, outputs, targets):
        return list(zip(outputs[:, 1] - outputs[:, 0], targets, strict=True))

    def metrics_of_set(self, predictions):
        scores, targets = map(torch.stack, zip(*predictions, strict=True))
        self.seen.append(targets)
        above = scores[targets == 1][:, None] > scores[targets == 0]
        return {"auc": above.double().mean()}
