"""Models and looks at them, for the tests of conversion."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm

KINDS: dict[str, dict[str, Any]] = {"sync": {}, "ghost": {"ghost_batch_size": 2}, "renorm": {"r_max": 2.0}}
LAYERS = {"sync": SyncBatchNorm, "ghost": GhostBatchNorm, "renorm": BatchRenorm}
every_kind = pytest.mark.parametrize("kind", KINDS)


class ScaledBatchNorm(nn.BatchNorm2d):
    """A subclass with behaviour of its own after normalizing."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.factor = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


def scale(layer: Any, x: Tensor) -> Tensor:
    return x * layer.factor


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU())
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), stage, nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return model


def batch() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tensors(model: nn.Module) -> dict[str, int]:
    """Parameters and saved buffers, by the object that they are."""
    return {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Class and attributes of every module, containers included, to be compared as a whole."""
    found = {}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        attributes["tensors"] = {k: id(v) for k, v in (module._parameters | module._buffers).items()}
        attributes["not saved"] = set(module._non_persistent_buffers_set)
        attributes["hooks"] = list(module._forward_hooks.values())
        attributes["names"] = set(vars(module))
        found[name] = (type(module), attributes)
    return found


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
