"""Classifiers of torchvision and timm, by name, with this run's classes and channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.compat import import_timm, import_torchvision
from syncbn.train.config import ConfigError, ModelConfig, meant, require

TIMM = "timm:"
"""What a name of timm's begins with: many names are both libraries', with other networks behind them."""
# fmt: off
_WEIGHTS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
)
# fmt: on


def library_model(
    config: ModelConfig, own: list[str], in_channels: int, num_classes: int, image_size: int
) -> nn.Module:
    """The network ``config.name`` of torchvision, or of timm if that begins with ``timm:``; tried on one image.

    ``own`` are the names of this package's networks, for an error.
    """
    timm = config.name.startswith(TIMM)
    build = _timm_model(config) if timm else _torchvision_model(config, own, in_channels)
    model: nn.Module | None = None
    try:
        model = build(in_channels, num_classes, image_size)
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, in_channels, image_size, image_size))
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if model is None and config.options:
            expected = f"keyword arguments of {'timm' if timm else 'torchvision'}'s {config.name} ({reason})"
            raise ConfigError("model.options", config.options, expected) from error
        # For example pooling that leaves nothing of a small image.
        expected = f"a network for images of {image_size}x{image_size} ({reason})"
        raise ConfigError("model.name", config.name, expected) from error
    classifies = isinstance(out, Tensor) and out.shape == (1, num_classes)
    require(classifies, "model.options", config.options, f"a network with one output for each of {num_classes} classes")
    return model.train()


_Build = Callable[[int, int, int], nn.Module]


def _torchvision_model(config: ModelConfig, own: list[str], in_channels: int) -> _Build:
    models = import_torchvision().models
    known = models.list_models(module=models)  # the classifiers
    _check_name(config.name, [*own, *known], f"{', '.join(own)}, a classifier of torchvision.models, or {TIMM}NAME")
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels: got {in_channels}, expected 1 or 3 with the torchvision model {config.name}")
    options = dict(config.options)
    for key in ("weights", "num_classes"):
        require(key not in options, "model.options", config.options, f"no {key}: a run sets it")
    require(not options.get("aux_logits"), "model.options", config.options, "aux_logits false: a run trains one output")
    if config.name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False
        options.setdefault("init_weights", True)  # torchvision's default, without its warning

    def build(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
        if config.name.startswith("vit_"):
            options.setdefault("image_size", image_size)
        model: nn.Module = models.get_model(config.name, weights=None, num_classes=num_classes, **options)
        if in_channels == 1:
            model.register_forward_pre_hook(grey_to_rgb)  # keeps torchvision's architecture and state_dict
        return model

    return build


def _timm_model(config: ModelConfig) -> _Build:
    timm: Any = import_timm()
    name = config.name.removeprefix(TIMM)
    _check_name(config.name, [TIMM + known for known in timm.list_models()], f"{TIMM}NAME with a model of timm")
    options = dict(config.options)
    for key in ("num_classes", "in_chans"):
        require(key not in options, "model.options", config.options, f"no {key}: a run sets it")
    for key in _WEIGHTS:
        require(key not in options, "model.options", config.options, f"no {key}: a run draws its initial weights")

    def build(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
        usual = timm.models.get_pretrained_cfg(name)
        if usual is not None and usual.fixed_input_size:
            options.setdefault("img_size", image_size)
        model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
        return model

    return build


def _check_name(name: str, known: list[str], expected: str) -> None:
    if name not in known:
        raise ConfigError("model.name", name, expected + meant(name, known, most=5))


def grey_to_rgb(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook for networks that take colour images: (N, 1, H, W) -> (N, 3, H, W)."""
    return (inputs[0].expand(-1, 3, -1, -1),)
