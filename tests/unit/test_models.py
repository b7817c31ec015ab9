"""Networks: shapes, sizes against the papers, initial weights paired between normalizations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from syncbn.compat import import_timm
from syncbn.train.config import ConfigError, ModelConfig
from syncbn.train.tasks.models import build_model


class DrawingNorm(nn.BatchNorm2d):
    """A normalization that draws random numbers when it is made."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        torch.rand(num_features)


def no_norm(num_features: int) -> nn.Module:
    return nn.Identity()


def group_norm(num_features: int) -> nn.Module:
    return nn.GroupNorm(1, num_features)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": group_norm,
    "none": no_norm,
    "drawing": DrawingNorm,
}


def build(
    name: str,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    adapt: Callable[[nn.Module], nn.Module] = lambda model: model,
    *,
    finish: Callable[[nn.Module], nn.Module] = lambda model: model,
    channels: int = 3,
    size: int = 32,
    width: int = 16,
    classes: int = 10,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(
        ModelConfig(name=name, width=width, options=options),
        norm=norm,
        adapt=adapt,
        finish=finish,
        in_channels=channels,
        num_classes=classes,
        image_size=size,
    )


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def drawn_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize("name", ["convnet", "resnet20"])
@pytest.mark.parametrize("size", [4, 8, 28, 32, 45])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(name: str, size: int, channels: int) -> None:
    model = build(name, channels=channels, size=size, width=4, classes=7)
    assert model.training
    assert model(torch.randn(3, channels, size, size)).shape == (3, 7)


@pytest.mark.parametrize("name", ["convnet", "resnet20"])
def test_an_empty_batch_gives_zero_gradients(name: str) -> None:
    model = build(name, no_norm, width=4)
    out = model(torch.empty(0, 3, 32, 32))
    assert out.shape == (0, 10)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_resnet_sizes_are_those_of_the_paper() -> None:
    # He et al. 2015, table 6: 0.27 M and 0.85 M.
    assert parameters(build("resnet20")) == 269_722
    assert parameters(build("resnet56")) == 853_018
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in build("resnet56").modules()) == 56


def test_resnet_stage_shapes_and_shortcut() -> None:
    model = build("resnet20", no_norm)
    shapes = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, i, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes["stage1_block3"] == (16, 32, 32)
    assert shapes["stage2_block1"] == shapes["stage2_block3"] == (32, 16, 16)
    assert shapes["stage3_block3"] == (64, 8, 8)
    block = model.get_submodule("stage2_block1")
    for p in block.parameters():
        nn.init.zeros_(p)
    x = torch.rand(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    expected[:, :16] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_convnet_has_six_convolutions_and_a_norm_after_each() -> None:
    model = build("convnet", width=8, channels=1)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [8, 8, 16, 16, 32, 32]
    assert [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [8, 8, 16, 16, 32, 32]
    assert all(m.bias is None for m in convs)


@pytest.mark.parametrize("name", ["convnet", "resnet20"])
def test_a_convolution_that_nothing_normalizes_has_a_bias(name: str) -> None:
    convs = [m for m in build(name, no_norm, width=4).modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m.bias, nn.Parameter) and not m.bias.any() for m in convs)


@pytest.mark.parametrize("name", ["convnet", "resnet20"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_weights_and_generator_do_not_depend_on_the_norm(name: str, norm: Callable[[int], nn.Module]) -> None:
    reference, reference_state = drawn_weights(build(name, width=4)), torch.get_rng_state()
    weights, state = drawn_weights(build(name, norm, width=4)), torch.get_rng_state()
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[key], reference[key]) for key in reference)
    assert torch.equal(state, reference_state)
    other = drawn_weights(build(name, norm, width=4, seed=1))
    assert not any(torch.equal(other[key], reference[key]) for key in reference)


def test_weights_follow_he_initialization() -> None:
    model = build("convnet", width=64)
    conv = [m for m in model.modules() if isinstance(m, nn.Conv2d)][3]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.01)
    assert abs(conv.weight.mean().item()) < 1e-3


def test_torchvision_model_is_adapted_with_the_weights_it_drew() -> None:
    def to_group_norm(model: nn.Module) -> nn.Module:
        torch.rand(3)
        assert isinstance(model.get_submodule("bn1"), nn.BatchNorm2d)
        model.set_submodule("bn1", nn.GroupNorm(4, 64))
        return model

    def unchanged(model: nn.Module) -> nn.Module:
        return model

    plain, plain_state = build("resnet18", adapt=unchanged), torch.get_rng_state()
    adapted, state = build("resnet18", adapt=to_group_norm), torch.get_rng_state()
    assert isinstance(adapted.get_submodule("bn1"), nn.GroupNorm)
    assert adapted.training
    assert torch.equal(state, plain_state)
    weights = drawn_weights(adapted)
    assert all(torch.equal(weights[key], value) for key, value in drawn_weights(plain).items())
    assert plain.get_submodule("bn1").num_batches_tracked == 0  # trying an image left no trace


