"""convert(..., fuse_activations=True): which layers apply the activation that follows them, and which do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_cases import ScaledBatchNorm, scale, snapshot
from test_convert_fusion import FUSED, Model, applied, assert_same, build, fused
from test_convert_models import batchnorms
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import GhostBatchNorm, SyncBatchNorm, convert, revert
from syncbn.fusion import FusedReLU, FusedSiLU


class AsksWhatItIs(nn.Module):
    """A value in a trace is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.act(self.first(x)))
        return y if isinstance(y, Tensor) else self.act(y)


class Optional(nn.Module):
    """Returns one layer's output itself where it is not asked for more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        y = self.bn(self.act(self.first(x)))
        return y if more is None else self.act(y)


# -- what is fused, and what is not ------------------------------------------------------------------------------------


def kept(self: Model, x: Tensor) -> Tensor:
    self.features = self.bn(x)
    return self.act(self.features)


def in_training_only(self: Model, x: Tensor) -> Tensor:
    x = self.bn(x)
    return self.act(x) if self.training else x


def again_in_backward(self: Model, x: Tensor) -> Tensor:
    return checkpoint(lambda x: self.act(self.bn(x)), x, use_reentrant=False) + self.act(self.other(x))


def again_by_a_function(self: Model, x: Tensor) -> Tensor:
    return checkpoint(lambda x: self.act(self.bn(x)), x, use_reentrant=True) + self.act(self.other(x))


def control_flow(self: Model, x: Tensor) -> Tensor:
    return self.act(self.bn(x if x.sum() > 0 else -x))


CASES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a pair": (lambda self, x: self.act(self.bn(x)), ["bn"]),
    "two pairs, one activation": (lambda self, x: self.act(self.other(self.act(self.bn(x)))), ["bn", "other"]),
    "another class of follower": (lambda self, x: F.gelu(self.bn(x)), []),
    "a function": (lambda self, x: F.relu(self.bn(x)), []),
    "also returned": (lambda self, x: (lambda y: (self.act2(y), y))(self.bn(x)), []),
    "also used": (lambda self, x: (lambda y: self.act2(y) + y)(self.bn(x)), []),
    "also kept": (kept, []),
    "after an addition": (lambda self, x: self.act(self.bn(x) + x), []),
    "called twice, the same follower": (lambda self, x: self.act(self.bn(self.act(self.bn(x)))), ["bn"]),
    "called twice, different followers": (lambda self, x: self.act2(self.bn(self.act(self.bn(x)))), []),
    "called twice, followed once": (lambda self, x: self.bn(self.act(self.bn(x))), []),
    "twice with a residual": (lambda self, x: self.act(self.act(self.bn(x)) + self.other(x)), ["bn"]),
    "silu in two places": (lambda self, x: self.act2(x + self.act2(self.bn(x))), []),
    "silu in one place": (lambda self, x: self.act(x + self.act2(self.bn(x))), ["bn"]),
    "one mode only": (in_training_only, []),
    "control flow": (control_flow, []),
    "checkpointed": (again_in_backward, ["bn", "other"]),
    "checkpointed, reentrant": (again_by_a_function, ["bn", "other"]),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", CASES)
def test_which_pairs(name: str) -> None:
    forward, expected = CASES[name]
    plain = build(lambda: Model(forward))
    converted = fused(copy.deepcopy(plain))
    assert applied(converted) == expected
    assert any(isinstance(m, FUSED) for m in converted.modules()) == bool(expected)
    assert_same(converted, plain)


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.ReLU6, nn.GELU, nn.PReLU], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_which_activations(act: type[nn.Module], inplace: bool) -> None:
    options = {"inplace": True} if inplace and act not in (nn.GELU, nn.PReLU) else {}
    options |= {"negative_slope": 0.2} if act is nn.LeakyReLU else {}
    plain = build(lambda: Model(lambda self, x: self.act(self.bn(x)) * 2, act(**options)))
    converted = fused(copy.deepcopy(plain))
    assert applied(converted) == (["bn"] if act in (nn.ReLU, nn.LeakyReLU, nn.SiLU) else [])
    assert converted.bn.negative_slope == options.get("negative_slope", 0.01)
    assert isinstance(converted.act, act)
    assert_same(converted, plain)


class OwnReLU(nn.ReLU):
    """A subclass, which may do more."""


def test_a_subclass_of_an_activation_is_another_class() -> None:
    assert not applied(fused(nn.Sequential(nn.BatchNorm2d(3), OwnReLU())))


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m[1][0].register_forward_hook(lambda *_: None),
        lambda m: m[1][0].register_forward_pre_hook(lambda *_: None),
        lambda m: m[1][0].register_full_backward_hook(lambda *_: None),
        lambda m: m[1][0].register_full_backward_pre_hook(lambda *_: None),
        lambda m: m[2][0].register_forward_hook(lambda *_: None),
        lambda m: m[2][0].register_forward_pre_hook(lambda *_: None),
        lambda m: m[2][0].register_full_backward_hook(lambda *_: None),
        lambda m: m[1].register_forward_hook(lambda *_: None),
        lambda m: m[2].register_forward_pre_hook(lambda *_: None),
    ],
    ids=[
        *("layer", "layer, pre", "layer, backward", "layer, backward pre", "act", "act, pre", "act, backward"),
        *("around the layer", "around the activation"),
    ],
)
def test_hooks_between_see_what_they_saw(hook: Callable[[nn.Module], Any]) -> None:
    second = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)), second)
    handle = hook(model)
    assert not applied(fused(model))
    assert type(model[2][0]) is nn.ReLU
    handle.remove()
    assert applied(fused(model)) == ["1.0"]
    hook(model)
    assert not applied(fused(model))


def test_optional_arguments_are_tried_both_ways() -> None:
    assert applied(fused(Optional())) == ["first"]


def test_types_are_tried_both_ways() -> None:
    assert applied(fused(AsksWhatItIs())) == ["first"]
    assert "isinstance" not in globals()


def test_where_leaves_layers_out() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU())
    fused(model, where=lambda name, _: name == "2")
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.ReLU, SyncBatchNorm, FusedSiLU]
    convert(model, "ghost", ghost_batch_size=2, where=lambda name, _: name == "0")
    assert [type(m) for m in model] == [GhostBatchNorm, nn.ReLU, SyncBatchNorm, FusedSiLU]
    assert applied(model) == ["2"]


def test_a_layer_made_by_hand_keeps_its_activation() -> None:
    first = SyncBatchNorm(3, activation="leaky_relu", negative_slope=0.3)
    model = nn.Sequential(first, nn.ReLU(), SyncBatchNorm(3), nn.ReLU())
    before = snapshot(model)
    convert(model, "ghost", ghost_batch_size=2, fuse_activations=True)
    assert [m.activation for m in batchnorms(model)] == ["leaky_relu", "relu"]
    assert model[0].negative_slope == 0.3
    assert [type(m) for m in model[1::2]] == [nn.ReLU, FusedReLU]
    assert snapshot(revert(model)) == before


# -- parts of models ---------------------------------------------------------------------------------------------------


class Chooses(nn.Module):
    """Cannot be traced, and calls a part of itself in its own way."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), act
        self.part = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(x))
        return self.part(y) if y.sum() > 0 else self.part(-y)


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


