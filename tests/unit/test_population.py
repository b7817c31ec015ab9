"""Population statistics, and the divergence of batch statistics from them, in one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import syncbn
from syncbn.population import (
    LayerStatistics,
    Population,
    batch_statistics,
    effective_count,
    gaussian_divergence,
    update_population_statistics,
)

SIZES = (5, 8, 1, 2)


def network(layer=lambda c: syncbn.GhostBatchNorm(c, 2, remainder="smaller")):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), layer(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), layer(4)]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3)
    return model


def batches(sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 7, 7, generator=generator, dtype=torch.float64) + 5 for n in sizes]


def inputs_of(model, layer, data):
    """What a layer was given, gathered by a hook, as a truth to compare with."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with batch_statistics(model), torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["ghost", "torch"])
def test_both_estimators_against_the_whole_data(kind):
    model = network() if kind == "ghost" else network(nn.BatchNorm2d)
    found = update_population_statistics(model, batches())
    for name in ("1", "5"):
        seen = inputs_of(model, model[int(name)], batches())
        whole = torch.cat(seen).transpose(0, 1).flatten(1)
        close = {"rtol": 1e-10, "atol": 1e-12}  # sums of squares in float64, |mean| / std below 10
        torch.testing.assert_close(model[int(name)].running_mean, whole.mean(1), **close)
        torch.testing.assert_close(model[int(name)].running_var, whole.var(1), **close)
        groups = [g for x in seen for g in (x.split(2) if kind == "ghost" else [x])]
        groups = [g.transpose(0, 1).flatten(1) for g in groups]
        counts = torch.tensor([g.shape[1] for g in groups], dtype=torch.float64)
        mean_of_vars = (torch.stack([g.var(1) for g in groups]) * counts[:, None]).sum(0) / counts.sum()
        torch.testing.assert_close(found[name].var("mean"), mean_of_vars, **close)


def test_weights_modes_and_buffers_are_left_alone():
    model = network()
    model[3].train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    population = Population(model)
    with population.observing():
        for x in batches():
            model(x)
    with population.used("mean"):
        assert not torch.equal(model[1].running_var, before["1.running_var"])
    with pytest.raises(RuntimeError), population.used("mean"):
        model(torch.zeros(2, 1, 7, 7, dtype=torch.float64))
    with pytest.raises(RuntimeError), batch_statistics(model):
        model(torch.zeros(2, 1, 7, 7, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(m.observer is None for m in model if isinstance(m, syncbn.GhostBatchNorm))
    model(batches()[0])  # and training goes on: the running statistics move again
    assert not torch.equal(model[5].running_mean, before["5.running_mean"])


def test_torch_layers_are_observed_without_a_trace():
    model = network(nn.BatchNorm2d)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with Population(model).observing():
        model(batches()[0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[1]._forward_pre_hooks


def test_what_cannot_be_recomputed():
    with pytest.raises(ValueError, match="no batch normalization"):
        update_population_statistics(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="non-empty batch"):
        update_population_statistics(network(), [])
    with pytest.raises(ValueError, match="estimator must be 'mean' or 'total', got 'median'"):
        update_population_statistics(network(), batches(), estimator="median")


@pytest.mark.parametrize("m", [8, 16, 64, 512])
def test_divergence_of_gaussian_batches_is_the_closed_form(m):
    """400 batches of 16 channels: the mean of 6,400 divergences, each about as large as its deviation."""
    layer = syncbn.GhostBatchNorm(16, m)
    generator = torch.Generator().manual_seed(m)
    population = Population(layer)
    with population.observing():
        for _ in range(4):
            layer(3 + 2 * torch.randn(100 * m, 16, generator=generator))
    (found,) = population.divergences()
    assert found.count == m
    assert found.kl == pytest.approx(gaussian_divergence(m), rel=0.05)
    assert found.effective == pytest.approx(m, rel=0.05)
    assert (found.channels, found.dead) == (16, 0)


def test_closed_form():
    assert gaussian_divergence(8) == pytest.approx(0.142, abs=5e-4)
    assert gaussian_divergence(512) == pytest.approx(1 / 512, rel=0.01)
    assert effective_count(gaussian_divergence(37.0)) == pytest.approx(37.0)
    assert effective_count(0.0) is None


def test_divergence_of_running_statistics_and_dead_channels():
    layer = syncbn.SyncBatchNorm(2)
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 7.0
    population = Population(layer)
    with population.observing():
        for part in x.split(400):
            layer(part)
    (found,) = population.divergences()
    assert (found.layer, found.dead) == ("", 1)
    var, mean = x[:, 0].double().var(unbiased=False), x[:, 0].double().mean()
    expected = 0.5 * (1 / var + mean.square() / var - 1 + math.log(var))
    assert found.running_kl == pytest.approx(float(expected), abs=1e-5)  # eps is part of both variances


def test_empty_groups_count_for_nothing():
    sums = LayerStatistics(2, 1e-5, torch.device("cpu"))
    count = torch.tensor([[4.0], [0.0]], dtype=torch.float64)
    mean, var = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    sums.add(count, mean, var)
    assert float(sums.count) == 4
    assert sums.divergence("x", (mean[0], var[0])).count == 4


def test_a_batch_that_is_not_finite_is_left_out():
    model, truth = network(), network()
    data = batches()
    spoilt = [*data[:2], data[2].index_fill(3, torch.tensor([0]), torch.inf), data[3]]
    update_population_statistics(model, spoilt)
    update_population_statistics(truth, [*data[:2], data[3]])
    torch.testing.assert_close(model[1].running_var, truth[1].running_var)
    assert model[5].running_mean.isfinite().all()
    with pytest.raises(ValueError, match="finite values"):
        update_population_statistics(model, [torch.full((2, 3, 7, 7), torch.nan, dtype=torch.float64)])


def test_only_the_layers_that_are_wanted():
    model = network()
    before = model[1].running_mean.clone()
    found = update_population_statistics(model, batches(), where=lambda name, layer: name == "5")
    assert list(found) == ["5"]
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(model[5].running_mean, torch.zeros(4, dtype=torch.float64))


def test_layers_that_evaluation_does_not_reach_are_left_alone():
    model = nn.ModuleDict({"used": nn.BatchNorm2d(3), "spare": nn.BatchNorm2d(3)})
    model.forward = lambda x: model["used"](x)
    update_population_statistics(model, [torch.randn(4, 3, 2, 2) + 7])
    assert torch.equal(model["spare"].running_var, torch.ones(3))
    assert model["used"].running_mean.min() > 5


def test_observers_nest():
    layer = syncbn.SyncBatchNorm(2)
    outer = Population(layer)
    with outer.observing():
        with batch_statistics(layer):
            layer(torch.randn(4, 2))
        layer(torch.randn(8, 2))
    assert float(outer.statistics()[""].count) == 8
    assert layer.num_batches_tracked == 0
