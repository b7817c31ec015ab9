"""What convert and revert refuse, in words that help, and that a refusal leaves the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm, convert, revert

# torch's own, about its scripting, which is only here to be refused.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class OddBatchNorm(nn.BatchNorm2d):
    """A subclass that nobody registered."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def make_model(last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), last))


def state(model: nn.Module) -> list[tuple[type, set[str], dict[str, Any]]]:
    """Classes, names of attributes and the plain ones' values."""
    return [
        (type(m), set(vars(m)), {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | None)})
        for m in model.modules()
    ]


def refuses(model: nn.Module, message: str, kind: Any = "sync", **options: Any) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=message):
        convert(model, kind, **options)
    assert state(model) == before


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("batch", {}, "kind must be one of 'sync', 'ghost', 'renorm' or such a layer's class, got 'batch'"),
        (nn.BatchNorm2d, {}, "kind must be one of"),
        (None, {}, "kind must be one of"),
        (
            "sync",
            {"r_max": 3.0},
            r"no option 'r_max' \(got r_max=3.0\).*momentum, process_group, sync_group_size, activation, .*save$",
        ),
        ("ghost", {"ghost_batch_size": 2, "d_max": 3.0}, "no option 'd_max'.*ghost_batch_size.*remainder.*max_ghost"),
        ("renorm", {"num_features": 3}, "no option 'num_features'.*r_max.*sync_group_size.*ghost_batch_size"),
        ("renorm", {"affine": False}, "no option 'affine'"),
        ("ghost", {}, "needs the option 'ghost_batch_size'"),
        ("ghost", {"ghost_batch_size": 0}, "ghost_batch_size must be a positive integer or None, got 0"),
        ("ghost", {"ghost_batch_size": 2, "remainder": "drop"}, "remainder must be one of.*'drop'"),
        ("renorm", {"r_max": 0.5}, "^r_max must be .*at least 1, got 0.5"),
        ("sync", {"sync_group_size": 2, "process_group": [0]}, "process_group or sync_group_size, not both"),
        ("sync", {"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ("sync", {"eps": "1e-5"}, "eps must be a positive number, got '1e-5'"),
        ("sync", {"momentum": 1.5}, "momentum must be a number from 0 to 1, or None.*got 1.5"),
    ],
    ids=str,
)
def test_arguments(kind: Any, options: dict[str, Any], message: str) -> None:
    refuses(make_model(nn.BatchNorm2d(4)), message, kind, **options)
    refuses(nn.Identity(), message, kind, **options)  # also where there is nothing to convert
    refuses(convert(make_model(nn.BatchNorm2d(4)), "sync"), message, kind, **options)


def test_what_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"syncbn.convert expects a torch.nn.Module, got \[\]"):
        convert([], "sync")
    with pytest.raises(ValueError, match=r"syncbn.revert expects a torch.nn.Module"):
        revert(nn.BatchNorm2d)


# -- layers ------------------------------------------------------------------------------------------------------------


def odd_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def untracked(layer: nn.BatchNorm2d) -> nn.Module:
    layer.num_batches_tracked = None
    return layer


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OddBatchNorm(4), r"OddBatchNorm '1.1'.*register_batchnorm\(OddBatchNorm, after\).*where="),
        (lambda: nn.LazyBatchNorm2d(), "LazyBatchNorm2d '1.1'.*run one forward pass first"),
        (lambda: parametrized(nn.BatchNorm2d(4)), "'1.1'.*parametrized; convert first"),
        (lambda: odd_forward(nn.BatchNorm2d(4)), "BatchNorm2d '1.1'.*forward was replaced on the instance"),
        (lambda: untracked(nn.BatchNorm2d(4)), r"BatchNorm2d '1.1'.*set that to torch.tensor\(0\)"),
        (lambda: nn.SyncBatchNorm(4, process_group=-100), "SyncBatchNorm '1.1'.*process_group must be .*got -100"),
    ],
    ids=["unknown subclass", "lazy", "parametrized", "forward replaced", "untracked", "not in the group"],
)
def test_layers_that_are_not_what_they_seem(make: Callable[[], nn.Module], message: str) -> None:
    refuses(make_model(make()), message)
    convert(make_model(make()), "sync", where=lambda name, layer: name == "0")


def test_quantized_layers_are_not_known() -> None:
    layer = torch.ao.nn.quantized.BatchNorm2d(4)
    refuses(
        make_model(layer), "BatchNorm2d '1.1' cannot be converted: torch.ao.nn.quantized.modules.batchnorm.BatchNorm2d"
    )


def test_renorm_names_the_layer_without_running_statistics() -> None:
    model = make_model(nn.BatchNorm2d(4, track_running_stats=False))
    refuses(model, "BatchNorm2d '1.1' cannot be converted: BatchRenorm needs track_running_stats=True", "renorm")
    refuses(model[1][1], "the given BatchNorm2d cannot be converted: BatchRenorm needs", "renorm")
    # From another kind, the failed attempt leaves the first conversion in place.
    refuses(convert(model, "sync"), "SyncBatchNorm '1.1' cannot be converted: BatchRenorm needs", "renorm")
    assert [type(m) for m in revert(model).modules()][1] is nn.BatchNorm2d


