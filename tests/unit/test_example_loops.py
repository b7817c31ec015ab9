"""The training loops of `examples/loops/` are run by a study's setting, with the arm's layers in their networks."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.study import Setting
from syncbn.train.config import config_from_dict

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "examples" / "loops").glob("*.py"))
NORMS = {
    "batch": ({"name": "batch"}, GhostBatchNorm),
    "sync": ({"name": "sync"}, SyncBatchNorm),
    "renorm": ({"name": "renorm", "sync": True}, BatchRenorm),
    "group": ({"name": "group"}, nn.GroupNorm),
    "layer": ({"name": "layer"}, nn.GroupNorm),
}
LOOPS = {
    "crossq_critic": ("reward", 2, ("batch", "renorm")),
    "detector": ("iou", 4 + 7, ("batch", "sync")),
    "simclr": ("accuracy", 3, ("batch", "sync", "group")),
    "wgan_gp": ("sliced_wasserstein", 2, ("batch", "layer")),
}
"""By the script's name: its metric, the normalized layers of its network, and its arms."""


class Watched(Setting):
    """A setting that keeps what it normalized."""

    def normalize(self, model: nn.Module) -> nn.Module:
        before = [p.detach().clone() for p in model.parameters()]
        self.options["seen"] = normalized = super().normalize(model)
        self.options["weights"] = before
        return normalized


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", SCRIPTS[0].parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_loop_is_run_here() -> None:
    assert {path.stem for path in SCRIPTS} == set(LOOPS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_lengths(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name, (*_, arms) in LOOPS.items() for arm in arms])
def test_loop(name: str, arm: str) -> None:
    metric, layers, _ = LOOPS[name]
    norm, kind = NORMS[arm]
    base = {"gpus": 4, "per_gpu_batch_size": 2} if name in ("detector", "simclr") else {"per_gpu_batch_size": 16}
    task = {"name": f"{name}:run", "options": {"steps": 3}}
    config = config_from_dict({**base, "device": "cpu", "norm": norm, "optimizer": {"lr": 0.001}, "task": task})
    torch.manual_seed(0)
    setting = Watched(config=config, out=None, resume=False)
    values = example(name).run(setting)
    assert math.isfinite(float(values[metric]))
    model = setting.options["seen"]
    found = [module for module in model.modules() if isinstance(module, kind)]
    assert len(found) == layers
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in set(model.modules()) - set(found))
    trained = zip(setting.options["weights"], model.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in trained), "the loop trains what was normalized"


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_penalty_is_differentiated_twice(float64: None) -> None:
    """Its gradients through the arm's layers are those through torch's."""
    wgan = example("wgan_gp")
    torch.manual_seed(0)
    plain = wgan.network(2, 1)
    real, fake = torch.randn(2, 8, 2)
    config = config_from_dict({"per_gpu_batch_size": 8, "device": "cpu", "task": {"name": "wgan_gp:run"}})
    normalized = Setting(config=config, out=None, resume=False).normalize(copy.deepcopy(plain))
    gradients = []
    for critic in (plain, normalized):
        torch.manual_seed(1)
        wgan.penalty(critic, real, fake).backward()
        weights = [p for name, p in critic.named_parameters() if name.endswith("weight")]
        gradients.append([weight.grad for weight in weights])
    assert isinstance(normalized[1], GhostBatchNorm)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
