"""The norms of a run's configuration: what each does to a model, and that none changes the weights that are drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn
from syncbn.train.config import BATCH_NORMS, ConfigError, ModelConfig, NormConfig, OptimizerConfig, RunConfig
from syncbn.train.logical_gpus import Partition, Placement
from syncbn.train.norms.factory import adapt_convolutions, adapt_model, clip_gradients, norm_factory
from syncbn.train.norms.moving_average import MovingAverageBatchNorm
from syncbn.train.optim import make_optimizer
from syncbn.train.tasks.models import build_model

OPTIONS = {
    "ghost": {"ghost_batch_size": 2},
    "ws_group": {"groups": 4},
    "evonorm": {"groups": 4},
    "group": {"groups": 4},
}


def build(name, model="convnet", **options):
    norm = NormConfig(name=name, **OPTIONS.get(name, {}), **options)
    partition = Partition.of(RunConfig(gpus=2, per_gpu_batch_size=4, norm=norm), Placement())
    torch.manual_seed(0)
    return build_model(
        ModelConfig(name=model, width=4),
        norm=norm_factory(norm, partition),
        adapt=lambda m: adapt_model(m, norm, partition),
        finish=lambda m: adapt_convolutions(m, norm),
        in_channels=3,
        num_classes=10,
        image_size=32,
    ), norm


def kinds(model):
    return [type(m).__name__ for m in model.modules()]


EXPECTED = {
    "none": "Identity",
    "batch": "GhostBatchNorm",
    "sync": "SyncBatchNorm",
    "ghost": "GhostBatchNorm",
    "renorm": "BatchRenorm",
    "frozen": "GhostBatchNorm",
    "mabn": "MovingAverageBatchNorm",
    "group": "GroupNorm",
    "layer": "GroupNorm",
    "instance": "InstanceNorm2d",
    "rms": "RmsNorm2d",
    "evonorm": "EvoNorm2dS0",
    "frn": "FilterResponseNormTlu2d",
    "weight": "ParametrizedConv2d",
    "ws_group": "StdConv2d",
    "nf": "ScaledStdConv2d",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_convnet(name):
    model, _ = build(name)
    assert kinds(model).count(EXPECTED[name]) == 6
    assert kinds(model).count("ReLU") == (0 if name in ("evonorm", "frn") else 6)
    reference, _ = build("group")
    convolutions = [[m.weight for m in x.modules() if isinstance(m, nn.Conv2d)] for x in (model, reference)]
    for own, other in zip(*convolutions, strict=True):
        expected = other - other.mean((1, 2, 3), keepdim=True) if name == "mabn" else other
        torch.testing.assert_close(own, expected)  # weight normalization recomposes them, to rounding
    y = model(torch.randn(8, 3, 32, 32))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("evonorm", "frn")])
@pytest.mark.parametrize("model", ["resnet20", "resnet18"])
def test_residual_networks(name, model):
    built, _ = build(name, model)
    assert "BatchNorm2d" not in kinds(built)
    assert built(torch.randn(8, 3, 64, 64)).isfinite().all()  # resnet18 ends in maps of 2x2


def test_convolutions_are_standardized_and_biased():
    model, _ = build("ws_group", "resnet18")
    conv = model.layer1[0].conv1
    weight = conv.weight.flatten(1)
    standardized = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(
        conv(x), nn.functional.conv2d(x, standardized.view_as(conv.weight), padding=1), rtol=1e-4, atol=1e-4
    )
    assert all(m.bias is not None for m in build("weight", "resnet18")[0].modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("model", ["resnet20", "resnet18"])
def test_normalizer_free_branches_begin_at_zero_and_keep_the_scale(model):
    built, _ = build("nf", model)
    gains = [m.gain.abs().sum().item() for m in built.modules() if hasattr(m, "gain")]
    assert gains.count(0.0) == (9 if model == "resnet20" else 8)
    signal = nn.functional.relu(torch.randn(64, 4 if model == "resnet20" else 64, 16, 16))
    conv = next(m for m in built.modules() if hasattr(m, "gain") and m.gain.abs().sum() and m.in_channels > 3)
    assert conv(signal).detach().var() == pytest.approx(1, rel=0.2)  # zero padding takes a little at the border


def test_moving_averages_begin_as_the_layers_they_replace():
    model, _ = build("mabn", "resnet18", window=3, warmup_steps=7, r_max=2.0)
    layer = model.layer1[0].bn1
    assert (layer.window, layer.warmup_steps, layer.r_max, layer.num_features) == (3, 7, 2.0, 64)
    assert layer.running_second_moment.shape == (2, 64)
    assert model.layer1[0].conv1.bias is None
    assert model.layer1[0].conv1.weight.mean((1, 2, 3)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["nf", "weight"])
def test_gains_and_lengths_decay_as_norm_parameters_do(name):
    model, _ = build(name)
    optimizer = OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=False)
    groups = make_optimizer(RunConfig(optimizer=optimizer), model).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(groups[0]["params"]) == 7, "six convolutions and the linear layer"


def test_normalizer_free_is_for_networks_whose_branches_can_begin_at_zero():
    with pytest.raises(ConfigError, match=r"norm\.name: got 'nf', expected a ResNet"):
        build("nf", "mobilenet_v2")


def test_adaptive_clipping_bounds_each_unit():
    model, norm = build("nf", clip_factor=0.1)
    (1e6 * model(torch.randn(8, 3, 32, 32)).square().sum()).backward()
    linear, bias = model.linear.weight.grad.clone(), model.layer1.conv.bias.grad.clone()
    clip_gradients(model, norm)
    weight = model.layer1.conv.weight
    ratio = weight.grad.flatten(1).norm(dim=1) / weight.detach().flatten(1).norm(dim=1)
    assert ratio.max() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(model.linear.weight.grad, linear)
    assert torch.equal(model.layer1.conv.bias.grad, bias)


@pytest.mark.parametrize("name", ["evonorm", "frn"])
@pytest.mark.parametrize("model", ["resnet20", "resnet18"])
def test_norms_with_an_activation_are_for_networks_where_one_follows(name, model):
    with pytest.raises(ConfigError, match=r"norm\.name: got .*convnet"):
        build(name, model)


@pytest.mark.parametrize("name", ["group", "ws_group", "evonorm"])
def test_groups_divide_the_channels(name):
    norm = NormConfig(name=name, groups=3)
    make = norm_factory(norm, Partition.of(RunConfig(norm=norm), Placement()))
    with pytest.raises(ConfigError, match=r"norm\.groups: got 3"):
        make(4)


def test_which_norms_have_batch_statistics():
    for name in EXPECTED:
        model, norm = build(name)
        has = any(isinstance(m, syncbn.layers.SmallBatchNorm | MovingAverageBatchNorm) for m in model.modules())
        assert has == norm.uses_batch == (name in BATCH_NORMS)
        size = RunConfig(per_gpu_batch_size=4, norm=norm).normalization_batch_size
        assert (size is not None) == has


ADAPTED = [name for name in EXPECTED if name not in ("evonorm", "frn", "nf")]


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("model", ["timm:test_resnet", "timm:test_efficientnet"])
def test_timms_networks(name, model):
    built, _ = build(name, model)
    assert not {"BatchNorm2d", "BatchNormAct2d"} & set(kinds(built))
    y = built(torch.randn(8, 3, 64, 64))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None for p in built.parameters())


@pytest.mark.parametrize("name", ["none", "group", "layer", "rms", "mabn", "weight"])
def test_a_norm_keeps_the_activation_of_the_layer_that_it_replaces(name):
    """timm's layers also activate. Without that, the network would be another one, and an arm lose for it."""
    built, _ = build(name, "timm:test_efficientnet")
    plain, _ = build("batch", "timm:test_efficientnet")
    layers = {key: m for key, m in plain.named_modules() if isinstance(m, syncbn.GhostBatchNorm)}
    assert layers
    for key, layer in layers.items():
        follows = built.get_submodule(key)
        x = torch.randn(4, layer.num_features, 3, 3) + 1
        normalized, before = follows.eval().norm(x), x.clone()
        activated = {None: lambda v: v, "relu": torch.relu, "silu": nn.functional.silu}[layer.activation]
        assert torch.equal(follows(x), activated(normalized)), key
        assert torch.equal(x, before), "the activation works in place, but not on the input"


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return self.factor * super().forward(x)


