"""convert and revert: what stays, what changes, and that it is undone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Required, get_args, get_origin, get_type_hints

import pytest
import torch
from convert_cases import (
    KINDS,
    LAYERS,
    ScaledBatchNorm,
    batch,
    every_kind,
    make_model,
    pickled,
    saved,
    scale,
    snapshot,
    tensors,
)
from torch import nn

import syncbn
from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm, convert, revert
from syncbn.convert import GhostOptions, RenormOptions, SyncOptions
from syncbn.convert_layer import options_of
from syncbn.layers import SmallBatchNorm

# -- what is kept ------------------------------------------------------------------------------------------------------


@every_kind
def test_layers_change_class_and_nothing_else(kind: str) -> None:
    model = make_model()
    modules, before, names = list(model.modules()), tensors(model), list(model.state_dict())
    assert convert(model, kind, **KINDS[kind]) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert tensors(model) == before
    assert list(model.state_dict()) == names
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert all(isinstance(m, LAYERS[kind]) for m in layers.values())
    assert [m.qualified_name for m in layers.values()] == list(layers) == ["1", "2.1", "5"]
    assert [(m.eps, m.momentum) for m in layers.values()] == [(1e-5, 0.1), (1e-3, 0.2), (1e-5, 0.1)]
    model(batch()).sum().backward()


@every_kind
def test_revert_restores_every_attribute(kind: str) -> None:
    model = make_model()
    before = snapshot(model)
    assert revert(convert(model, kind, eps=0.1, momentum=None, **KINDS[kind])) is model
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="expected 4D input"):
        model[1](torch.zeros(2, 4))  # nn.BatchNorm2d's own check


def test_a_class_is_a_kind_as_well() -> None:
    assert isinstance(convert(nn.BatchNorm2d(3), GhostBatchNorm, ghost_batch_size=2), GhostBatchNorm)


@pytest.mark.parametrize(
    ("kind", "options"), [("sync", SyncOptions), ("ghost", GhostOptions), ("renorm", RenormOptions)]
)
def test_the_types_for_editors_are_the_layers_own(kind: str, options: Any) -> None:
    cls, typed = LAYERS[kind], get_type_hints(options, include_extras=True)
    required = {name for name, hint in typed.items() if get_origin(hint) is Required}
    known = options_of(cls)
    assert required == {name for name, parameter in known.items() if parameter.default is parameter.empty}
    hints = get_type_hints(cls.__init__)
    assert {name: hints[name] for name in known} == {
        name: get_args(hint)[0] if name in required else hint for name, hint in typed.items()
    }


@every_kind
def test_an_optimizer_made_before_moves_the_weights(kind: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, kind, **KINDS[kind])
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[:3](batch()).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved >= {"0.weight", "1.weight", "1.bias", "2.0.weight", "2.1.weight", "2.1.bias"}


def test_every_sort_of_hook_fires() -> None:
    model, fired = make_model(), []
    layer = model[1]
    layer.register_forward_pre_hook(lambda *_: fired.append("forward pre"))
    layer.register_forward_hook(lambda *_: fired.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    layer.register_state_dict_pre_hook(lambda *_: fired.append("state_dict pre"))
    layer.register_state_dict_post_hook(lambda *_: fired.append("state_dict"))
    layer.register_load_state_dict_pre_hook(lambda *_: fired.append("load pre"))
    layer.register_load_state_dict_post_hook(lambda *_: fired.append("load"))
    layer.weight.register_hook(lambda _: fired.append("weight"))
    for change in (lambda m: convert(m, "sync"), revert):
        change(model)
        fired.clear()
        model(batch()).sum().backward()
        model.load_state_dict(model.state_dict())
        order = ["forward pre", "forward", "backward pre", "weight", "backward", "state_dict pre", "state_dict"]
        assert sorted(fired) == sorted([*order, "load pre", "load"])


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    kept = [shared]
    convert(model, "sync")
    assert model["a"][0] is model["b"][0] is kept[0]
    assert shared.qualified_name == "a.0"
    revert(model)
    assert model["a"][0] is model["b"][0]
    assert type(shared) is nn.BatchNorm2d


def test_training_mode_and_requires_grad_are_each_layers_own() -> None:
    model = make_model()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    for change in (lambda m: convert(m, "sync"), revert):
        change(model)
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == grads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_kind
def test_dtype_stays(kind: str, dtype: torch.dtype) -> None:
    layer = nn.BatchNorm2d(3, dtype=dtype)
    convert(layer, kind, **KINDS[kind])
    assert [t.dtype for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)] == [dtype] * 4
    x = torch.randn(4, 3, 2, 2, dtype=dtype)
    assert layer(x).dtype is dtype
    assert layer.eval()(x).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_made_half_in_between_can_be_reverted(dtype: torch.dtype) -> None:
    model, plain = convert(make_model(), "sync").to(dtype), make_model().to(dtype)
    assert model[1].running_var.dtype is torch.float32
    revert(model)
    assert {name: t.dtype for name, t in model.state_dict().items()} == {
        n: t.dtype for n, t in plain.state_dict().items()
    }
    x = batch().to(dtype)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
    by_hand = nn.Sequential(SyncBatchNorm(4)).to(dtype)
    assert revert(convert(by_hand, "renorm"))[0].running_var.dtype is torch.float32


@every_kind
def test_a_layer_on_the_meta_device(kind: str) -> None:
    model = make_model().to("meta")
    convert(model, kind, **KINDS[kind])
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu").load_state_dict(make_model().state_dict())
    assert model(batch()).isfinite().all()


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_variants_of_a_layer(options: dict[str, Any]) -> None:
    if not set(options) <= set(inspect.signature(nn.BatchNorm2d).parameters):
        pytest.skip(f"this torch's BatchNorm2d does not have {', '.join(options)}")
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, **options, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    convert(layer, "sync")
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(revert(layer).state_dict()), dict(plain.state_dict()), rtol=1e-12, atol=1e-12)


def test_where_chooses_layers() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), ScaledBatchNorm(4), nn.BatchNorm2d(4))
    seen = []

    def first(name: str, layer: nn.Module) -> bool:
        seen.append((name, layer))
        return name == "0"

    convert(model, "sync", where=first)
    assert isinstance(model[0], SyncBatchNorm)
    assert [type(m) for m in model[1:]] == [ScaledBatchNorm, nn.BatchNorm2d]
    assert seen == list(model.named_children())


def test_what_is_no_batch_normalization_stays() -> None:
    others = nn.ModuleList(
        [
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.GroupNorm(2, 4),
            nn.LayerNorm(4),
            nn.Identity(),
        ]
    )
    before = snapshot(others)
    assert snapshot(convert(others, "sync")) == before
    assert snapshot(revert(others)) == before


# -- again, otherwise, and back ----------------------------------------------------------------------------------------


@every_kind
def test_the_same_again_changes_nothing(kind: str) -> None:
    model = convert(make_model(), kind, **KINDS[kind])
    model(torch.full((4, 3, 8, 8), torch.inf))
    assert model[1].num_nonfinite_batches == 1
    model[1]._agreed_groups = 7
    before, conversion = snapshot(model), vars(model[1])["_conversion"]
    convert(model, kind, **KINDS[kind])
    assert snapshot(model) == before
    assert vars(model[1])["_conversion"] is conversion
    assert model[1]._agreed_groups == 7
    convert(model[2], kind, **KINDS[kind])
    assert model[2][1].qualified_name == "2.1"  # and not "1", its name in the part


def test_defaults_spelled_out_are_the_same_options() -> None:
    model = convert(make_model(), "ghost", ghost_batch_size=2)
    model[1]._agreed_groups = 7
    convert(model, GhostBatchNorm, ghost_batch_size=2, remainder="error", running_update="mean", sync=False)
    assert model[1]._agreed_groups == 7
    convert(model, "ghost", ghost_batch_size=4)
    assert model[1]._agreed_groups is None
    assert model[1].ghost_batch_size == 4


def test_another_kind_starts_from_the_first_class() -> None:
    model = make_model()
    before = snapshot(model)
    for kind, options in [*KINDS.items(), ("ghost", {"ghost_batch_size": 4, "eps": 0.5}), ("sync", {"momentum": None})]:
        convert(model, kind, **options)
        layer = model[2][1]
        assert isinstance(layer, LAYERS[kind])
        assert layer.eps == options.get("eps", 1e-3)
        assert layer.momentum == options.get("momentum", 0.2)
        assert ("r_max" in vars(layer)) == (kind == "renorm")
        assert layer.ghost_batch_size == options.get("ghost_batch_size")
    model(torch.full((4, 3, 8, 8), torch.inf))
    convert(model, "sync")
    assert model[1].num_nonfinite_batches == 1
    assert model[1].momentum == 0.1  # no longer given, so the first layer's again
    model[1].reset_running_stats()
    assert {k: v[0] for k, v in snapshot(revert(model)).items()} == {k: v[0] for k, v in before.items()}
    assert snapshot(model) == before


def test_a_layer_made_by_hand() -> None:
    model = nn.Sequential(
        GhostBatchNorm(4, 2, remainder="smaller"), SyncBatchNorm(4, sync_group_size=2), BatchRenorm(4)
    )
    before = snapshot(model)
    assert snapshot(revert(model)) == before
    convert(model, "ghost", ghost_batch_size=2, remainder="smaller")
    assert [type(m) for m in model] == [GhostBatchNorm] * 3
    assert "_conversion" not in vars(model[0])
    assert model[0].qualified_name == "0"
    assert "r_max" not in vars(model[2])
    model[0].qualified_name = None
    assert snapshot(revert(model)) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
@every_kind
def test_a_copy_works_and_can_be_reverted(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    syncbn.register_batchnorm(ScaledBatchNorm, scale)
    model = make_model()
    model[1] = ScaledBatchNorm(4)
    classes = [type(m) for m in model.modules()]
    other = copied(convert(model, kind, momentum=0.5, **KINDS[kind]))
    assert not {id(t) for t in other.state_dict(keep_vars=True).values()} & set(tensors(model).values())
    torch.testing.assert_close(other(batch()), model(batch()), rtol=0, atol=0)
    revert(other)
    assert [type(m) for m in other.modules()] == classes
    assert [m.momentum for m in other.modules() if hasattr(m, "momentum")] == [0.1, 0.2, 0.1]
    assert isinstance(model[2][1], SmallBatchNorm)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    other(batch())


@every_kind
def test_checkpoints_load_in_both_directions(kind: str) -> None:
    plain, converted = make_model(), convert(make_model(), kind, **KINDS[kind])
    torch_sync = nn.SyncBatchNorm.convert_sync_batchnorm(make_model())
    converted(batch())
    for target in (plain, torch_sync):
        target.load_state_dict(converted.state_dict())
        torch.testing.assert_close(dict(target.state_dict()), dict(converted.state_dict()), rtol=0, atol=0)
    plain(batch())
    fresh = convert(make_model(), kind, **KINDS[kind])
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh.eval()(batch()), plain.eval()(batch()), rtol=0, atol=0)
    fresh.load_state_dict(torch_sync.state_dict())
    torch.testing.assert_close(dict(fresh.state_dict()), dict(converted.state_dict()), rtol=0, atol=0)
