"""Ranks that hold different models are found, and running statistics updated once a step are those of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor, nn

import syncbn
from syncbn.train import Datasets, RunConfig, Task
from syncbn.train.config import ConfigError
from syncbn.train.loop import train


def model(norm: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 2).double()]
    return syncbn.convert(nn.Sequential(*layers), norm, **options)


def nudge(tensor: Tensor) -> None:
    """Change the last bit of the last element."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor.data.view(integers[tensor.element_size()]).view(-1)[-1] ^= 1


def verdict(norm: str, name: str, rank: int, options: dict[str, Any] | None = None) -> str:
    """What `verify_ranks` says of a model whose tensor ``name`` is another one on ``rank``."""
    net = model(norm, **options or {})
    if dist.get_rank() == rank:
        for each in name.split():
            nudge(net.state_dict()[each])
    try:
        syncbn.verify_ranks(net)
    except RuntimeError as error:
        return str(error)
    return "the same"


@pytest.mark.parametrize("name", ["0.weight", "2.bias", "3.weight", "1.running_var", "1.running_mean"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_bit_is_found(pools: Callable[[int], Pool], name: str, rank: int) -> None:
    (found,) = set(pools(3).run(verdict, "sync", name, rank))
    others = rank if rank else "1, 2"
    assert found.startswith(f"the ranks hold different models: '{name}' is not on rank {others} what it is on rank 0;")


def verdict_of_change(kind: str) -> str:
    """What `verify_ranks` says if rank 1 has the same numbers in other places, or with other signs."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    if dist.get_rank() == 1:
        w = net.weight.data
        w[0, 0], w[0, 1], w[0, 2] = (0.5, -0.5, 0.25) if kind == "signs" else w[0].tolist()
        if kind == "signs":
            w[0, :2] *= -1
        elif kind == "reversed":
            w.copy_(w.flip(0))
        elif kind == "swapped":
            w[1, 0], w[3, 2] = float(w[3, 2]), float(w[1, 0])
    elif kind == "signs":
        net.weight.data[0] = torch.tensor([0.5, -0.5, 0.25])
    if kind == "larger" and dist.get_rank() == 1:
        net = nn.Sequential(net, nn.Linear(4, 1))
    try:
        syncbn.verify_ranks(net)
    except RuntimeError as error:
        return str(error)
    return "the same"


@pytest.mark.parametrize("kind", ["signs", "reversed", "swapped"])
def test_the_same_numbers_in_other_places_are_found(pools: Callable[[int], Pool], kind: str) -> None:
    (found,) = set(pools(2).run(verdict_of_change, kind))
    assert "'weight' is not on rank 1 what it is on rank 0" in found


def test_other_models_are_found(pools: Callable[[int], Pool]) -> None:
    (found,) = set(pools(2).run(verdict_of_change, "larger"))
    assert "the tensors of rank 1 have not the names, shapes and dtypes of those of rank 0" in found


def test_the_first_of_several_is_named(pools: Callable[[int], Pool]) -> None:
    (found,) = set(pools(2).run(verdict, "sync", "3.bias 0.bias 1.running_var", 1))
    assert "'0.bias' is not on rank 1" in found
    assert "and 2 more tensors differ" in found
    (found,) = set(pools(2).run(verdict, "sync", "3.bias 0.bias", 1))
    assert "and 1 more tensor differs" in found


@pytest.mark.parametrize(
    ("norm", "options"), [("ghost", {"ghost_batch_size": 2}), ("renorm", {}), ("sync", {"sync_group_size": 1})]
)
def test_statistics_of_local_layers_may_differ(
    pools: Callable[[int], Pool], norm: str, options: dict[str, Any]
) -> None:
    assert set(pools(2).run(verdict, norm, "1.running_var", 1, options)) == {"the same"}
    (found,) = set(pools(2).run(verdict, norm, "1.weight", 1, options))
    assert "'1.weight'" in found


def test_one_process() -> None:
    syncbn.verify_ranks(model("sync"))


class Straying(Task):
    """A task that changes a weight on one rank, outside of the optimizer."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def model(self) -> nn.Module:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        return self.net

    def data(self, seed: int) -> Datasets:
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))
        pairs = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        return Datasets(train=pairs, test=pairs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.step and dist.get_rank() == 1:
            self.net[2].weight.data[0, 0] += 1e-6
        return (outputs - targets).square().mean()


def stray(step: int) -> tuple[str, int]:
    config = RunConfig(gpus=2, per_gpu_batch_size=4, device="cpu")
    task = Straying(step)
    try:
        train(config, task=task)
    except ConfigError as error:
        return str(error), task.calls
    return "", task.calls


def test_a_run_whose_ranks_part_ends(pools: Callable[[int], Pool]) -> None:
    ((words, calls),) = set(pools(2).run(stray, 5))
    assert words.startswith("task.name: got 'Straying', expected a task whose parameters change by the optimizer alone")
    assert "'2.weight' is not on rank 1 what it is on rank 0" in words
    assert 5 <= calls <= 25


def accumulated(sizes: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Running statistics of a synchronized layer after a step in several passes, and as they have to be."""
    generator = torch.Generator().manual_seed(0)
    passes = [[torch.randn(n, 3, generator=generator).double() * 3 + 7 for n in of] for of in sizes]
    norm = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    with syncbn.accumulate_statistics(norm):
        for of in passes:
            norm(of[dist.get_rank()])
    means = [torch.cat(of).mean(0) for of in passes if sum(map(len, of))]
    variances = [torch.cat(of).var(0) for of in passes if sum(map(len, of))]
    expected = [0.1 * torch.stack(means).mean(0), 0.9 + 0.1 * torch.stack(variances).mean(0)]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [norm.running_mean, norm.running_var], expected


def test_one_update_of_all_ranks(pools: Callable[[int], Pool]) -> None:
    for found, expected in pools(2).run(accumulated, [[4, 2], [0, 3], [0, 0], [1, 1]]):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