def doubled(layer, x):
    return layer.factor * x


def test_layers_of_an_unknown_class_are_a_mistake_for_every_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4))
    for name in ("group", "batch"):
        norm = NormConfig(name=name, groups=2)
        with pytest.raises(ConfigError, match=r"norm\.name: got .*Doubled.*register_batchnorm"):
            adapt_model(model, norm, Partition.of(RunConfig(norm=norm), Placement()))
    assert isinstance(model[1], Doubled)
    model[1].factor = 2.0
    syncbn.register_batchnorm(Doubled, doubled)
    norm = NormConfig(name="group", groups=2)
    adapt_model(model, norm, Partition.of(RunConfig(norm=norm), Placement()))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(x), 2 * nn.functional.group_norm(model[0](x), 2))


def test_a_layer_in_several_places_stays_one_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.BatchNorm2d(4)
            self.second = self.first
            self.inner = nn.Sequential(self.first)

    model, norm = Model(), NormConfig(name="group", groups=2)
    adapt_model(model, norm, Partition.of(RunConfig(norm=norm), Placement()))
    assert isinstance(model.first, nn.GroupNorm)
    assert model.first is model.second is model.inner[0]


def test_a_convolution_that_pads_otherwise_is_not_replaced():
    with pytest.raises(ConfigError, match=r"norm\.name: got 'ws_group', expected a norm for a Conv2dSame"):
        build("ws_group", "timm:tf_efficientnet_lite0")


def test_layers_of_a_given_model_keep_their_eps():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.1))
    norm = NormConfig(name="sync")
    assert adapt_model(model, norm, Partition.of(RunConfig(norm=norm), Placement()))[0].eps == 0.1
    norm = NormConfig(name="sync", eps=1e-3)
    with pytest.raises(ConfigError, match=r"norm\.eps: got 0\.001, expected 1e-05, or nothing: the layers of"):
        adapt_model(model, norm, Partition.of(RunConfig(norm=norm), Placement()))
