"""A task of your own: find discs in noise. `examples/discs/study.yaml` compares normalizations on it.

Run: syncbn study run --config examples/discs/study.yaml --out runs/discs
"""

import torch
from torch import nn
from torch.utils.data import Dataset

from syncbn.train import Datasets, Metric, Sum, Task


class Discs(Dataset):
    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(1000 * self.seed + index)
        x, y, radius = (torch.rand(3, generator=draw) * torch.tensor([32, 32, 6]) + torch.tensor([0, 0, 4])).tolist()
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        disc = ((rows - y) ** 2 + (columns - x) ** 2 < radius**2).float()[None]
        return disc + 0.8 * torch.randn(1, 32, 32, generator=draw), disc


class FindDiscs(Task):
    metric = Metric("dice", higher_is_better=True)

    def model(self):
        blocks = [(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (1, 8, 8)]
        return nn.Sequential(*sum(blocks, ()), nn.Conv2d(8, 1, 1))

    def data(self, seed):
        return Datasets(train=Discs(256, 0), validation=Discs(64, 1), test=Discs(128, 2))

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        found = outputs > 0
        return {"dice": Sum(2 * (found * targets).sum(), found.sum() + targets.sum())}
