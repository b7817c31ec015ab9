"""The training loops of `examples/loops/`: what they are, and a setting that watches one of them."""

from __future__ import annotations

import importlib.util
import math
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.study import Setting, Study
from syncbn.train.config import config_from_dict

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "loops"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NORMS = {
    "batch": ({"name": "batch"}, GhostBatchNorm),
    "sync": ({"name": "sync"}, SyncBatchNorm),
    "renorm": ({"name": "renorm", "sync": True}, BatchRenorm),
    "group": ({"name": "group"}, nn.GroupNorm),
    "layer": ({"name": "layer"}, nn.GroupNorm),
}
FOUR_OF_TWO = {"gpus": 4, "per_gpu_batch_size": 2}
ONE_OF_SIXTEEN = {"per_gpu_batch_size": 16}


class Loop(NamedTuple):
    metric: str
    layers: int
    """Normalized layers of its network."""
    arms: tuple[str, ...]
    base: dict[str, int]
    """How its batch lies on GPUs here."""
    needs: str | None = None
    """The package of the extra `ecosystem` that it is written for."""


LOOPS = {
    "crossq_critic": Loop("reward", 2, ("batch", "renorm"), {"per_gpu_batch_size": 128}, "gymnasium"),
    "detector": Loop("iou", 4 + 7, ("batch", "sync"), FOUR_OF_TWO),
    "lightning_module": Loop("accuracy", 2, ("batch", "sync", "group"), FOUR_OF_TWO, "lightning"),
    "simclr": Loop("accuracy", 3, ("batch", "sync", "group"), FOUR_OF_TWO),
    "transformers_trainer": Loop("accuracy", 6, ("batch", "sync", "group"), FOUR_OF_TWO, "transformers"),
    "wgan_gp": Loop("sliced_wasserstein", 2, ("batch", "layer"), ONE_OF_SIXTEEN),
}


def cases(ecosystem: bool) -> list[tuple[str, str]]:
    """Each loop that needs the extra, or that does not, with each of its arms."""
    return [(name, arm) for name, loop in LOOPS.items() if (loop.needs is not None) == ecosystem for arm in loop.arms]


class Watched(Setting):
    """A setting that keeps what it normalized."""

    def normalize(self, model: nn.Module) -> nn.Module:
        before = [p.detach().clone() for p in model.parameters()]
        self.options["seen"] = normalized = super().normalize(model)
        self.options["weights"] = before
        return normalized


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_loop(name: str, arm: str, out: Path | None = None) -> dict[str, Any]:
    """Call a loop once, for three steps: it trains the arm's layers. Returns its metrics."""
    loop, (norm, kind) = LOOPS[name], NORMS[arm]
    task = {"name": f"{name}:run", "options": {"steps": 3}}
    config = config_from_dict({**loop.base, "device": "cpu", "norm": norm, "optimizer": {"lr": 0.001}, "task": task})
    torch.manual_seed(0)
    setting = Watched(config=config, out=out, resume=False)
    values = example(name).run(setting)
    assert math.isfinite(float(values[loop.metric]))
    model = setting.options["seen"]
    found = [module for module in model.modules() if isinstance(module, kind)]
    assert len(found) == loop.layers
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in set(model.modules()) - set(found))
    trained = zip(setting.options["weights"], model.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in trained), "the loop trains what was normalized"
    return dict(values)


class ShortStudy(Study):
    """A study whose runs have three steps."""

    def __init__(self, **plan: Any) -> None:
        super().__init__(**{**plan, "base": {**plan["base"], "task": {"options": {"steps": 3}}}})


def check_script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The study at a script's end, with three steps a run, prints its comparison. It writes to ``folder``."""
    monkeypatch.setattr("syncbn.study.Study", ShortStudy)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(r"^verdict( +(better|worse|no difference shown))+$", capsys.readouterr().out, re.MULTILINE)
    assert len(list(folder.glob("*/report.html"))) == 1
