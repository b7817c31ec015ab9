"""convert(..., fuse_activations=True): which activations layers apply themselves, and that nothing else changes.

Compared with the same model that was not converted, in float64, as in test_convert_models: evaluation to the bit, a
training step within the tolerance there. A ReLU that is left out, or SiLU applied twice, is above 1e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_cases import pickled, saved, snapshot
from test_convert_models import assert_near, batchnorms, from_timm, from_torchvision, images, make, outputs, train_step
from torch import Tensor, nn

from syncbn import convert, revert
from syncbn.fusion import FusedLeakyReLU, FusedReLU, FusedSiLU

# Model, image size, normalizations, and how many of them get an activation of which class.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, dict[str, int]]] = {
    "resnet18": (lambda: from_torchvision("resnet18"), 32, 20, {"relu": 9}),
    "resnet50": (lambda: from_torchvision("resnet50"), 32, 53, {"relu": 33}),
    "mobilenet_v2": (lambda: from_torchvision("mobilenet_v2"), 32, 52, {}),  # ReLU6
    "vgg11_bn": (lambda: from_torchvision("vgg11_bn").features, 32, 8, {"relu": 8}),
    "densenet121": (lambda: from_torchvision("densenet121"), 32, 121, {"relu": 120}),  # the last is a function
    "densenet121, checkpointed": (
        lambda: from_torchvision("densenet121", memory_efficient=True),
        32,
        121,
        {"relu": 4},  # the layers ask for requires_grad and cannot be traced
    ),
    "efficientnet_b0": (lambda: from_torchvision("efficientnet_b0"), 32, 49, {"silu": 33}),
    "timm resnet18": (lambda: from_timm("resnet18"), 32, 20, {"relu": 9}),
    "timm efficientnet_b0": (lambda: from_timm("efficientnet_b0"), 32, 49, {"silu": 33}),
    "timm darknet17": (lambda: from_timm("darknet17"), 32, 16, {"leaky_relu": 16}),
}
FUSED = (FusedReLU, FusedLeakyReLU, FusedSiLU)


class Model(nn.Module):
    """Two normalizations, activations, and a ``forward`` that a test gives."""

    def __init__(self, forward: Callable[..., Any], act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True) if act is None else act
        self.act2 = nn.SiLU()
        self.code = forward

    def forward(self, x: Tensor) -> Any:
        return self.code(self, self.conv(x))


def build(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    made = model().double()
    for layer in batchnorms(made):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
        layer.running_mean.uniform_(-0.5, 0.5)
    return made


def fused(model: nn.Module, **options: Any) -> nn.Module:
    return convert(model, "sync", fuse_activations=True, **options)


def applied(model: nn.Module) -> list[str]:
    """The layers that apply an activation."""
    return [name for name, m in model.named_modules() if getattr(m, "activation", None) is not None]


def assert_same(model: nn.Module, plain: nn.Module, size: int = 8, number: int = 4) -> None:
    """Outputs and gradients in both modes. With gradients in evaluation, where torch's ReLU keeps its output."""
    x = images(size, number)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for actual, wanted in zip(outputs(model.eval(), x), outputs(plain.eval(), x), strict=True):
                assert torch.equal(actual, wanted)
                assert not vars(actual)  # no mark is left
    for mode in (False, True):
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        expected = train_step(plain.train(mode), x)
        for what, actual in train_step(model.train(mode), x).items():
            assert_near(actual, expected[what], what)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same(name: str) -> None:
    model, size, number, expected = MODELS[name]
    plain = make(model)
    converted = copy.deepcopy(plain)
    before, keys = snapshot(converted), list(converted.state_dict())
    assert fused(converted) is converted
    layers = list(batchnorms(converted))
    activations = [layer.activation for layer in layers if layer.activation is not None]
    assert (len(layers), {a: activations.count(a) for a in set(activations)}) == (number, expected)
    assert list(converted.state_dict()) == keys
    assert_same(converted, plain, size)
    revert(converted).train()
    assert snapshot(converted) == before


