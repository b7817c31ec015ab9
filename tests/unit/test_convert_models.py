"""Real models, converted: the same outputs, gradients and buffers as the model that was not, and back again."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_cases import snapshot
from model_steps import assert_near, assert_same_step, batchnorms, images, make, outputs, train_step
from torch import nn

from syncbn import SyncBatchNorm, convert, convert_layer, revert
from syncbn.compat import import_torchvision

import_torchvision()  # timm needs it, and may fail to import it by itself
timm = pytest.importorskip("timm")
from timm.layers import norm_act  # noqa: E402
from timm.layers.split_batchnorm import SplitBatchNorm2d  # noqa: E402


def from_torchvision(name: str, **options: Any) -> nn.Module:
    return import_torchvision("models").get_model(name, weights=None, **options)


def inception() -> nn.Module:
    """With its second output, whose layers ask for images of 299 pixels; they are given enlarged features instead."""
    model = from_torchvision("inception_v3", aux_logits=True, init_weights=False)
    model.AuxLogits.register_forward_pre_hook(lambda _, args: F.interpolate(args[0], 17))
    return model


def from_timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, pretrained=False, **options)


# Model, image size, and how many normalizations it has.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet50": (lambda: from_torchvision("resnet50"), 32, 53),
    "mobilenet_v3_small": (lambda: from_torchvision("mobilenet_v3_small"), 32, 34),
    "mobilenet_v3_large": (lambda: from_torchvision("mobilenet_v3_large"), 32, 46),
    "densenet121": (lambda: from_torchvision("densenet121"), 32, 121),
    "densenet121, checkpointed": (lambda: from_torchvision("densenet121", memory_efficient=True), 32, 121),
    "inception_v3": (inception, 75, 96),
    "timm resnet10t": (lambda: from_timm("resnet10t"), 32, 14),
    "timm resnet18, drop path": (lambda: from_timm("resnet18", drop_path_rate=0.2, drop_block_rate=0.1), 64, 20),
    "timm efficientnet_b0": (lambda: from_timm("efficientnet_b0", drop_rate=0.2, drop_path_rate=0.2), 32, 49),
    "timm efficientnet_lite0": (lambda: from_timm("efficientnet_lite0"), 32, 49),
    "timm regnetx_002": (lambda: from_timm("regnetx_002"), 32, 44),
    "timm regnety_002": (lambda: from_timm("regnety_002"), 32, 44),
    "timm regnetz_005": (lambda: from_timm("regnetz_005"), 32, 65),
}


@pytest.mark.works_with("torchvision", "ResNet, MobileNetV3, DenseNet, Inception: a converted step, and back")
@pytest.mark.works_with("timm", "ResNet, EfficientNet, RegNet: a converted step, and back")
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_the_same(name: str) -> None:
    build, size, number = MODELS[name]
    plain, x = make(build), images(size)
    model = copy.deepcopy(plain)
    classes, objects = [type(m) for m in model.modules()], [id(t) for t in (*model.modules(), *model.parameters())]
    saved = {key: id(t) for key, t in model.state_dict(keep_vars=True).items()}

    convert(model, "sync")
    layers = list(batchnorms(model))
    assert all(isinstance(m, SyncBatchNorm) for m in layers)
    assert len(layers) == number
    named = dict(model.named_modules())
    assert all(named[m.qualified_name] is m for m in layers)
    with torch.no_grad():
        for actual, expected in zip(outputs(model.eval(), x), outputs(plain.eval(), x), strict=True):
            assert torch.equal(actual, expected)
    for module in plain.modules():  # checkpointing would update the statistics of torch's layers twice
        if hasattr(module, "memory_efficient"):
            module.memory_efficient = False  # type: ignore[assignment]
    assert_same_step(model, plain, x)

    revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert [id(t) for t in (*model.modules(), *model.parameters())] == objects
    assert {key: id(t) for key, t in model.state_dict(keep_vars=True).items()} == saved
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(outputs(model.eval(), x)[0], outputs(plain.eval(), x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("ghost", {"ghost_batch_size": 4}), ("renorm", {})],
    ids=["one ghost batch", "renorm's warm-up"],
)
def test_other_kinds_where_they_are_plain_batch_normalization(kind: Any, options: dict[str, Any]) -> None:
    plain, x = make(lambda: from_timm("test_efficientnet")), images(32)
    model = convert(copy.deepcopy(plain), kind, **options)
    assert_same_step(model, plain, x)


# -- timm's own layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, None], ids=str)
def test_timm_layer_keeps_drop_and_activation(act: type[nn.Module] | None) -> None:
    torch.manual_seed(0)
    layer = norm_act.BatchNormAct2d(3, apply_act=act is not None, act_layer=act or nn.ReLU, drop_layer=nn.Dropout)
    plain, x = copy.deepcopy(layer), torch.randn(4, 3, 5, 5)
    convert(layer, "sync")
    for mode in (True, False):
        torch.testing.assert_close(outputs(layer.train(mode), x), outputs(plain.train(mode), x))
    assert type(revert(layer)) is norm_act.BatchNormAct2d
    assert [name for name, _ in layer.named_children()] == ["drop", "act"]


@pytest.mark.works_with(
    "timm", "`BatchNormAct2d`: ReLU, SiLU and LeakyReLU in the same pass; others, and dropout, after it"
)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "relu"),
        ({"act_layer": nn.SiLU}, "silu"),
        ({"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3}}, "leaky_relu"),
        ({"act_layer": nn.GELU}, None),
        ({"drop_layer": nn.Dropout}, None),
        ({"apply_act": False}, None),
    ],
    ids=str,
)
def test_timm_layer_applies_its_activation_itself(options: dict[str, Any], expected: str | None) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(norm_act.BatchNormAct2d(3, **options)).double()
    nn.init.uniform_(plain[0].weight, 0.5, 1.5)
    nn.init.uniform_(plain[0].bias, -0.5, 0.5)
    model = copy.deepcopy(plain)
    before = snapshot(model)
    layer = convert(model, "sync")[0]
    assert layer.activation == expected
    assert (layer.after is None) == (expected is not None)
    conversion = vars(layer)["_conversion"]
    assert vars(convert(model, "sync")[0])["_conversion"] is conversion, "the same again changes nothing"
    x = images(8)
    with torch.no_grad():
        assert torch.equal(outputs(model.eval(), x)[0], outputs(plain.eval(), x)[0])
    for mode in (False, True):
        model.zero_grad(), plain.zero_grad()
        wanted = train_step(plain.train(mode), x)
        for what, actual in train_step(model.train(mode), x).items():
            assert_near(actual, wanted[what], what)
    assert snapshot(revert(model)) == before


def test_timm_activation_that_does_more_than_its_class() -> None:
    hooked, replaced = norm_act.BatchNormAct2d(3), norm_act.BatchNormAct2d(3)
    hooked.act.register_forward_hook(lambda *_: None)
    replaced.act.forward = lambda x: x
    assert [layer.activation for layer in convert(nn.Sequential(hooked, replaced), "sync")] == [None, None]


def test_timm_activation_that_the_output_cannot_be_inverted_through() -> None:
    layers = nn.Sequential(norm_act.BatchNormAct2d(3), norm_act.BatchNormAct2d(3, act_layer=nn.LeakyReLU))
    assert [layer.activation for layer in convert(layers, "sync", save="output")] == [None, "leaky_relu"]


def test_timm_synchronized_layer() -> None:
    model = norm_act.convert_sync_batchnorm(nn.Sequential(norm_act.BatchNormAct2d(3), nn.BatchNorm2d(3)))
    x = torch.randn(4, 3, 5, 5)
    expected = model.eval()(x)
    assert torch.equal(convert(model, "sync")(x), expected)
    assert [type(m) for m in model] == [SyncBatchNorm, SyncBatchNorm]
    assert [type(m) for m in revert(model)] == [norm_act.SyncBatchNormAct, nn.SyncBatchNorm]


@pytest.mark.works_with("torchvision", "`FrozenBatchNorm2d` stays as it is")
def test_frozen_layers_stay_frozen() -> None:
    torchvision_frozen = import_torchvision("ops").FrozenBatchNorm2d
    model = nn.Sequential(norm_act.FrozenBatchNormAct2d(3), torchvision_frozen(3), nn.BatchNorm2d(3))
    convert(model, "sync")
    assert [type(m) for m in model[:2]] == [norm_act.FrozenBatchNormAct2d, torchvision_frozen]
    assert isinstance(model[2], SyncBatchNorm)


def test_timm_split_layer_is_not_known() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), SplitBatchNorm2d(3, num_splits=2))
    with pytest.raises(ValueError, match=r"SplitBatchNorm2d '1' cannot be converted: .*syncbn.domains"):
        convert(model, "sync")
    assert type(model[0]) is nn.BatchNorm2d


def test_timm_is_not_imported_for_its_registration() -> None:
    assert "timm" not in vars(convert_layer)
    assert all(isinstance(name, str) for name in convert_layer._KNOWN_BY_NAME)
    for name in convert_layer._KNOWN_BY_NAME:
        assert pkgutil.resolve_name(name), "its library has it still"
