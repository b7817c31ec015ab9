"""Normalizations that become part of the layers before them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.compat import import_torchvision

KINDS: dict[str, dict[str, Any]] = {"sync": {}, "ghost": {"ghost_batch_size": 2}, "renorm": {"warmup_steps": 0}}


def trained(net: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode, with statistics and parameters as if it were trained, and an input; float64."""
    generator = torch.Generator().manual_seed(0)
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 2, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.normal_(generator=generator)
    return net.eval(), torch.randn(shape, generator=generator, dtype=torch.float64)


def folds(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    net, x = trained(net, shape)
    before = copy.deepcopy(net.state_dict())
    folded = syncbn.fold(net)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return folded


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), (2, 3, 6)),
        (nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4, affine=False), (2, 4, 6, 6)),
        (nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), (2, 3, 2, 2, 2)),
        (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 4, 4)),
        (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), (5, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_pairs(kind: str | None, layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    net: nn.Module = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU())
    folds(net if kind is None else syncbn.convert(net, kind, **KINDS[kind]), shape)  # type: ignore[call-overload]


def test_a_whole_model() -> None:
    resnet = import_torchvision("models").resnet18(num_classes=3)
    folded = folds(syncbn.convert(resnet, "sync"), (2, 3, 32, 32))
    assert type(folded.layer1[0].bn1) is nn.Identity


def test_activations_stay() -> None:
    by_hand = syncbn.SyncBatchNorm(4, activation="leaky_relu", negative_slope=0.3)
    folded = folds(nn.Sequential(nn.Conv2d(3, 4, 1), by_hand), (2, 3, 4, 4))
    assert folded[1].negative_slope == 0.3
    norm_act = pytest.importorskip("timm.layers.norm_act")
    for act in (nn.ReLU, nn.Hardswish):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), norm_act.BatchNormAct2d(4, act_layer=act))
        folds(syncbn.convert(net, "sync"), (2, 3, 4, 4))


class Twice(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv, self.norm = nn.Conv2d(3, 3, 1), syncbn.SyncBatchNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        found: Tensor = {
            "output": lambda: self.norm(y) + y,
            "norm": lambda: self.norm(self.norm(y)),
            "residual": lambda: self.norm(y, x),
            "flow": lambda: self.norm(y) if x.sum() > 0 else y,
        }[self.what]()
        return found


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), "0 follows no convolution or linear layer"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), "2 follows no convolution"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            "1 has no running statistics",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 1), Doubling(3)), "1 is a Doubling, which may do more than normalize"),
        (Twice("output"), "the output of conv, before norm, is used elsewhere too"),
        (Twice("norm"), "norm is used 2 times"),
        (Twice("residual"), "norm takes a residual"),
        (Twice("flow"), "torch.fx cannot trace Twice: symbolically traced variables"),
    ],
    ids=str,
)
def test_what_cannot_be_folded_is_named(net: nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        syncbn.fold(net.eval())


def test_a_model_in_training() -> None:
    with pytest.raises(ValueError, match=r"'1' is in training mode; call model\.eval"):
        syncbn.fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"activation": "silu"}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("kind", ["sync", "renorm"])
def test_what_a_conversion_was_given_stays(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    model = syncbn.convert(net, kind, **options).eval()
    model[1].running_var.fill_(0.1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(syncbn.fold(model)(x), model(x), rtol=1e-12, atol=1e-12)