def test_which_layers_of_a_residual_network() -> None:
    blocks = [f"layer{i}.{j}.bn1" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert applied(fused(from_torchvision("resnet18"))) == ["bn1", *blocks]
    assert applied(fused(from_timm("resnet18"))) == ["bn1", *blocks]
    assert not any(isinstance(m, FUSED) for m in fused(from_torchvision("mobilenet_v2")).modules())


@pytest.mark.parametrize("kind", ["ghost", "renorm"])
def test_every_kind(kind: Any) -> None:
    options = {"ghost_batch_size": 2} if kind == "ghost" else {}
    plain = convert(make(lambda: from_torchvision("resnet18")), kind, **options)
    other = convert(copy.deepcopy(plain), kind, fuse_activations=True, **options)
    assert len(applied(other)) == 9
    assert_same(other, plain, 32)


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_one_relu_behind_layers_and_an_addition_in_place(name: str) -> None:
    block = getattr(torch.hub.sys.modules["torchvision.models.resnet"], name)
    plain = build(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), block(8, 8 // block.expansion)))
    converted = fused(copy.deepcopy(plain))
    assert applied(converted) == (["1.bn1"] if name == "BasicBlock" else ["1.bn1", "1.bn2"])
    received = []
    converted[1].relu.register_forward_hook(lambda _, args, y: received.append((args[0] is y, (y < 0).any())))
    assert_same(converted, plain)
    assert not any(negative for _, negative in received)


def test_a_change_in_place_voids_the_mark() -> None:
    layer, relu = model = fused(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    x = torch.randn(4, 3, 5, 5)
    y = layer(x)
    y -= 0.3
    z = relu(y)
    assert z is not y
    assert torch.equal(z, F.relu(y))
    y = layer(x)
    assert relu(y) is y
    assert relu(y) is not y  # the mark is used up
    assert model(x).min() == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    plain = build(lambda: Model(lambda self, x: self.act2(self.bn(x)) + self.act(x + self.act(self.other(x)))))
    converted = fused(copy.deepcopy(plain))
    assert applied(converted) == ["bn", "other"]
    converted.compile(backend=backend, fullgraph=True)
    assert_same(converted, plain)


# -- again, and back ---------------------------------------------------------------------------------------------------


def four() -> nn.Sequential:
    relu = nn.ReLU(inplace=True)
    pairs = [(nn.BatchNorm2d(3), act) for act in (relu, relu, nn.SiLU(), nn.LeakyReLU(0.2))]
    return build(lambda: nn.Sequential(*(m for pair in pairs for m in pair)))


def test_again_and_otherwise() -> None:
    plain = four()
    before = snapshot(plain)
    model = fused(copy.deepcopy(plain).train())
    assert applied(model) == ["0", "2", "4", "6"]
    once, conversions = snapshot(model), [vars(m)["_conversion"] for m in batchnorms(model)]
    assert snapshot(fused(model)) == once
    assert [vars(m)["_conversion"] for m in batchnorms(model)] == conversions
    convert(model, "renorm", fuse_activations=True)
    assert applied(model) == ["0", "2", "4", "6"]
    convert(model, "sync")
    assert not applied(model)
    assert [type(m) for m in model[1::2]] == [nn.ReLU, nn.ReLU, nn.SiLU, nn.LeakyReLU]
    assert_same(model, plain)
    assert {name: (cls, a["names"]) for name, (cls, a) in snapshot(revert(model)).items()} == {
        name: (cls, a["names"]) for name, (cls, a) in before.items()
    }


def test_activations_that_changed_places() -> None:
    plain = build(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3), nn.SiLU()))
    model = fused(copy.deepcopy(plain))
    model[1], model[3] = model[3], model[1]
    fused(model)
    for layer, act in zip(model[::2], model[1::2], strict=True):
        assert vars(layer)["_fusion"] is vars(act)["_fusion"]
    assert_same(model, plain)
    assert [type(m) for m in revert(model)] == [type(m) for m in plain]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_works_and_can_be_reverted(copied: Callable[[nn.Module], nn.Module]) -> None:
    plain = four()
    other = copied(fused(copy.deepcopy(plain)))
    assert applied(other) == ["0", "2", "4", "6"]
    assert_same(other, copy.deepcopy(plain))
    assert [(type(m), set(vars(m))) for m in revert(other).modules()] == [
        (type(m), set(vars(m))) for m in plain.modules()
    ]
    assert other[1] is other[3]


def test_save_output_goes_with_leaky_relu_alone() -> None:
    model = fused(four(), save="output")
    assert applied(model) == ["6"]
    plain = four()
    with torch.no_grad():
        assert torch.equal(model.eval()(images(4)), plain.eval()(images(4)))


def test_what_is_refused() -> None:
    for options in ({"activation": "relu"}, {"negative_slope": 0.1}):
        with pytest.raises(ValueError, match=rf"fuse_activations=True.*{next(iter(options))}="):
            fused(four(), **options)
    with pytest.raises(ValueError, match="fuse_activations must be True or False, got 1"):
        convert(four(), "sync", fuse_activations=1)
    model = fused(four())
    before = snapshot(model)
    for part, message in (
        (model[:1], "'0' applies the activation '1'"),
        (model[5:], "the layer that applies the activation '5' is not in the"),
    ):
        with pytest.raises(ValueError, match=message):
            revert(part)
    with pytest.raises(ValueError, match="'4' applies the activation '5', which is not in the module given"):
        convert(model[4], "sync")
    assert snapshot(model) == before
