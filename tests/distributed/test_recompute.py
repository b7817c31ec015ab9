"""Activation checkpointing, and empty batches without history, on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_autograd import Collectives
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn

LAYERS: dict[str, dict[str, Any]] = {
    "SyncBatchNorm": {},
    "GhostBatchNorm": {"ghost_batch_size": 2, "sync": True, "max_ghost_groups": 3},
    "BatchRenorm": {"sync": True, "warmup_steps": 0, "r_ramp_end": 2, "d_ramp_end": 2},
}


def block(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    layers = [getattr(syncbn, name)(4, dtype=torch.float64, **options) for _ in range(2)]
    return nn.Sequential(nn.Linear(3, 4).double(), layers[0], nn.ReLU(), nn.Linear(4, 4).double(), layers[1])


def trained(net: nn.Module, x: Tensor, how: str) -> tuple[list[Tensor], int]:
    """What three steps make of a block, and the number of collectives."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Collectives() as seen:
        for _ in range(3):
            optimizer.zero_grad()
            if how == "plain":
                y = net(x)
            elif how == "nested":
                inner, outer = net[:2], net[2:]

                def nest(z: Tensor, inner: nn.Module = inner, outer: nn.Module = outer) -> Tensor:
                    kept = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
                    z = checkpoint(inner, z, **kept)
                    return checkpoint(outer, z, **kept)

                y = checkpoint(nest, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
            else:
                contexts = {"context_fn": syncbn.checkpoint_contexts} if how == "kept" else {}
                y = checkpoint(net, x, use_reentrant=how == "reentrant", **contexts)
            y.square().sum().backward()
            optimizer.step()
    return [x.grad, *(value.detach() for value in net.state_dict().values())], len(seen.seen)


def compare_with_plain(name: str, options: dict[str, Any], how: str) -> tuple[bool, int, int]:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(dist.get_rank())).double()
    expected, plain = trained(block(name, options), x, "plain")
    found, number = trained(block(name, options), x, how)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), plain, number


@pytest.mark.works_with(
    "torch", "`torch.utils.checkpoint` with this package's contexts: the repeated pass reduces nothing"
)
@pytest.mark.parametrize("how", ["kept", "nested"])
@pytest.mark.parametrize(("name", "options"), LAYERS.items(), ids=LAYERS.keys())
def test_a_repetition_is_the_first_pass(
    pools: Callable[[int], Pool], name: str, options: dict[str, Any], how: str
) -> None:
    """Bit for bit: outputs, gradients and buffers, without another collective."""
    for same, plain, number in pools(2).run(compare_with_plain, name, options, how):
        assert same
        assert number == plain == 3 * 2 * 2


@pytest.mark.parametrize("how", ["reentrant", "without contexts"])
@pytest.mark.parametrize("name", ["SyncBatchNorm", "GhostBatchNorm"])
def test_without_contexts_statistics_are_reduced_again_and_updated_once(
    pools: Callable[[int], Pool], name: str, how: str
) -> None:
    for same, plain, number in pools(2).run(compare_with_plain, name, LAYERS[name], how):
        assert same
        assert number == plain + 3 * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_renormalization_needs_the_contexts(reentrant: bool) -> None:
    layer = syncbn.BatchRenorm(3)
    y = checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="context_fn=syncbn"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["sync", "ghost", "renorm"])
def test_one_process_and_two_backward_passes(kind: str) -> None:
    """The graph is kept, so the forward pass is repeated twice."""
    grads, states = [], []
    for kept in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        net = syncbn.convert(net, kind, **({"ghost_batch_size": 2} if kind == "ghost" else {}))
        x = torch.randn(4, 3, requires_grad=True)
        contexts = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
        y = checkpoint(net, x, **contexts) if kept else net(x)
        for _ in range(2):
            y.square().sum().backward(retain_graph=True)
        grads.append(x.grad)
        states.append(net.state_dict())
    # The composed path and the fused one add in another order.
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kept", [False, True])
def test_a_derivative_inside_of_a_checkpoint(kept: bool) -> None:
    """It repeats the first layers while the first pass still goes on. All layers are of one size."""
    torch.manual_seed(0)
    layers = [syncbn.SyncBatchNorm(3, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def forces(z: Tensor) -> Tensor:
        energy = layers[0](z).pow(3).sum()
        (force,) = torch.autograd.grad(energy, z, create_graph=True)
        return layers[1](force * z)

    found = []
    for checkpointed in (False, True):
        contexts = {"use_reentrant": False, "early_stop": False}
        contexts |= {"context_fn": syncbn.checkpoint_contexts} if kept else {}
        y = checkpoint(forces, x, **contexts) if checkpointed else forces(x)
        found.append(torch.autograd.grad(y.pow(2).mul(torch.arange(3)).sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def empty_without_history(name: str, options: dict[str, Any], frozen: bool, needed: bool) -> list[Any]:
    """Rank 0 has an empty batch that is a constant; whether the others' batches need a gradient is ``needed``."""
    layer = getattr(syncbn, name)(3, affine=frozen, **options)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    found = []
    for _ in range(3):
        rank = dist.get_rank()
        x = torch.empty(0, 3) if rank == 0 else torch.randn(4, 3, requires_grad=needed)
        y = layer(x)
        if y.requires_grad:
            y.square().sum().backward()
        found.append((y.requires_grad, None if x.grad is None else x.grad.isfinite().all().item()))
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["affine=False", "frozen"])
@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize(("name", "options"), LAYERS.items(), ids=LAYERS.keys())
def test_an_empty_batch_without_history_joins_the_others(
    pools: Callable[[int], Pool], name: str, options: dict[str, Any], frozen: bool, needed: bool
) -> None:
    empty, *others = pools(3).run(empty_without_history, name, options, frozen, needed)
    assert empty == [(needed, None)] * 3
    assert others == [[(needed, True if needed else None)] * 3] * 2
