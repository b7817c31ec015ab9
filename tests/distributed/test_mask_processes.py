"""Masks on several ranks, against the definition in float64 in one process on the valid rows of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from masked_truth import LAYERS, by_definition, draw, draw_mask, groups_of, made
from pool import Pool
from test_autograd import Collectives
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn

# Sums of some hundred float64 terms in two orders, with |mean| / std of about 3.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
Pools = Callable[[int], Pool]
each_layer = pytest.mark.parametrize("name", LAYERS)


def synced(name: str, **options: Any) -> Any:
    """All processes share statistics; group i of each rank is one with group i of the others."""
    options |= {} if name == "sync" else {"sync": True}
    options |= {"max_ghost_groups": 3} if "ghost" in name else {}
    return made(name, **options)


def batch(sizes: Sequence[int], shares: Sequence[float], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, mask and output gradient of all ranks, one after the other; ``shares`` of the elements are valid."""
    n = sum(sizes)
    masks = [draw_mask(10 * step + rank, size, 7, share=shares[rank]) for rank, size in enumerate(sizes)]
    return draw(step, n, 3, 7), torch.cat(masks), draw(step + 100, n, 3, 7) - 3


def trained(name: str, sizes: Sequence[int], shares: Sequence[float], second: bool) -> dict[str, Any]:
    """Outputs and gradients of this rank's pieces in two steps; a rank with only valid elements has no mask."""
    rank, layer = dist.get_rank(), synced(name, activation="silu")
    piece = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found: dict[str, Any] = {"y": [], "dx": [], "parameters": [], "collectives": []}
    for step in range(2):
        x, mask, dy = (t[piece] for t in batch(sizes, shares, step))
        x = x.masked_fill(~mask[:, None], float("nan")).requires_grad_()
        with Collectives() as seen:
            y = layer(x, mask=None if shares[rank] == 1 else mask)
            gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy, create_graph=second)
        if second:
            # Each rank has a part of the parameters' gradients alone, so their squares would not add up.
            gradients = torch.autograd.grad(gradients[0].square().sum(), [x, *layer.parameters()])
        found["y"].append(y.detach())
        found["dx"].append(gradients[0])
        found["parameters"].append(gradients[1:])
        found["collectives"].append(len(seen.seen))
    return found | {"buffers": dict(layer.named_buffers())}


def expected(name: str, sizes: Sequence[int], shares: Sequence[float], second: bool) -> dict[str, Any]:
    layer, groups = made(name, activation="silu"), torch.cat([groups_of(name, n) for n in sizes])
    found: dict[str, Any] = {"y": [], "dx": [], "parameters": []}
    for step in range(2):
        x, mask, dy = batch(sizes, shares, step)
        x.requires_grad_()
        y = by_definition(layer, x, mask, groups)
        inputs = [x, *layer.parameters()]
        gradients = torch.autograd.grad(y, inputs, dy, create_graph=second)
        if second:
            gradients = torch.autograd.grad(gradients[0].square().sum(), inputs)
        found["y"].append(y.detach())
        found["dx"].append(gradients[0])
        found["parameters"].append(gradients[1:])
    return found | {"buffers": dict(layer.named_buffers())}


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((6,), (0.6,)), ((4, 4), (0.9, 0.3)), ((4, 6), (1, 0.4)), ((4, 4), (0.5, 0)), ((4, 0), (0.5, 0.5))],
    ids=["one", "unequal", "one without a mask", "one without a valid element", "one empty"],
)
@each_layer
def test_the_valid_rows_of_all_ranks(
    pools: Pools, name: str, sizes: tuple[int, ...], shares: tuple[float, ...], second: bool
) -> None:
    truth = expected(name, sizes, shares, second)
    results = pools(len(sizes)).run(trained, name, sizes, shares, second)
    for step in range(2):
        for key in ("y", "dx"):
            torch.testing.assert_close(torch.cat([r[key][step] for r in results]), truth[key][step], **EXACT)
        for index, theirs in enumerate(truth["parameters"][step]):
            ours = sum(r["parameters"][step][index] for r in results)
            torch.testing.assert_close(ours, theirs, **EXACT)
    for result in results:
        for key, value in truth["buffers"].items():
            torch.testing.assert_close(result["buffers"][key], value, **EXACT)
        if not second:
            assert result["collectives"] == [0 if len(sizes) == 1 else 2] * 2


def all_but_one_invalid(name: str) -> str:
    """Rank 1 has the only valid element."""
    layer, mask = synced(name), torch.zeros(4, 7, dtype=torch.bool)
    mask[3, 2] = dist.get_rank() == 1
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="one valid value per channel over all processes") as caught:
        layer(draw(0, 4, 3, 7), mask=mask)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    return str(caught.value)


