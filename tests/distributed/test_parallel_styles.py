"""Torch's other kinds of parallel training around synchronized layers, against one process in float64.

Each of these adds the same terms as one process does, in another order: float64 keeps 16 digits of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import Pool
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import syncbn

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
STEPS = 3
Tensors = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    return nn.Sequential(first, nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))).double()


def samples(step: int, number: int = 8) -> Tensor:
    return 2 * torch.randn(number, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + 1


def half(step: int, rank: int) -> Tensor:
    return samples(step).chunk(2)[rank]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, batch: Callable[[int], Tensor], steps: range = range(STEPS)) -> None:
    of_model = optimizer(model)
    for step in steps:
        of_model.zero_grad()
        model(batch(step)).square().mean().backward()
        of_model.step()


def whole(model: nn.Module) -> Tensors:
    """Its tensors, gathered where they are sharded."""
    state = {name: t.detach() for name, t in model.state_dict().items()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def check(found: list[Tensors], expected: Tensors) -> None:
    for tensors in found:
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


# -- FSDP2 and distributed checkpoints ---------------------------------------------------------------------------------


def sharded() -> nn.Module:
    model = syncbn.convert(network(), "sync")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(folder: str) -> Tensors:
    model, rank = sharded(), dist.get_rank()
    train(model, lambda step: half(step, rank))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    return whole(model)


def load_sharded(folder: str) -> Tensors:
    model, rank = sharded(), dist.get_rank()
    train(model, lambda step: half(step + 9, rank), range(1))  # to have other numbers
    state = get_model_state_dict(model)
    dcp.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state)
    return whole(model)


@pytest.mark.works_with("torch", "FSDP2: `fully_shard` of a converted model on 2 processes, as one process")
@pytest.mark.works_with(
    "torch", "distributed checkpoints: saved by FSDP2 on 2 processes, loaded there and into torch's layers"
)
def test_fsdp2_and_its_checkpoints(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    plain = network()
    train(plain, samples)
    saved = pools(2).run(train_sharded, str(tmp_path))
    check(saved, whole(plain))
    for found in pools(2).run(load_sharded, str(tmp_path)):
        assert all(torch.equal(tensor, saved[0][name]) for name, tensor in found.items())
    alone = network()
    state = alone.state_dict()
    dcp.load({"model": state}, checkpoint_id=str(tmp_path), no_dist=True)
    alone.load_state_dict(state)
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in alone.state_dict().items())


# -- tensor parallel ---------------------------------------------------------------------------------------------------


def train_tensor_parallel() -> Tensors:
    """Two ranks share each half of the batch: a layer that synchronized over all four would count it twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = syncbn.convert(network_of_two(), "sync", process_group=mesh["data"])
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    rank, of_model = mesh["data"].get_local_rank(), optimizer(model)
    for step in range(STEPS):
        of_model.zero_grad()
        model(half(step, rank)).square().mean().backward()
        average_gradients(model, mesh["data"])
        of_model.step()
    return whole(model)


def network_of_two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()


def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    for parameter in model.parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert gradient is not None
        dist.all_reduce(gradient, group=mesh.get_group())
        gradient /= mesh.size()


@pytest.mark.works_with("torch", "tensor parallel on 4 processes, statistics over the dimension `data` of the mesh")
def test_tensor_parallel(pools: Callable[[int], Pool]) -> None:
    plain = network_of_two()
    train(plain, samples)
    check(pools(4).run(train_tensor_parallel), whole(plain))


# -- pipeline parallel -------------------------------------------------------------------------------------------------

MICROBATCHES = 2
WIDTH = 6
"""Of what goes between the stages."""


def pipeline(options: dict[str, Any]) -> tuple[int, Tensors]:
    """Trains one stage; its index and tensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    rank, index = mesh["data"].get_local_rank(), mesh["stage"].get_local_rank()
    model = syncbn.convert(network(), "sync", process_group=mesh["data"])
    part = model[index]
    stage = PipelineStage(
        part, index, 2, torch.device("cpu"), group=mesh["stage"].get_group(), **options.get(index, {})
    )
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=lambda y, target: (y - target).square().mean())
    of_part = optimizer(part)
    for step in range(STEPS):
        of_part.zero_grad()
        target = torch.zeros(4, 2, dtype=torch.float64)
        schedule.step(*([half(step, rank)] if index == 0 else []), **({"target": target} if index == 1 else {}))
        average_gradients(part, mesh["data"])
        of_part.step()
    return index, {f"{index}.{name}": t.detach() for name, t in part.state_dict().items()}


def of_shape(*shape: int) -> Tensor:
    """Stages look whether what goes between them needs a gradient."""
    return torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=shape[-1] == WIDTH)


@pytest.mark.works_with(
    "torch", "pipeline parallel on 4 processes: 2 stages, each microbatch normalized over 2 processes"
)
def test_pipeline_parallel(pools: Callable[[int], Pool]) -> None:
    plain = network()
    of_plain = optimizer(plain)
    for step in range(STEPS):
        of_plain.zero_grad()
        parts = [half(step, rank).chunk(MICROBATCHES) for rank in range(2)]
        for microbatch in zip(*parts, strict=True):  # the same number on each rank
            (plain(torch.cat(microbatch)).square().mean() / MICROBATCHES).backward()
        of_plain.step()
    expected = whole(plain)
    sizes = {"input_args": of_shape(2, 4), "output_args": of_shape(2, WIDTH)}
    of_last = {"input_args": of_shape(2, WIDTH), "output_args": of_shape(2, 2)}
    for index, tensors in pools(4).run(pipeline, {0: sizes, 1: of_last}):
        check([tensors], {name: t for name, t in expected.items() if name.startswith(f"{index}.")})


@pytest.mark.works_with("torch", "pipeline parallel without `input_args`: its trial pass enters the running statistics")
def test_a_pipeline_that_finds_out_its_shapes(pools: Callable[[int], Pool]) -> None:
    """It runs each stage once on made-up values, of torch's layers too."""
    counts = [t for _, found in pools(4).run(pipeline, {}) for n, t in found.items() if "tracked" in n]
    assert {int(count) for count in counts} == {MICROBATCHES * STEPS + 1}
