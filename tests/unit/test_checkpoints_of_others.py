"""Checkpoints of other implementations: after the translation both compute the same in evaluation, in float64.

The formulas are those of the sources, written out: keras/src/layers/normalization/batch_normalization.py, torchrl's
batchrenorm.py, sb3-contrib's torch_layers.py, and ludvb/batchrenorm. What is compared is one multiplication and one
addition, in another order: 1e-12 is thousands of roundings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import syncbn
from syncbn.checkpoints import translate_options, translate_state
from syncbn.functional.renorm import correction_limits

C = 5


def numbers(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(C, dtype=torch.float64, generator=generator) + 0.01 for name in names}


def keras_eval(x: Tensor, t: dict[str, Tensor], eps: float) -> Tensor:
    return (x - t["moving_mean"]) / (t["moving_variance"] + eps).sqrt() * t["gamma"] + t["beta"]


def torchrl_eval(x: Tensor, t: dict[str, Tensor], eps: float) -> Tensor:
    return t["weight"] * ((x - t["running_mean"]) / (t["running_var"] + eps).sqrt()) + t["bias"]


def sb3_eval(x: Tensor, t: dict[str, Tensor], eps: float) -> Tensor:
    return t["scale"] * ((x - t["ra_mean"]) / (t["ra_var"] + eps).sqrt()) + t["bias"]


def batchrenorm_eval(x: Tensor, t: dict[str, Tensor], eps: float) -> Tensor:
    return t["weight"] * ((x - t["running_mean"]) / t["running_std"]) + t["bias"]


STEPS = {"num_batches_tracked": torch.tensor(7000)}
# The tensors, the formula, the default eps, and the name of that option.
SOURCES: dict[str, tuple[dict[str, Tensor], Any, float]] = {
    "keras": (numbers("gamma", "beta", "moving_mean", "moving_variance"), keras_eval, 1e-3),
    "torchrl": (numbers("weight", "bias", "running_mean", "running_var") | STEPS, torchrl_eval, 1e-5),
    "sb3": (numbers("scale", "bias", "ra_mean", "ra_var") | {"steps": torch.tensor(7000)}, sb3_eval, 1e-3),
    "batchrenorm": (numbers("weight", "bias", "running_mean", "running_std") | STEPS, batchrenorm_eval, 1e-3),
}
every_source = pytest.mark.parametrize("source", SOURCES)


def eps_for(source: str) -> dict[str, float]:
    return {"eps": translate_options("batchrenorm")["eps"]} if source == "batchrenorm" else {}


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_source
@pytest.mark.parametrize("prefix", ["", "stage1/bn/", "stage1.bn."])
def test_evaluation_is_that_of_the_source(source: Any, prefix: str) -> None:
    theirs, formula, eps = SOURCES[source]
    state = {prefix + name: tensor for name, tensor in theirs.items()}
    found = translate_state(state, source=source, **eps_for(source))
    layer = syncbn.BatchRenorm(C, **translate_options(source), dtype=torch.float64).eval()
    layer.load_state_dict({key.removeprefix(prefix): value for key, value in found.items()})
    assert int(layer.num_batches_tracked) == (0 if source == "keras" else 7000)
    x = torch.randn(4, C, dtype=torch.float64)
    near(layer(x), formula(x, theirs, eps))
    back = translate_state(found, target=source, **eps_for(source))
    assert back.keys() == state.keys()
    for key, value in state.items():
        near(back[key], value)


@every_source
def test_other_keys_stay(source: Any) -> None:
    theirs = SOURCES[source][0]
    state: dict[str, Any] = {f"bn.{name}": tensor for name, tensor in theirs.items()}
    state |= {"conv.weight": torch.ones(1), "conv.bias": torch.zeros(1), "steps": "not a layer's", "epoch": 3}
    before = dict(state)
    found = translate_state(state, source=source, **eps_for(source))
    assert state == before
    assert {key: found[key] for key in ("conv.weight", "conv.bias", "steps", "epoch")} == {
        key: before[key] for key in ("conv.weight", "conv.bias", "steps", "epoch")
    }
    assert {key for key in found if key.startswith("bn.")} == {
        f"bn.{name}" for name in syncbn.SyncBatchNorm(C).state_dict()
    }


def test_arrays_and_suffixes_of_keras() -> None:
    state = {f"bn/{name}:0": tensor.numpy().astype(np.float32) for name, tensor in SOURCES["keras"][0].items()}
    found = translate_state(state, source="keras")
    assert found["bn/running_var"].dtype == torch.float32
    assert np.array_equal(found["bn/weight"].numpy(), state["bn/gamma:0"])


@pytest.mark.parametrize(("left_out", "name", "value"), [("gamma", "weight", 1.0), ("beta", "bias", 0.0)])
def test_a_layer_of_keras_without_scale_or_center(left_out: str, name: str, value: float) -> None:
    state = {key: tensor for key, tensor in SOURCES["keras"][0].items() if key != left_out}
    assert translate_state(state, source="keras")[name].tolist() == [value] * C
    without = {key: tensor for key, tensor in state.items() if key.startswith("moving")}
    assert translate_state(without, source="keras").keys() == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("moving_variance", (C, C), rf"bn/: moving_variance must have the shape \(C,\).*got \({C}, {C}\) beside"),
        ("gamma", (1,), rf"bn/: gamma must have.*got \(1,\) beside a moving_mean of \({C},\)"),
        ("moving_mean", (1, C), "bn/: moving_mean must have"),
    ],
)
def test_tensors_of_another_kind_of_layer(name: str, shape: tuple[int, ...], problem: str) -> None:
    state = {f"bn/{key}": tensor for key, tensor in SOURCES["keras"][0].items()}
    with pytest.raises(ValueError, match=problem):
        translate_state(state | {f"bn/{name}": torch.ones(shape)}, source="keras")


def test_a_step_of_keras() -> None:
    """Its running mean after one step, and its variance but for n / (n - 1)."""
    theirs, momentum, n = SOURCES["keras"][0], 0.99, 8
    layer = syncbn.SyncBatchNorm(C, **translate_options("keras", momentum=momentum), dtype=torch.float64)
    layer.load_state_dict(translate_state(theirs, source="keras"))
    x = torch.randn(n, C, dtype=torch.float64)
    layer(x)
    near(layer.running_mean, theirs["moving_mean"] * momentum + x.mean(0) * (1 - momentum))
    var = x.var(0, unbiased=False) * n / (n - 1)
    near(layer.running_var, theirs["moving_variance"] * momentum + var * (1 - momentum))


def limits_of(source: Any, steps: int, **options: Any) -> tuple[float, float]:
    layer = syncbn.BatchRenorm(C, **translate_options(source, **options))
    r_max, d_max = correction_limits(torch.tensor(steps), layer._limits())
    return float(r_max), float(d_max)


def test_limits_of_r_and_d() -> None:
    for n in (0, 4999, 5000, 5001, 12345, 24999, 25000, 39999, 40000, 10**6):
        r_max, d_max = limits_of("batchrenorm", n)
        # The formulas of ludvb/batchrenorm, which add constants that do not cancel to the last bit.
        assert r_max == pytest.approx(min(max(2 / 35000 * n + 25 / 35, 1.0), 3.0), abs=1e-12)
        assert d_max == pytest.approx(min(max(5 / 20000 * n - 25 / 20, 0.0), 5.0), abs=1e-12)
    for n in (0, 9, 10, 11, 19):
        factor = n // 10  # torchrl's, of r - 1 and d
        assert limits_of("torchrl", n, warmup_steps=10, max_r=2.0) == (1 + factor * 1.0, factor * 5.0)
        assert limits_of("torchrl", n, warmup_steps=0) == (3.0, 5.0)
        assert limits_of("sb3", n, warmup_steps=10) == ((3.0, 5.0) if n > 10 else (1.0, 0.0))


def test_a_deviation_as_small_as_eps() -> None:
    """A channel that is constant: its running_std is eps alone."""
    state = {**SOURCES["batchrenorm"][0], "running_std": torch.full((C,), 1e-3, dtype=torch.float32)}
    found = translate_state(state, source="batchrenorm", eps=1e-6)
    assert found["running_var"].tolist() == pytest.approx([0.0] * C, abs=1e-12)
    with pytest.raises(ValueError, match=r"^the layer: eps must be at most the square of each running_std, got 1e-05"):
        translate_state(state, source="batchrenorm", eps=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either source or target, got source=None and target=None"),
        ({"source": "keras", "target": "sb3"}, "either source or target"),
        ({"source": "flax"}, "the format must be one of 'keras', 'torchrl', 'sb3', 'batchrenorm', got 'flax'"),
        ({"source": "sb3"}, r"expected a layer with ra_mean and ra_var, got the names gamma, beta, moving_mean"),
        ({"target": "sb3"}, "expected a layer with running_mean and running_var"),
        ({"source": "keras", "eps": 1e-3}, "eps must be left out with this format, got 0.001"),
        ({"source": "batchrenorm"}, "eps must be given with this format, got None"),
    ],
    ids=str,
)
def test_mistakes(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_state(SOURCES["keras"][0], **arguments)


def test_mistakes_in_options() -> None:
    with pytest.raises(ValueError, match=r"keras has no option 'eps' \(got eps=0.1\) of momentum, epsilon"):
        translate_options("keras", eps=0.1)
    with pytest.raises(ValueError, match="smooth must be False, got True"):
        translate_options("torchrl", smooth=True)
    with pytest.raises(ValueError, match="the format must be one of"):
        translate_options("tf")  # type: ignore[arg-type]
