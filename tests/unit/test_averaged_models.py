"""Averages of a model's weights (SWA, EMA), and the running statistics that they have and should have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from averaged_cases import LAYERS, average, batch, model_of, population, trained
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, get_swa_multi_avg_fn, update_bn

import syncbn

AVERAGES = ["swa", "swa with buffers", "ema", "ema with buffers", "timm", "timm without buffers"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""float64: the means of 60 values of order 1 to 10, added in another order."""


def check(model: nn.Module, expected: Sequence[tuple[Tensor, Tensor]]) -> None:
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm, (mean, var) in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm.running_mean, mean, **EXACT)
        torch.testing.assert_close(norm.running_var, var, **EXACT)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", AVERAGES)
def test_recomputed_statistics_are_those_of_the_averaged_weights(how: str, kind: str) -> None:
    """In one call, whatever the averaged model's running statistics were."""
    averaged = trained(kind, how)
    module = averaged.module
    batches = [batch(step, 20) for step in range(100, 103)]
    expected = population(module, batches)
    far = (module[1].running_var - expected[0][1]).abs() / expected[0][1]
    assert bool((far > 0.05).any()), "what the average has would not do"
    syncbn.update_population_statistics(averaged, [(x, "target") for x in batches])
    check(averaged, expected)
    x = batch(200, 8)
    for (mean, var), linear in zip(expected, (module[0], module[3]), strict=True):
        x = (linear(x) - mean) / (var + 1e-5).sqrt()
        x = x.tanh() if linear is module[0] else x
    torch.testing.assert_close(averaged.eval()(batch(200, 8)), x, **EXACT)


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_update_is_the_other_estimator(kind: str) -> None:
    """`update_bn` has the mean of the batches' variances; that is `estimator="mean"` if batches have one size."""
    first, second = trained(kind, "swa"), trained(kind, "swa")
    batches = [batch(step, 20) for step in range(100, 103)]
    expected = population(first.module, batches, "mean")
    update_bn(batches, first)
    syncbn.update_population_statistics(second, batches, estimator="mean")
    for averaged in (first, second):
        check(averaged, expected)


def states(kind: str, steps: int) -> list[dict[str, Tensor]]:
    """The state of the model after each step."""
    found: list[dict[str, Tensor]] = []
    trained(kind, None, steps, lambda model: found.append({k: v.clone() for k, v in model.state_dict().items()}))
    return found


def test_without_buffers_the_statistics_are_the_last_models() -> None:
    last = states("sync", 6)[-1]
    for how in ("swa", "ema", "timm without buffers"):
        found = trained("sync", how, 6).module.state_dict()
        assert all(torch.equal(found[key], last[key]) for key in last if "running" in key or "tracked" in key)
        assert not torch.equal(found["0.weight"], last["0.weight"])


@pytest.mark.parametrize("how", ["swa with buffers", "ema with buffers", "timm"])
def test_with_buffers_the_statistics_are_averaged_like_weights(how: str) -> None:
    found = trained("renorm", how, 6).module.state_dict()
    every = states("renorm", 6)
    for key in every[0]:
        if "tracked" in key:
            continue
        expected = every[0][key]
        for number, state in enumerate(every[1:], 1):
            expected = expected + (state[key] - expected) * (1 / (number + 1) if "swa" in how else 0.1)
        torch.testing.assert_close(found[key], expected, **EXACT)


def test_the_average_of_an_integer() -> None:
    """Torch cuts `num_batches_tracked` off at each step, so that it stays behind, for SWA at 1; timm copies it.

    To train an average on, it is loaded from the model.
    """
    last = states("renorm", 40)[-1]
    counters = {key: value for key, value in last.items() if key.endswith("num_batches_tracked")}
    for how, expected in (
        ("swa with buffers", {1}),
        ("ema with buffers", range(29, 33)),
        ("timm", {40}),
        ("ema", {40}),
    ):
        averaged = trained("renorm", how, 40)
        assert last["1.num_batches_tracked"] == 40
        assert int(averaged.module[1].num_batches_tracked) in expected, how
        averaged.module.load_state_dict(counters, strict=False)
        assert int(averaged.module[1].num_batches_tracked) == 40


def test_an_average_that_torch_cannot_make() -> None:
    """Torch's faster form of SWA, its default on CUDA, has no average of integers."""
    model = model_of("torch")
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True)
    averaged.update_parameters(model)
    with pytest.raises(RuntimeError, match="Integer division"):
        averaged.update_parameters(model)
    averaged = AveragedModel(model, avg_fn=get_swa_avg_fn(), use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)


@pytest.mark.parametrize("how", AVERAGES)
def test_domains(how: str) -> None:
    """An average within a domain is the same as outside: buffers keep their places and names."""
    results = []
    for within in (False, True):
        model = syncbn.domains(model_of("sync"), ["clean", "noisy"])
        averaged, update = average(model, how)
        for step in range(4):
            with syncbn.domain(model, "noisy"):
                model(3 * batch(step, 10))
                if within:
                    update()
            if not within:
                update()
        results.append(averaged.module.state_dict())
        with syncbn.domain(averaged, "noisy"):
            syncbn.update_population_statistics(averaged, [batch(9, 10)])
    outside, inside = results
    assert outside.keys() == inside.keys()
    assert all(torch.equal(outside[key], inside[key]) for key in outside)
    check_of: Callable[..., None] = torch.testing.assert_close
    held = averaged.module[1].domain_noisy
    check_of(held.running_mean, population(averaged.module, [batch(9, 10)])[0][0], **EXACT)
    assert int(averaged.module[1].num_batches_tracked) == 0


def test_frozen_layers_of_an_average() -> None:
    model = syncbn.freeze(model_of("sync"))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(3):
        model.train()(batch(step, 10))
        averaged.update_parameters(model)
    averaged.train()(batch(5, 10))
    update_bn([batch(6, 10)], averaged)
    expected = model_of("sync").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in averaged.module.state_dict().items())
