"""Population statistics are those of the whole data set, however it lies on the processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.population import Population, gaussian_divergence, update_population_statistics

LAYERS = {
    "sync": lambda c: syncbn.SyncBatchNorm(c),
    "sync-2": lambda c: syncbn.SyncBatchNorm(c, sync_group_size=2),
    "ghost": lambda c: syncbn.GhostBatchNorm(c, 3, remainder="smaller"),
    "renorm": lambda c: syncbn.BatchRenorm(c),
    "torch": lambda c: nn.BatchNorm2d(c),
}
# Images of each rank in each of three batches: ragged, and none in places.
SIZES = {1: [(5, 9, 2)], 2: [(5, 0, 3), (4, 7, 1)], 4: [(3, 0, 2), (0, 4, 3), (5, 2, 2), (1, 1, 6)]}


def images(rank, step, n):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return 4 + torch.randn(n, 3, 6, 6, generator=generator)


def recompute(kind, world):
    """The statistics of two layers; and what the layers were given, for the truth."""
    torch.manual_seed(0)
    first, second = LAYERS[kind](4), LAYERS[kind](2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), first, nn.ReLU(), nn.Conv2d(4, 2, 3), second)
    seen = {"1": [], "4": []}
    for name, layer in (("1", first), ("4", second)):
        layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].detach()))
    data = [images(dist.get_rank(), step, n) for step, n in enumerate(SIZES[world][dist.get_rank()])]
    update_population_statistics(model, data)
    return {name: (model[int(name)].running_mean, model[int(name)].running_var, torch.cat(seen[name])) for name in seen}


# nn.BatchNorm2d takes no empty batch in training, and a group of two ranks needs two.
CASES = [(k, w) for w in SIZES for k in LAYERS if k != ("torch" if w > 1 else "sync-2")]


@pytest.mark.parametrize(("kind", "world"), CASES)
def test_whole_data_set(pools, kind, world):
    results = pools(world).run(recompute, kind, world)
    for name in ("1", "4"):
        whole = torch.cat([result[name][2] for result in results]).double().transpose(0, 1).flatten(1)
        for mean, var, _ in (result[name] for result in results):
            # float32 buffers and activations of order 1; the sums are float64.
            torch.testing.assert_close(mean.double(), whole.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(var.double(), whole.var(1), rtol=1e-6, atol=1e-6)


def sync_divergence(m):
    layer = syncbn.SyncBatchNorm(32)
    generator = torch.Generator().manual_seed(dist.get_rank())
    population = Population(layer)
    with population.observing():
        for _ in range(200):
            layer(torch.randn(m, 32, generator=generator))
    (found,) = population.divergences()
    return found.kl, found.count, found.effective


@pytest.mark.parametrize("world", [1, 2, 4])
def test_synchronized_batches_diverge_as_the_larger_batch_they_are(pools, world):
    for kl, count, effective in pools(world).run(sync_divergence, 16):
        assert count == 16 * world
        assert kl == pytest.approx(gaussian_divergence(16 * world), rel=0.05)
        assert effective == pytest.approx(16 * world, rel=0.05)


def reconciled():
    """Running statistics of two layers before and after :func:`syncbn.reconcile`, and of a layer of torch's."""
    model = nn.Sequential(syncbn.GhostBatchNorm(3, 2), syncbn.BatchRenorm(3), nn.BatchNorm1d(3))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        model(torch.randn(4, 3, generator=generator) + dist.get_rank())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    syncbn.reconcile(model)
    return before, dict(model.state_dict())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_reconciled_running_statistics_are_the_mean_over_the_ranks(pools, world):
    results = pools(world).run(reconciled)
    for name in results[0][0]:
        mean = torch.stack([before[name] for before, _ in results]).double().mean(0)
        for before, after in results:
            averaged = "running" in name and not name.startswith("2.")
            # The mean is taken in float64 and rounded to float32 once.
            expected = mean.to(before[name].dtype) if averaged else before[name]
            assert torch.equal(after[name], expected), name
