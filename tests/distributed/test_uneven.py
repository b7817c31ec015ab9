"""`syncbn.uneven` against one process that has the union of the ranks' batches."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

SIZES = {
    "one rank ends first": [[4, 4, 3], [2], [4, 1]],
    "one rank has none": [[3, 3], [], [1, 2]],
    "a step without samples": [[2, 0, 3], [2, 0], [1]],
    "even": [[2, 2]] * 3,
}


def model() -> nn.Module:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for c in (3, 4))
    net = nn.Sequential(first, second, nn.Flatten(), nn.Linear(16, 5))
    return syncbn.convert(net.double(), "sync")


def batches(sizes: list[list[int]]) -> list[list[tuple[Tensor, Tensor]]]:
    """By rank, its batches."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (torch.randn(n, 3, 6, 6, generator=generator).double(), torch.randint(5, (n,), generator=generator))
            for n in each
        ]
        for each in sizes
    ]


def trained(net: nn.Module, data: Any) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for (x, y), factor in syncbn.uneven(data):
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y, reduction="sum") * factor).backward()
        optimizer.step()
    return [value.detach() for value in net.state_dict().values()]


def train_on_ranks(sizes: list[list[int]]) -> list[Tensor]:
    return trained(DistributedDataParallel(model()), batches(sizes)[dist.get_rank()])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.fault(
    "data",
    "ranks with different numbers of batches",
    moment="in training",
    outcome="with `syncbn.uneven`, the result of one process on all batches",
    lost="nothing",
)
def test_equals_one_process_on_the_union(pools: Callable[[int], Pool], sizes: list[list[int]]) -> None:
    parts = batches(sizes)
    union = []
    for step in range(max(map(len, sizes))):
        xs, ys = zip(*(part[step] for part in parts if step < len(part)), strict=True)
        union.append((torch.cat(xs), torch.cat(ys)))
    alone = trained(model(), union)
    for result in pools(3).run(train_on_ranks, sizes):
        for ours, truth in zip(result, alone, strict=True):
            assert torch.allclose(ours.double(), truth.double(), rtol=1e-10, atol=1e-12)


class Pair(NamedTuple):
    x: Tensor
    name: str


def kinds_of_batches() -> list[Any]:
    """What a rank without batches gets, for batches of several kinds."""
    found = []
    for kind in ("dict", "named", "list"):
        x, scalar = torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor(7.0)
        batch = {"dict": {"x": x, "scale": scalar}, "named": Pair(x, "a name"), "list": [x, [x.long()]]}[kind]
        data = [batch] if dist.get_rank() == 0 else []
        found += [(got, factor) for got, factor in syncbn.uneven(data)]
    return found


def test_batches_of_any_kind(pools: Callable[[int], Pool]) -> None:
    full, empty = pools(2).run(kinds_of_batches)
    assert [factor for _, factor in full] == [factor for _, factor in empty] == [1.0] * 3
    mapping, named, listed = (batch for batch, _ in empty)
    assert (mapping["x"].shape, mapping["x"].dtype, mapping["scale"].item()) == ((0, 3), torch.bfloat16, 7.0)
    assert isinstance(named, Pair)
    assert (named.x.shape, named.name) == ((0, 3), "a name")
    assert isinstance(listed, list)
    assert listed[1][0].dtype == torch.int64
    assert full[2][0][0].shape == (2, 3)


class Starting:
    """An iterator that starts again after its end, as some loaders of other libraries do."""

    def __init__(self, batches: int) -> None:
        self._batches, self._next = batches, 0

    def __iter__(self) -> Starting:
        return self

    def __next__(self) -> Tensor:
        self._next += 1
        if self._next > self._batches:
            self._next = 0
            raise StopIteration
        return torch.zeros(1, 1)


def sizes_until_the_end(rank_batches: list[int]) -> list[int]:
    return [len(x) for x, _ in syncbn.uneven(Starting(rank_batches[dist.get_rank()]))]


def test_the_end_is_the_end(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(sizes_until_the_end, [3, 4]) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def userdicts() -> list[str]:
    batch = UserDict(x=torch.zeros(2, 3), name="a")
    data = [batch] if dist.get_rank() == 0 else []
    return [f"{type(found).__name__} {tuple(found['x'].shape)} {found['name']}" for found, _ in syncbn.uneven(data)]


def test_mappings_keep_their_class(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(userdicts) == [["UserDict (2, 3) a"], ["UserDict (0, 3) a"]]


def in_a_part_of_the_world() -> list[tuple[int, float]]:
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return []
    data = [torch.zeros(3, 1)] * (1 + dist.get_rank())
    return [(len(x), factor) for x, factor in syncbn.uneven(data, pair)]


def test_a_process_group(pools: Callable[[int], Pool]) -> None:
    first, outside, last = pools(3).run(in_a_part_of_the_world)
    assert outside == []
    assert first == [(3, 2 / 6), (0, 2 / 3), (0, 2 / 3)]
    assert last == [(3, 2 / 6), (3, 2 / 3), (3, 2 / 3)]


def test_one_process() -> None:
    assert [(len(x), factor) for x, factor in syncbn.uneven([torch.zeros(4), torch.zeros(0)])] == [(4, 0.25)]
    assert list(syncbn.uneven([])) == []
    with pytest.raises(ValueError, match="first dimension is the sample; this NoneType has none"):
        list(syncbn.uneven([torch.zeros(2, 1), None, torch.zeros(3, 1)]))
    with pytest.raises(ValueError, match="first dimension is the sample; this dict has none"):
        list(syncbn.uneven([{"scale": torch.tensor(1.0), "name": "a"}]))
    with pytest.raises(ValueError, match=r"those of this one have \[2, 3\]"):
        list(syncbn.uneven([[torch.zeros(3, 8, 8), torch.zeros(2, 4)]]))
