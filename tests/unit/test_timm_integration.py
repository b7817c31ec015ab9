"""This package's layers as norm_layer of timm's models, and timm's functions on converted models."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.compat import import_timm, import_torchvision

import_torchvision()  # timm needs it, and may fail to import it by itself
timm = pytest.importorskip("timm", reason="these are timm's models")
layers = import_timm("layers")
create_norm_act = import_timm("layers.create_norm_act")
integration: Any = pytest.importorskip("syncbn.integrations.timm")
norm_act: Any = pytest.importorskip("syncbn.norm_act")

NORMS: dict[str, Any] = {
    "sync": syncbn.SyncBatchNorm,
    "ghost": functools.partial(syncbn.GhostBatchNorm, ghost_batch_size=2),
    "renorm": functools.partial(syncbn.BatchRenorm, warmup_steps=0, r_ramp_end=1, d_ramp_end=1, momentum=0.1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sync": {},
    "ghost": {"ghost_batch_size": 2},
    "renorm": {"warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1},
}
# With plain layers; with joint ones and SiLU; with joint ones, of which some have no activation.
CASES = [(name, norm) for name in ("resnet10t", "test_efficientnet") for norm in NORMS] + [("regnetx_002", "sync")]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's tables get back what they had after each test."""
    norms = import_timm("layers.create_norm")
    for module, name in (
        (norms, "_NORM_MAP"),
        (create_norm_act, "_NORM_ACT_MAP"),
        (create_norm_act, "_NORM_TO_NORM_ACT_MAP"),
        (create_norm_act, "_NORM_ACT_TYPES"),
        (create_norm_act, "_NORM_ACT_REQUIRES_ARG"),
    ):
        monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))
    integration.register()


def build(name: str, norm: str | None) -> nn.Module:
    torch.manual_seed(0)
    options = {} if norm is None else {"norm_layer": NORMS[norm]}
    return timm.create_model(name, num_classes=5, **options).double()  # type: ignore[no-any-return]


def images(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batchnorms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def same(actual: Tensor, expected: Tensor) -> None:
    """To rounding, through up to 65 normalizations; see test_convert_models.py."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_model_is_built_with_the_layers_that_convert_would_make(name: str, norm: Any) -> None:
    model, converted = build(name, norm), syncbn.convert(build(name, None), norm, **OPTIONS[norm])
    converted.load_state_dict(model.state_dict())
    mine, theirs = batchnorms(model), batchnorms(converted)
    assert len(mine) == len(theirs) > 10
    for a, b in zip(mine, theirs, strict=True):
        names = ("eps", "momentum", "activation", "ghost_batch_size", "after")
        assert [getattr(a, key) for key in names] == [getattr(b, key) for key in names]
    for net in (model, converted):
        torch.manual_seed(2)  # dropout
        net(images()).square().mean().backward()
    for key, parameter in model.named_parameters():
        same(parameter.grad, converted.get_parameter(key).grad)
    for key, buffer in model.named_buffers():
        same(buffer, converted.get_buffer(key))
    same(model.eval()(images()), converted.eval()(images()))


@pytest.mark.parametrize(
    ("name", "number"), [("resnet18", 20), ("efficientnet_b0", 49), ("densenet121", 121), ("resnetv2_50d_evos", 51)]
)
def test_models_that_take_a_norm_layer(name: str, number: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, norm_layer=syncbn.SyncBatchNorm)
    norms = batchnorms(model)
    assert all(isinstance(m, syncbn.SyncBatchNorm) for m in norms)
    assert len(norms) == number


def test_names_of_layers() -> None:
    assert type(layers.create_norm_layer("syncbatchnorm", 3)) is syncbn.SyncBatchNorm
    layer = layers.create_norm_act_layer("batchrenorm", 3, act_layer=nn.SiLU)
    assert (type(layer), layer.activation) == (norm_act.BatchRenormAct2d, "silu")
    model = timm.create_model("test_efficientnet", norm_layer="syncbatchnorm")
    assert {type(m) for m in batchnorms(model)} == {norm_act.SyncBatchNormAct2d}


@pytest.mark.parametrize(
    ("options", "activation", "follows"),
    [
        ({}, "relu", False),
        ({"apply_act": False}, None, True),
        ({"act_layer": nn.GELU, "inplace": False}, None, True),
        ({"drop_layer": nn.Dropout}, None, True),
        ({"act_layer": "leaky_relu", "act_kwargs": {"negative_slope": 0.3}}, "leaky_relu", False),
        ({"activation": "silu", "apply_act": False}, "silu", True),
    ],
    ids=str,
)
def test_dropout_and_activation(options: dict[str, Any], activation: str | None, follows: bool) -> None:
    layer = norm_act.SyncBatchNormAct2d(3, **options).double()
    assert (layer.activation, layer.after is not None) == (activation, follows)
    own = {key: value for key, value in options.items() if key != "activation"}
    plain = layers.BatchNormAct2d(3, **own).double()
    x = images()
    for training in (True, False):
        found, expected = [], plain
        for net in (layer.train(training), plain.train(training)):
            torch.manual_seed(2)
            found.append(net(x))
        expected = nn.functional.silu(found[1]) if "activation" in options else found[1]
        same(found[0], expected)


def test_layers_are_copied_pickled_and_converted_again() -> None:
    model = build("test_efficientnet", "ghost").eval()
    expected = model(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for net in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        same(net(images()), expected)
        assert type(net.bn1) is norm_act.GhostBatchNormAct2d
    assert type(syncbn.revert(model).bn1) is norm_act.GhostBatchNormAct2d, "it was made as one"
    syncbn.convert(model, "sync")
    assert (type(model.bn1), model.bn1.activation) == (norm_act.SyncBatchNormAct2d, "silu")
    same(model(images()), expected)
    assert (type(syncbn.revert(model).bn1), model.bn1.ghost_batch_size) == (norm_act.GhostBatchNormAct2d, 2)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_fold(act: type[nn.Module]) -> None:
    layer = norm_act.SyncBatchNormAct2d(4, act_layer=act)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer).double()
    model(images())
    folded = syncbn.fold(model.eval())
    assert not batchnorms(folded)
    same(folded(images()), model(images()))


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("how", ["made", "converted"])
def test_timms_functions_keep_the_activation(act: type[nn.Module], how: str) -> None:
    plain = layers.BatchNormAct2d(3, act_layer=act)
    layer = norm_act.SyncBatchNormAct2d(3, act_layer=act) if how == "made" else syncbn.convert(plain, "sync")
    net = nn.Sequential(layer).double()
    net(images())
    expected = net.eval()(images())
    assert isinstance(net[0], layers.BatchNormAct2d)
    frozen = layers.freeze_batch_norm_2d(copy.deepcopy(net))
    assert type(frozen[0]) is layers.FrozenBatchNormAct2d
    same(frozen(images()), expected)
    same(syncbn.convert(frozen, "sync", frozen=True).eval()(images()), expected)
    replaced = layers.convert_sync_batchnorm(copy.deepcopy(net))
    same(replaced.eval()(images()), expected)


def test_a_timm_with_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(create_norm_act, "_NORM_ACT_TYPES")
    with pytest.raises(ImportError, match="has other tables of its norms than the releases"):
        integration.register()


def test_torchs_layer_is_taken_by_its_name() -> None:
    """The docstring says so; timm itself has no equivalent of it."""
    model = timm.create_model("test_efficientnet", norm_layer=nn.SyncBatchNorm)
    assert type(model.bn1) is norm_act.SyncBatchNormAct2d
