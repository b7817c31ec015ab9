"""timm: its models, and its functions that look for batch normalization in a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_steps import assert_same_step, check_converted, images, make, outputs
from pool import Pool
from torch import nn
from two_process_jobs import timms_distribute_bn

import syncbn
from syncbn.compat import import_timm

timm = import_timm()
layers, utils = import_timm("layers"), import_timm("utils")

FAMILIES = (
    "ghostnet_050",
    "hgnetv2_b0",
    "lcnet_035",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "repvgg_a0",
    "starnet_s1",
)
"""A small member of each family."""
KINDS: dict[str, dict[str, Any]] = {"sync": {}, "ghost": {"ghost_batch_size": 2}, "renorm": {}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=4, **options)
    return model


def norm_act(act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Two of timm's layers, one of which applies its activation itself when it is converted."""
    torch.manual_seed(0)
    model = nn.Sequential(layers.BatchNormAct2d(3, act_layer=act), layers.BatchNormAct2d(3, act_layer=nn.GELU))
    for layer in model:
        nn.init.uniform_(layer.running_mean)
        nn.init.uniform_(layer.bias)
    return model.double().eval()


def converted(model: nn.Module, kind: Any = "sync") -> nn.Module:
    return syncbn.convert(copy.deepcopy(model), kind, **KINDS[kind])


@pytest.mark.works_with("timm", "GhostNet, HGNetV2, LCNet, MobileNetV3, MobileViT, RepVGG, StarNet: a converted step")
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    check_converted(lambda: build(name), images(64))


@pytest.mark.works_with(
    "timm", "`freeze_batch_norm_2d` and back, of converted norm-act layers: activation and numbers stay"
)
@every_kind
def test_freezing(kind: str) -> None:
    plain, x = norm_act(), images(6)
    frozen = layers.freeze_batch_norm_2d(converted(plain, kind))
    assert [type(layer) for layer in frozen] == [layers.FrozenBatchNormAct2d] * 2
    torch.testing.assert_close(frozen.train()(x), plain(x), rtol=1e-12, atol=1e-12)  # another order of the same sum
    thawed = layers.unfreeze_batch_norm_2d(frozen).double().eval()
    assert torch.equal(thawed(x), plain(x))


@pytest.mark.works_with("timm", "`utils.freeze` of the first stages of a converted model")
def test_freezing_stages() -> None:
    plain = make(lambda: build("resnet10t"))
    model, x = converted(plain), images(32)
    for each in (model, plain):
        utils.freeze(each, ["conv1", "bn1", "layer1"])
    assert {type(m).__name__ for m in model.layer1.modules() if "Norm" in type(m).__name__} == {"FrozenBatchNorm2d"}
    assert_same_step(model, plain, x)


@pytest.mark.works_with("timm", "its `convert_sync_batchnorm` on converted norm-act layers: the activation stays")
def test_timms_own_conversion_afterwards() -> None:
    plain, x = norm_act(), images(6)
    again = layers.convert_sync_batchnorm(converted(plain)).eval()
    assert [type(layer) for layer in again] == [layers.SyncBatchNormAct] * 2
    assert torch.equal(again(x), plain(x))


@every_kind
def test_a_converted_layer_is_timms_and_can_be_pickled(kind: str) -> None:
    model = converted(norm_act(), kind)
    for layer in (*model, *pickle.loads(pickle.dumps(model)), *copy.deepcopy(model)):
        assert isinstance(layer, layers.BatchNormAct2d)
        assert not isinstance(layer, nn.SyncBatchNorm)
    assert [type(layer) for layer in syncbn.revert(model)] == [layers.BatchNormAct2d] * 2


@pytest.mark.works_with(
    "timm", "`ModelEmaV3`, made before or after the conversion: the averages of an unconverted model"
)
@pytest.mark.parametrize("before", [True, False])
def test_ema(before: bool) -> None:
    plain, x = make(lambda: build("test_resnet")), images(32)
    averages = []
    for model in (plain, copy.deepcopy(plain)):
        ours = model is not plain
        if ours and not before:
            syncbn.convert(model, "sync")
        ema = utils.ModelEmaV3(model, decay=0.5)
        if ours and before:
            syncbn.convert(model, "sync")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            outputs(model.train(), x)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
        averages.append(ema.module.state_dict())
    for name, expected in averages[0].items():
        torch.testing.assert_close(averages[1][name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.works_with("timm", "`features_only=True`, then converted")
def test_features() -> None:
    check_converted(lambda: build_features("resnet10t"), images(32))


def build_features(name: str) -> nn.Module:
    model: nn.Module = timm.create_model(name, features_only=True)
    return model


@pytest.mark.works_with("timm", "`reparameterize_model` folds converted layers of RepVGG into convolutions")
def test_reparameterization() -> None:
    plain, x = make(lambda: build("repvgg_a0")).eval(), images(32)
    expected = outputs(plain, x)[0]
    deployed = utils.reparameterize_model(converted(plain))
    assert not any(
        "Norm" in type(module).__name__ for module in deployed.modules() if not isinstance(module, nn.Identity)
    )
    torch.testing.assert_close(outputs(deployed, x)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.works_with("timm", "`create_optimizer_v2`: no weight decay for converted layers")
def test_parameter_groups() -> None:
    create = import_timm("optim").create_optimizer_v2
    plain = build("test_resnet")
    groups = [
        [(group["weight_decay"], len(group["params"])) for group in create(model, "sgd", weight_decay=0.1).param_groups]
        for model in (plain, converted(plain))
    ]
    assert groups[0] == groups[1]
    assert {decay for decay, _ in groups[0]} == {0.0, 0.1}


@pytest.mark.works_with("timm", "`distribute_bn(reduce=True)` on 2 processes: the mean of local running statistics")
def test_distribute_bn(pools: Callable[[int], Pool]) -> None:
    for before, after in pools(2).run(timms_distribute_bn):
        assert before > 1e-3
        assert after < 1e-15
