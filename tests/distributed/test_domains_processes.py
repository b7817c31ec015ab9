"""Domains, frozen layers and averaged models on two processes, against one process in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from averaged_cases import batch as whole_batch
from averaged_cases import model_of, population, trained
from pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""float64, order 1 to 10; the ranks' sums are added in another order."""
NAMES = ["clean", "noisy"]
Pools = Callable[[int], Pool]
LAYERS: dict[str, Callable[[], Any]] = {
    "sync": lambda: syncbn.SyncBatchNorm(3),
    "ghost": lambda: syncbn.GhostBatchNorm(3, 8, sync=True, remainder="smaller"),  # one group of all ranks
    "renorm": lambda: syncbn.BatchRenorm(3, sync=True, warmup_steps=99, r_ramp_end=99, d_ramp_end=99, momentum=0.1),
}
SIZES = {"clean": (5, 3), "noisy": (2, 7)}


def batch(name: str, step: int) -> Tensor:
    """(samples of all ranks, 4)"""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SIZES[name]), 4, generator=generator, dtype=torch.float64)
    return x if name == "clean" else 5 - 3 * x


def part(name: str, step: int) -> Tensor:
    return batch(name, step).split(SIZES[name])[dist.get_rank()]


def net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), norm, nn.Tanh(), nn.Linear(3, 2)).double()


def domains_on_ranks(kind: str, affine: bool) -> dict[str, Tensor]:
    model = syncbn.domains(net(LAYERS[kind]()), NAMES, affine=affine)
    for step in range(4):
        for name in NAMES:
            with syncbn.domain(model, name):
                model(part(name, step)).square().sum().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    gradients = {f"{name} grad": parameter.grad for name, parameter in model.named_parameters()}
    return {**gradients, **model.state_dict()}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_domain_is_torchs_layer_on_all_its_samples(pools: Pools, kind: str, affine: bool) -> None:
    model = net(nn.BatchNorm1d(3))
    norms = [nn.BatchNorm1d(3).double() for _ in NAMES]
    if not affine:
        norms[1].weight, norms[1].bias = norms[0].weight, norms[0].bias
    for step in range(4):
        for name, norm in zip(NAMES, norms, strict=True):
            model[1] = norm
            model(batch(name, step)).square().sum().backward()
    expected = {"0.weight grad": model[0].weight.grad, "1.weight grad": norms[0].weight.grad}
    if affine:
        expected["1.domain_noisy.bias grad"] = norms[1].bias.grad
    for prefix, norm in zip(("1.", "1.domain_noisy."), norms, strict=True):
        expected |= {prefix + name: buffer for name, buffer in norm.named_buffers()}
    for found in pools(2).run(domains_on_ranks, kind, affine):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def in_other_domains() -> str:
    """What the ranks are told when rank 1 stays in the default domain; within 17 reductions, one of which has a tag."""
    model = syncbn.domains(syncbn.SyncBatchNorm(3), NAMES)
    for _ in range(17):
        try:
            with syncbn.domain(model, NAMES[1 - dist.get_rank()]):
                model(torch.randn(4, 3))
        except RuntimeError as error:
            return str(error)
    return ""


def test_ranks_in_different_domains_are_told(pools: Pools) -> None:
    clean, noisy = (f"SyncBatchNorm in domain '{name}' (forward)" for name in NAMES)
    first, second = pools(2).run(in_other_domains)
    assert "the statistics of different layers were added" in first
    assert f"rank 0 is at {noisy}" in first
    assert f"rank 1 at {clean}" in first
    assert f"rank 1 is at {clean}" in second