def test_a_lazy_layer_that_has_seen_data_is_converted() -> None:
    model = make_model(nn.LazyBatchNorm2d())
    model(torch.randn(2, 4, 3, 3))
    assert isinstance(convert(model, "sync")[1][1], SyncBatchNorm)
    assert type(revert(model)[1][1]) is nn.BatchNorm2d


def test_parametrizations_go_on_after_and_come_off_before() -> None:
    model = convert(make_model(nn.BatchNorm2d(4)), "sync")
    parametrized(model[1][1])
    x = torch.randn(2, 4, 3, 3)
    model(x)
    refuses(model, "'1.1'.*parametrized")
    before = state(model)
    with pytest.raises(ValueError, match=r"'1.1' cannot be reverted: its class was changed from SyncBatchNorm"):
        revert(model)
    assert state(model) == before
    parametrize.remove_parametrizations(model[1][1], "weight")
    assert type(revert(model)[1][1]) is nn.BatchNorm2d


def test_other_modules_may_be_parametrized() -> None:
    model = make_model(nn.BatchNorm2d(4))
    parametrizations.weight_norm(model[1][0])
    convert(model, "sync")
    model(torch.randn(2, 4, 3, 3)).sum().backward()


# -- wrappers ----------------------------------------------------------------------------------------------------------


def refuses_wrapped(wrapped: nn.Module, message: str) -> None:
    refuses(wrapped, message.format("convert"))
    refuses(nn.Sequential(nn.BatchNorm2d(4), wrapped), message.format("convert"))
    with pytest.raises(ValueError, match=message.format("revert")):
        revert(wrapped)


@pytest.mark.usefixtures("world")
def test_distributed_data_parallel() -> None:
    wrapped = nn.parallel.DistributedDataParallel(make_model(nn.BatchNorm2d(4)))
    refuses_wrapped(
        wrapped, r"DistributedDataParallel.*syncbn.{}\(model\) first, then DistributedDataParallel\(model\)"
    )


@pytest.mark.works_with("torch", "`FullyShardedDataParallel` before the conversion: refused, with what to do")
@pytest.mark.usefixtures("world")
def test_fully_sharded_data_parallel() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(make_model(nn.BatchNorm2d(4)), device_id=torch.device("cpu"))
    refuses_wrapped(wrapped, r"FullyShardedDataParallel.*syncbn.{}\(model\) first, then the FSDP wrapper")


@pytest.mark.usefixtures("world")
def test_fully_shard() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(nn.BatchNorm2d(4))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    refuses_wrapped(model, r"syncbn.{}\(model\) first, then fully_shard\(model\)")
    # A part that is not wrapped itself gives itself away by its parameters.
    refuses(model[1], "BatchNorm2d '1' cannot be converted: its parameters are sharded; convert first")


def test_data_parallel() -> None:
    wrapped = nn.DataParallel(make_model(nn.BatchNorm2d(4)))
    refuses_wrapped(wrapped, r"DataParallel.*threads.*syncbn.{}\(model\) first, then DistributedDataParallel\(model\)")


@pytest.mark.works_with("torch", "`torch.compile` before the conversion: refused, with what to do")
def test_compiled() -> None:
    wrapped = torch.compile(make_model(nn.BatchNorm2d(4)))
    refuses_wrapped(wrapped, r"OptimizedModule.*syncbn.{}\(model\) first, then torch.compile\(model\)")
    in_place = make_model(nn.BatchNorm2d(4))
    in_place.compile()
    refuses_wrapped(in_place, r"Sequential.*syncbn.{}\(model\) first, then model.compile\(\)")


def test_scripted() -> None:
    wrapped = torch.jit.script(make_model(nn.BatchNorm2d(4)))
    refuses_wrapped(wrapped, r"its code is fixed.*syncbn.{}\(model\) first, then script it")


# -- converted layers speak of themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 5, 3, 3), {}, "SyncBatchNorm 'layer1.0.bn1'.*expected 4 channels in dimension 1, got 5"),
        ((4,), {}, "SyncBatchNorm 'layer1.0.bn1'.*at least 2 dimensions"),
        ((1, 4), {}, "SyncBatchNorm 'layer1.0.bn1'.*holds one value per channel"),
        ((3, 4), {"ghost_batch_size": 2}, "GhostBatchNorm 'layer1.0.bn1'.*no multiple of ghost_batch_size=2"),
    ],
    ids=str,
)
def test_messages_name_the_layer(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    block = nn.ModuleDict({"bn1": nn.BatchNorm2d(4)})
    model = nn.ModuleDict({"layer1": nn.ModuleList([block])})
    convert(model, "ghost" if options else "sync", **options)
    with pytest.raises(ValueError, match=message):
        block["bn1"](torch.zeros(shape))


def test_a_single_layer_is_named_by_its_class() -> None:
    for kind in (SyncBatchNorm, BatchRenorm):
        layer = convert(nn.BatchNorm2d(4), kind)
        assert layer.qualified_name is None
        with pytest.raises(ValueError, match=rf"^{kind.__name__} \(num_features=4\)"):
            layer(torch.zeros(2, 5))
    assert GhostBatchNorm(4, 2).qualified_name is None
