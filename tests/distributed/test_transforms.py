"""Forward-mode derivatives and transforms of torch.func through statistics that ranks share; meshes and DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.distributed as dist
from pool import Pool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import syncbn

RENORM = {"warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1}
SIZES = (3, 0, 2)


def layer(name: str, shared: bool) -> Any:
    options: dict[str, Any] = {"activation": "silu", "dtype": torch.float64}
    if name == "BatchRenorm":
        options |= {"sync": shared, **RENORM}
    return getattr(syncbn, name)(3, **options) if shared or name == "BatchRenorm" else alone(options)


def alone(options: dict[str, Any]) -> Any:
    return syncbn.SyncBatchNorm(3, sync_group_size=1, **options)


def whole() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, sum(SIZES), 3, 4, generator=generator, dtype=torch.float64).unbind()
    return 2 * x + 3, v


def mine(of: Tensor) -> Tensor:
    start = sum(SIZES[: dist.get_rank()])
    return of[start : start + SIZES[dist.get_rank()]]


def pure(of: Any) -> Callable[[Tensor], Tensor]:
    """The layer as a function of its input alone."""
    state = {**dict(of.named_parameters()), **dict(of.named_buffers())}
    return lambda x: torch.func.functional_call(of, {k: t.detach().clone() for k, t in state.items()}, (x,))


def differences(name: str) -> dict[str, float]:
    """By transform, the largest difference from the whole batch on one process, differentiated in reverse mode."""
    x, v = whole()
    expected = torch.autograd.functional.jvp(pure(layer(name, False)), x, v)[1]
    cubes = x.clone().requires_grad_()
    pure(layer(name, False))(cubes).pow(3).sum().backward()
    assert cubes.grad is not None

    shared, buffers = layer(name, True), layer(name, False)
    buffers(x)
    with fw.dual_level():
        dual = fw.unpack_dual(shared(fw.make_dual(mine(x), mine(v)))).tangent
    running = max((shared.get_buffer(n).double() - b.double()).abs().max() for n, b in buffers.named_buffers())

    function = pure(layer(name, True))
    jvp = torch.func.jvp(function, (mine(x),), (mine(v),))[1]
    vjp = torch.func.grad(lambda a: function(a).pow(3).sum())(mine(x))
    directions = torch.stack((v, -2 * v))
    rows = torch.stack([mine(each) for each in directions])
    mapped = torch.func.vmap(lambda t: torch.func.jvp(function, (mine(x),), (t,))[1])(rows)
    second = torch.func.jvp(lambda a: torch.func.jvp(function, (a,), (mine(v),))[1], (mine(x),), (mine(v),))[1]
    plain = pure(layer(name, False))
    reverse = torch.autograd.functional.jvp(
        lambda a: torch.autograd.functional.jvp(plain, a, v, create_graph=True)[1], x, v
    )[1]
    pairs = {
        "dual": (dual, mine(expected)),
        "jvp": (jvp, mine(expected)),
        "grad": (vjp, mine(cubes.grad)),
        "vmap of jvp": (mapped[1], -2 * mine(expected)),
        "jvp of jvp": (second, mine(reverse)),
    }
    found = {how: float((a - b).abs().max()) if b.numel() else 0.0 for how, (a, b) in pairs.items()}
    return {**found, "running statistics": float(running)}


@pytest.mark.works_with("torch", "`torch.func` (`jvp`, `grad`, `vmap`) and forward-mode derivatives across 3 processes")
@pytest.mark.parametrize("name", ["SyncBatchNorm", "BatchRenorm"])
def test_derivatives_of_any_mode_are_exact_across_ranks(pools: Callable[[int], Pool], name: str) -> None:
    for found in pools(3).run(differences, name):
        # Values are of the order of 1 to 50; float64 keeps 16 digits of them.
        assert max(found.values()) < 1e-12, found


def with_a_mesh() -> bool:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
    x, _ = whole()
    part = x[:2] if dist.get_rank() == 0 else x[2:]
    of_mesh, of_world = syncbn.SyncBatchNorm(3, process_group=mesh["data"]), syncbn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="must have one dimension if it is a device mesh"):
        syncbn.SyncBatchNorm(3, process_group=mesh)
    return torch.equal(of_mesh(part.float()), of_world(part.float()))


@pytest.mark.works_with("torch", "a dimension of a `DeviceMesh` as process group")
def test_a_device_mesh_is_a_process_group(pools: Callable[[int], Pool]) -> None:
    assert all(pools(2).run(with_a_mesh))


def with_a_dtensor() -> str:
    x = distribute_tensor(torch.randn(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
    try:
        syncbn.SyncBatchNorm(3)(x)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.works_with("torch", "`DTensor` as input: refused, with what to do")
def test_a_dtensor_is_refused(pools: Callable[[int], Pool]) -> None:
    (said,) = set(pools(2).run(with_a_dtensor))
    assert "a DTensor has no statistics here; give the layer x.to_local()" in said