class Collectives(TorchDispatchMode):
    """Counts collectives, all of which are operators of these namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(layer: nn.Module) -> int:
    """Collectives of a forward and a backward pass in training mode."""
    layer.train()
    x = torch.randn(4, 3, requires_grad=True)
    with Collectives() as collectives:
        layer(x).sum().backward()
    return sum(collectives.seen.values())


def collectives_of_frozen(kind: str) -> tuple[int, int, int, int]:
    layer = LAYERS[kind]()
    counted(layer)  # ranks agree on the number of ghost groups once
    counts = [counted(layer)]
    syncbn.freeze(layer)
    counts.append(counted(layer))
    counts.append(counted(copy.deepcopy(layer)))
    syncbn.unfreeze(layer)
    counts.append(counted(layer))
    return tuple(counts)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_layers_run_no_collective(pools: Pools, kind: str) -> None:
    assert pools(2).run(collectives_of_frozen, kind) == [(2, 0, 0, 2)] * 2


def alone_on_rank_0() -> bool:
    """A frozen layer needs no other rank: rank 0 trains on while rank 1 does nothing."""
    layer = syncbn.freeze(syncbn.SyncBatchNorm(3)).train()
    if dist.get_rank() == 0:
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    return True


def test_one_rank_alone(pools: Pools) -> None:
    assert pools(2).run(alone_on_rank_0, timeout=30) == [True, True]


def frozen_under_ddp(affine: bool) -> dict[str, Tensor]:
    """Statistics may be frozen after wrapping; parameters may not."""
    model = net(syncbn.SyncBatchNorm(3))
    if affine:
        syncbn.freeze(model, affine=True)
    wrapped = DistributedDataParallel(model)
    if not affine:
        syncbn.freeze(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        wrapped.train()(batch("clean", step).split(4)[dist.get_rank()]).square().sum().backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_layers_under_ddp(pools: Pools, affine: bool) -> None:
    model = net(nn.BatchNorm1d(3))
    model[1].eval().requires_grad_(not affine)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        (model(batch("clean", step)).square().sum() / 2).backward()  # DDP takes the mean over ranks
        optimizer.step()
    for found in pools(2).run(frozen_under_ddp, affine):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def split_under_ddp() -> dict[str, Tensor]:
    """The recipe of docs/recipes_statistics.md: two passes, one backward pass."""
    model = syncbn.domains(net(syncbn.SyncBatchNorm(3)), NAMES, affine=True)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        outputs = []
        for name in NAMES:
            with syncbn.domain(wrapped, name):
                outputs.append(wrapped(part(name, step)))
        torch.cat(outputs).square().sum().backward()
        optimizer.step()
    syncbn.verify_ranks(model)
    return dict(model.state_dict())


def test_split_batch_norm_under_ddp(pools: Pools) -> None:
    model, norms = net(nn.BatchNorm1d(3)), [nn.BatchNorm1d(3).double() for _ in NAMES]
    optimizer = torch.optim.SGD(
        [*model[0].parameters(), *model[3].parameters(), *nn.ModuleList(norms).parameters()], 0.1
    )
    for step in range(3):
        optimizer.zero_grad()
        for name, norm in zip(NAMES, norms, strict=True):
            model[1] = norm
            (model(batch(name, step)).square().sum() / 2).backward()
        optimizer.step()
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("1.")}
    for prefix, norm in zip(("1.", "1.domain_noisy."), norms, strict=True):
        expected |= {prefix + name: value for name, value in norm.state_dict().items()}
    for found in pools(2).run(split_under_ddp):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def reconciled_and_nudged() -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Buffers of local layers before and after they are reconciled, and what is said of a shared one that differs."""
    local = syncbn.domains(net(syncbn.BatchRenorm(3)), NAMES)
    with syncbn.domain(local, "noisy"):
        local(part("noisy", 0))
    before = {name: value.clone() for name, value in local.state_dict().items()}
    syncbn.reconcile(local)
    shared = syncbn.domains(net(syncbn.SyncBatchNorm(3)), NAMES)
    if dist.get_rank() == 1:
        shared[1].domain_noisy.running_var[2] = 2
    said = ""
    try:
        syncbn.verify_ranks(shared)
    except RuntimeError as error:
        said = str(error)
    return before, dict(local.state_dict()), said


