"""The recipes of `docs/recipes.md`, run as scripts, and the same trainings on one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
SAMPLES = 8
EPOCHS = 5


def recipes() -> dict[str, list[str]]:
    """The Python blocks of each section of the page."""
    sections = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)
    found = {
        title: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for title, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    return {title: blocks for title, blocks in found.items() if blocks}


def samples() -> tuple[Tensor, Tensor]:
    """One batch of two processes, so that the order of the samples does not matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, 6, 6, dtype=torch.float64, generator=generator)
    return images + torch.arange(SAMPLES).view(-1, 1, 1, 1) / 2, torch.arange(SAMPLES) % 3


def classifier() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3)).double()


def transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(1)
    widths = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", **widths)).double()


def model_and_dataset(title: str) -> tuple[nn.Module, Dataset[Any]]:
    if title != "transformers":
        return classifier(), TensorDataset(*samples())
    images = nn.functional.interpolate(samples()[0], size=32)
    pairs = zip(images, samples()[1].tolist(), strict=True)
    return transformers_resnet(), [{"pixel_values": x, "labels": y} for x, y in pairs]  # type: ignore[return-value]


def run(title: str, replaced: dict[str, str]) -> dict[str, Tensor]:
    """The model's state after the recipe, in whose text the keys of ``replaced`` became their values."""
    (text,) = recipes()[title]
    for old, new in replaced.items():
        assert text.count(old) == 1, f"{old!r} is not once in the recipe"
        text = text.replace(old, new)
    model, dataset = model_and_dataset(title)
    names: dict[str, Any] = {"__name__": "__main__", "model": model, "dataset": dataset}
    exec(compile(text, f"{PAGE.name}: {title}", "exec"), names)
    state: dict[str, Tensor] = names.get("state") or model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def run_noting_buffers(title: str, replaced: dict[str, str]) -> tuple[dict[str, Tensor], list[bool]]:
    """As ``run``, and whether each DistributedDataParallel that it makes sends rank 0's buffers to the others."""
    wrapper, sent = nn.parallel.DistributedDataParallel, []
    make = wrapper.__init__

    def noting(self: Any, *args: Any, **options: Any) -> None:
        sent.append(options.get("broadcast_buffers", True))
        make(self, *args, **options)

    with mock.patch.object(wrapper, "__init__", noting):
        return run(title, replaced), sent


def alone() -> dict[str, Tensor]:
    """The state of the classifier after the same steps with the whole batch, by torch's layers."""
    model, (images, labels) = classifier(), samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(EPOCHS):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()