@each_layer
def test_a_single_valid_element_is_an_error_on_all_ranks(pools: Pools, name: str) -> None:
    first, second = pools(2).run(all_but_one_invalid, name)
    assert first == second


def padding_without_history(name: str, needed: bool) -> list[bool]:
    """Rank 0 has nothing but padding, which is a constant; whether rank 1 needs a gradient is ``needed``."""
    layer = synced(name).requires_grad_(False)
    found = []
    for _ in range(2):
        x, mask = torch.zeros(4, 3, 7, dtype=torch.float64), torch.zeros(4, 7, dtype=torch.bool)
        if dist.get_rank() == 1:
            x, mask = draw(0, 4, 3, 7).requires_grad_(needed), ~mask
        y = layer(x, mask=mask)
        if y.requires_grad:
            y.square().sum().backward()
        found.append(y.requires_grad)
    return found


@pytest.mark.parametrize("needed", [False, True])
@each_layer
def test_padding_without_history_joins_the_others(pools: Pools, name: str, needed: bool) -> None:
    assert pools(2).run(padding_without_history, name, needed) == [[needed] * 2] * 2


def checkpointed(name: str) -> list[tuple[bool, int]]:
    x, mask = draw(dist.get_rank(), 4, 3, 7), draw_mask(dist.get_rank(), 4, 7, share=(0.9, 0.3)[dist.get_rank()])
    results, numbers = [], []
    for kept in (False, True):
        layer, leaf = synced(name), x.clone().requires_grad_()
        options: dict[str, Any] = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
        with Collectives() as seen:
            y = checkpoint(layer, leaf, mask=mask, **options) if kept else layer(leaf, mask=mask)
            y.pow(3).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        numbers.append(len(seen.seen))
    return [(all(torch.equal(a, b) for a, b in zip(*results, strict=True)), number) for number in numbers]


@each_layer
def test_activation_checkpointing_reduces_nothing_again(pools: Pools, name: str) -> None:
    assert pools(2).run(checkpointed, name) == [[(True, 2), (True, 2)]] * 2


class Padded(torch.nn.Module):
    """Two layers of sequences with a mask; the output is a number for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = synced("sync", activation="relu"), synced("renorm")
        self.mix = torch.nn.Conv1d(3, 3, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.mix.weight.copy_(torch.linspace(-1, 1, 27).view(3, 3, 3))
            self.mix.bias.fill_(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.mix(self.norm(x, mask=mask)), mask=mask).square().sum((1, 2))


SIZES = {"one rank ends first": [[4, 3, 2], [2]], "one rank has none": [[3, 2], []]}


def trained_on_loader(net: torch.nn.Module, loader: Any) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for (x, mask), factor in syncbn.uneven(loader):
        optimizer.zero_grad()
        (net(x, mask).sum() * factor).backward()
        optimizer.step()
    return [value.detach() for value in net.state_dict().values()]


def loaders(sizes: list[list[int]]) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        [(draw(10 * rank + step, n, 3, 7), draw_mask(10 * rank + step, n, 7)) for step, n in enumerate(each)]
        for rank, each in enumerate(sizes)
    ]


def train_on_ranks(sizes: list[list[int]]) -> list[Tensor]:
    return trained_on_loader(DistributedDataParallel(Padded()), loaders(sizes)[dist.get_rank()])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ranks_with_different_numbers_of_batches(pools: Pools, sizes: list[list[int]]) -> None:
    steps = max(map(len, sizes))
    parts = [[each[step] for each in loaders(sizes) if step < len(each)] for step in range(steps)]
    whole = [tuple(torch.cat(tensors) for tensors in zip(*part, strict=True)) for part in parts]
    truth = trained_on_loader(Padded(), whole)
    for found in pools(2).run(train_on_ranks, sizes):
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


def compiled() -> None:
    """A compiled model is the model, for masks with other numbers of valid elements than the first."""
    net = Padded()
    twin, rank = copy.deepcopy(net), dist.get_rank()
    fast = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x, mask = draw(rank, 4, 3, 7), draw_mask(rank + 2 * step, 4, 7, share=(0.9, 0.3)[(rank + step) % 2])
        for run, stance in ((fast, "fail_on_recompile" if step else "default"), (twin, "force_eager")):
            with torch.compiler.set_stance(stance):
                run(x, mask).sum().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_compiled_in_one_graph(pools: Pools) -> None:
    pools(2).run(compiled)