def test_statistics_of_all_domains_are_reconciled_and_compared(pools: Pools) -> None:
    results = pools(2).run(reconciled_and_nudged)
    for _, after, said in results:
        mean = torch.stack([before["1.domain_noisy.running_var"] for before, _, _ in results]).mean(0)
        assert torch.equal(after["1.domain_noisy.running_var"], mean)
        assert "'1.domain_noisy.running_var' is not on rank 1 what it is on rank 0" in said
    assert not torch.equal(*(before["1.domain_noisy.running_var"] for before, _, _ in results))


# -- averaged models ---------------------------------------------------------------------------------------------------


def pieces(kind: str, step: int) -> list[Tensor]:
    """What the ranks have of a step: unequal for layers that share statistics."""
    return list(whole_batch(step, 20).split((13, 7) if "sync" in kind else (10, 10)))


def averaged_on_ranks(kind: str, how: str) -> dict[str, Tensor]:
    rank = dist.get_rank()
    averaged = trained(kind, how, part=lambda x: x.split(5)[rank])
    for parameter in averaged.parameters():  # training on its own data, each rank's weights would be others
        dist.broadcast(parameter.data, 0)
    state = {name: value.clone() for name, value in averaged.module.state_dict().items()}
    syncbn.update_population_statistics(averaged, [pieces(kind, step)[rank] for step in range(100, 103)])
    return {name: averaged.module.state_dict()[name] if "running" in name else state[name] for name in state}


@pytest.mark.parametrize("how", ["swa", "ema with buffers"])
@pytest.mark.parametrize("kind", ["sync", "renorm-sync", "renorm", "ghost", "torch"])
def test_recomputed_statistics_of_an_average_are_those_of_all_ranks(pools: Pools, kind: str, how: str) -> None:
    results = pools(2).run(averaged_on_ranks, kind, how)
    module = model_of(kind)
    module.load_state_dict(results[0])
    steps = [pieces(kind, step) for step in range(100, 103)]
    together = [torch.cat(of) for of in steps] if "sync" in kind else [x for of in steps for x in of]
    for found in results:
        for number, (mean, var) in zip((1, 4), population(module, together), strict=True):
            torch.testing.assert_close(found[f"{number}.running_mean"], mean, **EXACT)
            torch.testing.assert_close(found[f"{number}.running_var"], var, **EXACT)


def torchs_update_on_ranks(kind: str) -> dict[str, Tensor]:
    model = model_of(kind)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    batches = [pieces(kind, step)[dist.get_rank()] for step in range(100, 103)]
    torch.optim.swa_utils.update_bn(batches, averaged)
    return dict(averaged.module.state_dict())


def test_torchs_update_is_right_where_ranks_share_statistics(pools: Pools) -> None:
    """And leaves each rank its own where they do not, as the page says."""
    results = pools(2).run(torchs_update_on_ranks, "sync")
    together = [torch.cat(pieces("sync", step)) for step in range(100, 103)]
    for found in results:
        for number, (mean, var) in zip((1, 4), population(model_of("sync"), together, "mean"), strict=True):
            torch.testing.assert_close(found[f"{number}.running_mean"], mean, **EXACT)
            torch.testing.assert_close(found[f"{number}.running_var"], var, **EXACT)
    first, second = pools(2).run(torchs_update_on_ranks, "ghost")
    assert not torch.allclose(first["1.running_mean"], second["1.running_mean"], rtol=1e-3)


def reconciled_average() -> tuple[Tensor, Tensor]:
    """An average of local statistics that is reconciled at the end, and one of statistics reconciled in each step."""
    rank, found = dist.get_rank(), []
    for each_step in (False, True):
        model = model_of("renorm")
        twin = copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(
            twin, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        for step in range(4):
            model[1](whole_batch(step, 8)[:, :4].split(4)[rank])
            twin.load_state_dict(model.state_dict())
            if each_step:
                syncbn.reconcile(twin)
            averaged.update_parameters(twin)
        syncbn.reconcile(averaged)
        found.append(averaged.module[1].running_var)
    return found[0], found[1]


def test_an_average_of_local_statistics_is_reconciled_once(pools: Pools) -> None:
    """Averages over time and over ranks can be exchanged: both are linear."""
    for once, each_step in pools(2).run(reconciled_average):
        torch.testing.assert_close(once, each_step, **EXACT)
