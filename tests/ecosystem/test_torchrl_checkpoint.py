"""torchrl's BatchRenorm1d itself: its checkpoints evaluate the same here, training goes on alike, and back.

In float64. Each step's statistics are sums of 16 numbers in another order, and the steps are few: 1e-12 is ample.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import syncbn
from syncbn.checkpoints import translate_options, translate_state

C = 6
OPTIONS: dict[str, Any] = {"momentum": 0.05, "eps": 1e-4, "max_r": 1.5, "max_d": 0.3, "warmup_steps": 4}


def torchrls_layer(**options: Any) -> Any:
    """Its file alone: the whole of torchrl takes long to import."""
    package = importlib.util.find_spec("torchrl")
    if package is None or package.origin is None:
        pytest.skip("torchrl is not installed")
    path = Path(package.origin).parent / "modules" / "models" / "batchrenorm.py"
    spec = importlib.util.spec_from_file_location("torchrl_batchrenorm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BatchRenorm1d(C, **options).double()


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, C, generator=generator, dtype=torch.float64) * 3 + 1 for _ in range(number)]


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [0, 2, 5], ids=lambda n: f"after {n} steps")
def test_training_goes_on_alike(before: int) -> None:
    """Over the end of the warm-up at step 4, up to step 8, from which torchrl amplifies its corrections."""
    theirs = torchrls_layer(**OPTIONS)
    torch.nn.init.uniform_(theirs.weight, 0.5, 1.5)
    torch.nn.init.uniform_(theirs.bias, -0.5, 0.5)
    data = batches(8)
    for x in data[:before]:
        theirs(x)
    layer = syncbn.BatchRenorm(C, **translate_options("torchrl", **OPTIONS), dtype=torch.float64)
    layer.load_state_dict(translate_state(theirs.state_dict(), source="torchrl"))
    same(layer.eval()(data[0]), theirs.eval()(data[0]))
    layer.train(), theirs.train()
    corrected = 0
    for x in data[before:]:
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(mine), theirs(other)
        same(y, expected)
        plain = torch.nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, eps=layer.eps)
        corrected += not torch.allclose(y, plain)
        y.square().sum().backward()
        expected.square().sum().backward()
        same(mine.grad, other.grad)
    assert corrected == 8 - max(before, 4), "r and d were at work"
    for name, tensor in translate_state(layer.state_dict(), target="torchrl").items():
        same(tensor, theirs.state_dict()[name])
    theirs.load_state_dict(translate_state(layer.state_dict(), target="torchrl"))


def test_the_defaults_are_torchrls() -> None:
    layer = torchrls_layer()
    found = translate_options("torchrl")
    assert (found["momentum"], found["eps"]) == (layer.momentum, layer.eps)
    assert (found["r_max"], found["d_max"], found["r_ramp_end"]) == (layer.max_r, layer.max_d, layer.warmup_steps)