def test_torchvision_model_of_grey_images_keeps_its_architecture() -> None:
    grey, colour = (build("mobilenet_v3_small", lambda c: nn.Identity(), channels=c) for c in (1, 3))
    assert {k: v.shape for k, v in grey.state_dict().items()} == {k: v.shape for k, v in colour.state_dict().items()}
    image = torch.rand(2, 1, 32, 32)
    grey.eval()
    colour.eval()
    assert torch.equal(grey(image), colour(image.repeat(1, 3, 1, 1)))
    assert torch.equal(copy.deepcopy(grey)(image), grey(image))


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75), ("vit_b_32", 32)])
def test_torchvision_models_give_one_output(name: str, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(name, size=size, classes=3)
    out = model(torch.randn(2, 3, size, size))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 3)


def test_options_reach_torchvision() -> None:
    model = build("mobilenet_v2", classes=3, width_mult=0.25)
    assert parameters(model) < 300_000


@pytest.mark.parametrize(
    ("name", "options", "key", "message"),
    [
        ("resnet21", {}, "model.name", "resnet20"),
        ("RESNET-THAT-IS-NONE", {}, "model.name", "torchvision.models"),
        ("fasterrcnn_resnet50_fpn", {}, "model.name", "classifier"),
        ("convnet", {"depth": 3}, "model.options", "none with model.name convnet"),
        ("resnet18", {"depth": 3}, "model.options", "unexpected keyword argument 'depth'"),
        ("resnet18", {"weights": "DEFAULT"}, "model.options", "no weights"),
        ("resnet18", {"num_classes": 3}, "model.options", "no num_classes"),
        ("googlenet", {"aux_logits": True}, "model.options", "aux_logits false"),
        ("alexnet", {}, "model.name", "a network for images of 32x32"),
        ("timm:resnt10t", {}, "model.name", r"timm:NAME with a model of timm; did you mean .*timm:resnet10t"),
        ("timm:resnet10t.c3_in1k", {}, "model.name", "timm:NAME with a model of timm"),
        ("timm:hf-hub:timm/resnet18", {}, "model.name", "timm:NAME with a model of timm"),
        ("timm:resnet10t", {"depth": 3}, "model.options", "keyword arguments of timm's .*'depth'"),
        ("timm:resnet10t", {"pretrained": True}, "model.options", "no pretrained: a run draws"),
        ("timm:resnet10t", {"checkpoint_path": "x"}, "model.options", "no checkpoint_path"),
        ("timm:resnet10t", {"in_chans": 3}, "model.options", "no in_chans: a run sets it"),
        ("timm:resnet10t", {"features_only": True}, "model.options", "one output for each of 10 classes"),
        ("timm:levit_128s", {"img_size": 64}, "model.name", "a network for images of 32x32"),
    ],
)
def test_errors_name_the_key(name: str, options: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, **options)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_a_vision_transformer_that_does_not_divide_the_image() -> None:
    with pytest.raises(ConfigError, match="images of 28x28") as caught:
        build("vit_b_16", size=28)
    assert caught.value.key == "model.name"


def test_other_numbers_of_channels_are_refused_for_torchvision() -> None:
    with pytest.raises(ValueError, match="in_channels: got 4"):
        build("resnet18", channels=4)


TIMM = {"timm:test_resnet": nn.BatchNorm2d, "timm:test_efficientnet": import_timm("layers").BatchNormAct2d}
"""Two small networks: one with torch's layers, one with layers that also activate."""


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_by_name(name: str) -> None:
    seen: list[type] = []

    def note(model: nn.Module) -> nn.Module:
        seen.extend(type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        torch.rand(3)
        return model

    plain, state = build(name, adapt=note, channels=1, classes=7), torch.get_rng_state()
    assert set(seen) == {TIMM[name]}
    assert plain.training
    assert plain(torch.randn(4, 1, 32, 32)).shape == (4, 7)
    again = build(name, channels=1, classes=7)
    assert torch.equal(torch.get_rng_state(), state)
    weights = drawn_weights(plain)
    assert all(torch.equal(weights[key], value) for key, value in drawn_weights(again).items())
    other = drawn_weights(build(name, channels=1, classes=7, seed=1))
    assert not any(torch.equal(weights[key], value) for key, value in other.items())
    assert all(m.num_batches_tracked == 0 for m in again.modules() if isinstance(m, nn.BatchNorm2d))


def test_options_reach_timm_and_images_have_the_runs_size() -> None:
    model = build("timm:test_resnet", drop_path_rate=0.3)
    assert any(type(m).__name__ == "DropPath" for m in model.modules())
    assert build("timm:levit_128s", size=96)(torch.randn(2, 3, 96, 96)).shape == (2, 10)
