"""The page docs/recipes_vision.md: each of its functions on two processes, against torch's layers on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_steps import images, make
from monai.data import MetaTensor
from monai.networks.nets import UNet
from pool import Pool
from torch import Tensor, nn

from syncbn.compat import import_timm, import_torchvision

timm, torchvision = import_timm(), import_torchvision()
PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes_vision.md"
STEPS, SAMPLES = 2, 8


def unet() -> nn.Module:
    return UNet(3, 1, 1, channels=(4, 8), strides=(2,), norm="batch")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("test_resnet", num_classes=4),
    "torchvision": lambda: torchvision.models.resnet18(weights=None, num_classes=4),
    "monai": unet,
}


def loader(name: str) -> list[Any]:
    """This rank's part of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[Any] = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        if name == "monai":
            x = torch.randn(SAMPLES, 1, 8, 8, 8, dtype=torch.float64, generator=generator)
            part = MetaTensor(x.chunk(world)[rank])
            found.append({"image": part, "label": (part > 0).double()})
        else:
            target = torch.randint(4, (SAMPLES,), generator=generator)
            found.append(((images(32, SAMPLES) + step).chunk(world)[rank], target.chunk(world)[rank]))
    return found


def trained(name: str, kind: str) -> dict[str, Tensor]:
    """The tensors of the model and of what the function returns. ``kind``: "torch" leaves torch's layers."""
    names: dict[str, Any] = {}
    for block in PAGE.read_text().split("```python\n")[1:]:
        exec(compile(block.partition("```")[0], str(PAGE), "exec"), names)
    if kind == "torch":
        names["syncbn"] = SimpleNamespace(convert=lambda model, kind: model)
    model = make(MODELS[name])
    returned = names[f"train_as_{name}"](model, loader(name))
    found = {**model.state_dict(), **{f"returned {key}": t for key, t in returned.state_dict().items()}}
    return {key: t.detach().as_subclass(Tensor) for key, t in found.items()}


@pytest.mark.works_with("timm", "its train script's parts on 2 processes, with EMA: as torch's layers on one")
def test_timm(pools: Callable[[int], Pool]) -> None:
    check(pools, "timm")


@pytest.mark.works_with(
    "torchvision", "its reference script's parts on 2 processes, with EMA: as torch's layers on one"
)
def test_torchvision(pools: Callable[[int], Pool]) -> None:
    check(pools, "torchvision")


@pytest.mark.works_with("monai", "a UNet with Dice loss and MetaTensors on 2 processes: as torch's layers on one")
def test_monai(pools: Callable[[int], Pool]) -> None:
    check(pools, "monai")


def check(pools: Callable[[int], Pool], name: str) -> None:
    (expected,) = pools(1).run(trained, name, "torch")
    start = make(MODELS[name]).state_dict()
    assert not all(torch.equal(start[key], expected[key]) for key in start), "it has trained"
    for found in pools(2).run(trained, name, "sync"):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            # float64 through up to 20 normalizations, the last of 8 values, and two steps.
            torch.testing.assert_close(found[key], tensor, rtol=1e-8, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")  # type: ignore[misc]
