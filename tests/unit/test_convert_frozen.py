"""Frozen layers of torchvision, timm, detectron2 and DETR, made trainable by convert and frozen again by revert.

In float64. Evaluation is one multiplication and one addition either way, in another order: 1e-12 of the largest value
is a thousand roundings. A training step is compared with torch's BatchNorm, within 1e-10 as it sums in another order.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_cases import KINDS, every_kind, pickled, snapshot
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from syncbn import GhostBatchNorm, convert, fold, revert
from syncbn.compat import import_torchvision

FrozenBatchNorm2d = import_torchvision("ops").FrozenBatchNorm2d
norm_act = pytest.importorskip("timm.layers.norm_act", reason="one of the frozen layers is timm's")
CHANNELS = 4


class Detectron2(nn.Module):
    """The members of detectron2's FrozenBatchNorm2d."""

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(num_features))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class Detr(nn.Module):
    """The members of DETR's, whose eps is no attribute."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class WithRelu(Detr):
    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


CLASSES: dict[str, Any] = {
    "torchvision": lambda: FrozenBatchNorm2d(CHANNELS, eps=1e-3),
    "detectron2": lambda: Detectron2(CHANNELS),
    "detr": lambda: Detr(CHANNELS),
    "timm": lambda: norm_act.FrozenBatchNormAct2d(CHANNELS, act_layer=nn.ReLU),
    "timm, GELU": lambda: norm_act.FrozenBatchNormAct2d(CHANNELS, act_layer=nn.GELU, inplace=False),
}
every_class = pytest.mark.parametrize("name", CLASSES)


def frozen_model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), CLASSES[name]()).double()
    for buffer in model.buffers():
        nn.init.uniform_(buffer, 0.5, 2.0)
    return model


def options_for(name: str, kind: str = "sync") -> dict[str, Any]:
    return {**KINDS[kind], **({"eps": 1e-5} if name == "detr" else {})}


def converted(name: str, kind: Any = "sync") -> nn.Sequential:
    return convert(frozen_model(name), kind, frozen=True, **options_for(name, kind))  # type: ignore[no-any-return]


def images(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


@every_class
@every_kind
def test_evaluation_is_that_of_the_frozen_layer(name: str, kind: str) -> None:
    near(converted(name, kind).eval()(images()), frozen_model(name)(images()))


@every_class
def test_training_is_that_of_torchs_layer_with_the_same_numbers(name: str) -> None:
    model, frozen = converted(name), frozen_model(name)
    plain = nn.BatchNorm2d(CHANNELS, eps=getattr(frozen[1], "eps", 1e-5)).double()
    plain.load_state_dict(frozen[1].state_dict(), strict=False)
    reference = nn.Sequential(frozen[0], plain, getattr(frozen[1], "act", nn.Identity()))
    grad = torch.randn(4, CHANNELS, 4, 4, dtype=torch.float64)
    for net in (model, reference):
        net(images()).backward(grad)
    near(model(images()), reference(images()), 1e-10)
    for key in ("weight", "bias"):
        near(model[1].get_parameter(key).grad, plain.get_parameter(key).grad, 1e-10)
    near(model[0].weight.grad, frozen[0].weight.grad, 1e-10)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        near(model[1].get_buffer(key), plain.get_buffer(key), 1e-10)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert model[1].momentum == 0.1


@every_class
def test_parameters_share_the_memory_of_the_buffers(name: str) -> None:
    frozen = frozen_model(name)[1]
    before = {key: buffer.data_ptr() for key, buffer in frozen.named_buffers()}
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    layer = convert(frozen, "sync", frozen=True, **options_for(name))
    assert layer is frozen
    assert {key: t.data_ptr() for key, t in layer.state_dict().items() if key in before} == before
    assert [p.requires_grad for p in layer.parameters()] == [True, True]
    layer(torch.randn(4, CHANNELS, 2, 2, dtype=torch.float64))
    assert calls


@every_class
def test_reverted_it_is_frozen_with_the_trained_numbers(name: str) -> None:
    model = frozen_model(name)
    before, keys = snapshot(model), list(model.state_dict())
    convert(model, "sync", frozen=True, **options_for(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().mean().backward()
    optimizer.step()
    expected = model.eval()(images())
    model.train()
    for net in (pickled(model), copy.deepcopy(model), model):
        revert(net)
        assert list(net.state_dict()) == keys
        assert [key for key, _ in net.named_parameters()] == ["0.weight", "0.bias"]
        assert not any(buffer.requires_grad for buffer in net.buffers())
        near(net(images()), expected)
    after = snapshot(model)
    for part in ("", "0", "1"):
        for found in (before, after):
            found[part][1].pop("tensors")
    assert after == before


@every_class
def test_another_kind_starts_from_the_frozen_layer_too(name: str) -> None:
    model = converted(name)
    convert(model, "ghost", ghost_batch_size=2)  # a converted layer is no frozen one
    assert isinstance(model[1], GhostBatchNorm)
    assert model[1].eps == getattr(frozen_model(name)[1], "eps", 1e-5)
    assert snapshot(revert(model)).keys() == snapshot(frozen_model(name)).keys()
    assert type(model[1]) is type(frozen_model(name)[1])


@every_class
def test_checkpoints_load_both_ways(name: str) -> None:
    other = converted(name)
    nn.init.uniform_(other[1].weight, 2.0, 3.0)
    frozen = frozen_model(name)
    frozen.load_state_dict(other.state_dict(), strict=name in ("torchvision", "timm", "timm, GELU"))
    near(frozen(images()), other.eval()(images()))
    model = converted(name)
    model.load_state_dict(frozen.state_dict())
    near(model.eval()(images()), frozen(images()))


def test_timm_activation_is_part_of_the_layer() -> None:
    assert converted("timm")[1].activation == "relu"
    assert converted("timm, GELU")[1].activation is None


def test_a_whole_model() -> None:
    models = import_torchvision("models")
    torch.manual_seed(0)
    model = models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d).double().eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                nn.init.uniform_(buffer, 0.5, 1.5)
    expected = model(images())
    with pytest.warns(UserWarning, match="it has 20 FrozenBatchNorm2d, which.*; frozen=True makes the frozen ones"):
        convert(model, "sync")
    convert(model, "sync", frozen=True, where=lambda name, layer: not name.startswith("layer4"))
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 15
    convert(model, "sync", frozen=True)
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 20
    near(model(images()), expected, 1e-10)  # 20 layers, each of which rounds
    near(fold(model)(images()), expected, 1e-10)


def test_the_warning_names_frozen_only_where_it_helps() -> None:
    with pytest.warns(UserWarning, match="it has 1 GroupNorm, which stay as they are$"):
        convert(nn.Sequential(nn.GroupNorm(1, 2)), "sync")
    with pytest.warns(
        UserWarning, match="`where` leaves all of them out; it has 1 FrozenBatchNorm2d, which stay as they are$"
    ):
        convert(nn.Sequential(FrozenBatchNorm2d(3)), "sync", frozen=True, where=lambda name, layer: False)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (WithRelu, {}, r"WithRelu '1' cannot be converted: its forward is not \(x - running_mean\)"),
        (Detr, {}, r"Detr '1' cannot be converted: it has no attribute eps; pass eps="),
        (Detr, {"eps": 1e-2}, r"Detr '1' cannot be converted: its forward is not .*sqrt\(running_var \+ 0.01\)"),
    ],
)
def test_a_layer_that_computes_something_else(layer: Any, options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), layer(CHANNELS))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model, "sync", frozen=True, **options)
    assert snapshot(model) == before
    convert(model, "sync")  # left alone, it is no matter
    assert type(model[1]) is layer


def test_half_precision_and_large_means() -> None:
    layer = FrozenBatchNorm2d(CHANNELS)
    layer.running_mean += 1e4
    layer.running_var.fill_(1e-4)
    x = 1e4 + torch.randn(4, CHANNELS, 2, 2)
    expected = copy.deepcopy(layer).double()(x.double())
    near(convert(copy.deepcopy(layer).double(), "sync", frozen=True).eval()(x.double()), expected, 1e-9)
    half = convert(layer.bfloat16(), "sync", frozen=True)
    assert half.weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).isfinite().all()


def test_layers_without_numbers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(FrozenBatchNorm2d(CHANNELS))
    convert(model, "sync", frozen=True)
    model.to_empty(device="cpu").load_state_dict(nn.Sequential(nn.BatchNorm2d(CHANNELS)).state_dict())
    assert model(torch.randn(2, CHANNELS, 3, 3)).isfinite().all()
    with FakeTensorMode():
        fake = convert(nn.Sequential(FrozenBatchNorm2d(CHANNELS)), "sync", frozen=True)
        assert fake(torch.empty(2, CHANNELS, 3, 3)).shape == (2, CHANNELS, 3, 3)
        assert type(revert(fake)[0]) is FrozenBatchNorm2d