def test_what_cannot_be_traced_is_left_out() -> None:
    def make_it() -> nn.Module:
        stem = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.SiLU()]
        return nn.Sequential(*stem, Chooses(nn.SiLU()), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    plain = build(make_it)
    converted = fused(copy.deepcopy(plain))
    assert applied(converted) == ["1", "4.part.2", "5"]
    assert_same(converted, plain)


def test_an_activation_that_is_used_out_of_sight() -> None:
    for act, expected in ((nn.SiLU(), []), (nn.ReLU(), ["1"])):
        plain = build(lambda act=act: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act, Chooses(act)))
        converted = fused(copy.deepcopy(plain))
        assert [name for name in applied(converted) if "part" not in name] == expected
        assert_same(converted, plain)
    hidden = nn.Sequential(nn.Conv2d(4, 4, 1), act := nn.SiLU())  # no normalization inside: not looked into
    plain = build(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), hidden, nn.BatchNorm2d(4), act))
    converted = fused(copy.deepcopy(plain))
    assert not applied(converted)
    assert_same(converted, plain)


def test_a_layer_that_is_used_out_of_sight() -> None:
    shared = Chooses(nn.ReLU())
    model = nn.Sequential(nn.Sequential(shared.bn, nn.ReLU()), shared)
    assert applied(fused(model)) == ["1.part.2"]


def test_tracing_does_not_show() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.bn, self.act, self.calls = nn.BatchNorm2d(3), nn.ReLU(), []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(torch.rand(()))
            self._buffers["steps"].add_(1)
            self.steps += 1
            return self.act(self.bn(x)) * self.steps

    model, state = Counts(), torch.random.get_rng_state()
    model.bn.eval()
    modes = [m.training for m in model.modules()]
    assert applied(fused(model)) == ["bn"]
    assert (model.calls, model.steps, [m.training for m in model.modules()]) == ([], 0, modes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert applied(fused(nn.Sequential(Uncopyable(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))) == ["1.0"]


# -- timm's and registered layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "relu"),
        ({"act_layer": nn.SiLU}, "silu"),
        ({"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3}}, "leaky_relu"),
        ({"act_layer": nn.GELU}, None),
        ({"drop_layer": nn.Dropout}, None),
        ({"apply_act": False}, "silu"),  # the one that follows
    ],
    ids=str,
)
def test_timm_layer(options: dict[str, Any], expected: str | None) -> None:
    plain = build(lambda: nn.Sequential(BatchNormAct2d(3, **options), nn.SiLU()))
    converted = copy.deepcopy(plain)
    before = snapshot(converted)
    layer, act = fused(converted)
    assert layer.activation == expected
    assert (layer.after is None) == (expected is not None)
    assert type(act) is (FusedSiLU if "apply_act" in options else nn.SiLU)
    assert_same(converted, plain)
    assert snapshot(revert(converted.train())) == before


def test_activations_that_do_more_than_their_class() -> None:
    act = nn.ReLU()
    act.forward = lambda x: x
    assert not applied(fused(nn.Sequential(nn.BatchNorm2d(3), act)))
    layer = BatchNormAct2d(3)
    layer.act.register_forward_hook(lambda *_: None)
    assert not applied(fused(nn.Sequential(layer)))


def test_a_registered_class_is_left_alone() -> None:
    syncbn.register_batchnorm(ScaledBatchNorm, scale)
    assert not applied(fused(nn.Sequential(ScaledBatchNorm(3), nn.ReLU())))
