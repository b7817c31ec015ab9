"""The normalization that a run's configuration names: a factory of layers, and what it does to a model.

| name | what it is | source |
|---|---|---|
| none | nothing | |
| batch, sync, ghost, renorm | this package's layers | see :mod:`syncbn.layers` |
| frozen | batch; then its running statistics are constants | Wu and Johnson 2021, arXiv 2105.07576, section 4 |
| mabn | over a window of past batches, weights centred | Yan et al. 2020, arXiv 2001.06838, section 4 |
| group | over groups of channels of a sample | Wu and He 2018, arXiv 1803.08494 (torch) |
| layer | over all channels of a sample | Ba et al. 2016, arXiv 1607.06450 (torch: one group) |
| instance | over each channel of a sample | Ulyanov et al. 2016, arXiv 1607.08022 (torch) |
| rms | root mean square over the channels at each pixel | Zhang and Sennrich 2019, arXiv 1910.07467 (timm) |
| evonorm | EvoNorm-S0, with its own activation | Liu et al. 2020, arXiv 2004.02967 (timm) |
| frn | filter response normalization with its threshold unit | Singh and Krishnan 2020, arXiv 1911.09737 (timm) |
| weight | weights as direction and length | Salimans and Kingma 2016, arXiv 1602.07868 (torch) |
| ws_group | standardized weights, and group | Qiao et al. 2019, arXiv 1903.10520 (timm) |
| nf | scaled standardized weights, gradients clipped unit by unit | Brock et al. 2021, arXiv 2102.06171 (timm) |

One family is not here: cross-iteration batch normalization (Yao et al. 2021, arXiv 2002.05712) corrects the
statistics of past iterations by their gradients with respect to the convolution before, which a layer that sees its
input alone cannot have.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.compat import import_torchvision
from syncbn.convert import convert
from syncbn.layers import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.train.config import ConfigError, NormConfig
from syncbn.train.logical_gpus import Layout
from syncbn.train.norms.moving_average import MovingAverageBatchNorm, centre

_KINDS: dict[str, type[SyncBatchNorm] | type[GhostBatchNorm] | type[BatchRenorm]] = {
    "batch": GhostBatchNorm,
    "sync": SyncBatchNorm,
    "ghost": GhostBatchNorm,
    "renorm": BatchRenorm,
    "frozen": GhostBatchNorm,
}
_RELU_GAIN = (2 / (1 - 1 / math.pi)) ** 0.5
"""1 / standard deviation of relu(z), z standard normal: with it a convolution's output has unit variance (Brock et al.
2021, arXiv 2101.08692, section 4.2)."""
WITH_ACTIVATION = ("evonorm", "frn")
"""Norms that bring an activation in place of the one that follows them."""


def layer_options(config: NormConfig, layout: Layout) -> dict[str, Any]:
    """Arguments of the layer class that serves ``config`` (a batch normalization) under ``layout``.

    Local batch normalization is a ghost batch for each logical GPU that the process hosts. Which samples make up each
    group is told to the layers at every step, as a last batch may be smaller.
    """
    options: dict[str, Any] = {}
    if _KINDS[config.name] is GhostBatchNorm:
        options |= {"ghost_batch_size": layout.ghost_batch_size, "remainder": "smaller"}
    if config.name == "sync" or len(layout.ranks) > 1:
        options["process_group"] = layout.ranks
    if config.name == "renorm":
        options |= {"r_max": config.r_max, "d_max": config.d_max, "warmup_steps": config.warmup_steps}
        options |= {"r_ramp_end": config.r_ramp_end, "d_ramp_end": config.d_ramp_end}
    return options


def norm_factory(config: NormConfig, layout: Layout) -> Callable[[int], nn.Module]:
    """A function from a number of channels to a layer."""
    if config.name in _KINDS:
        kind, options = _KINDS[config.name], layer_options(config, layout)
        return lambda num_features: kind(
            num_features, eps=config.eps, momentum=config.momentum, affine=config.affine, **options
        )
    if config.name == "mabn":
        return partial(MovingAverageBatchNorm, **_window_options(config, layout))
    if config.name in ("none", "weight", "nf"):
        return lambda num_features: nn.Identity()
    if config.name in ("group", "ws_group"):
        return lambda num_features: _group_norm(config, num_features)
    if config.name == "layer":
        return lambda num_features: nn.GroupNorm(1, num_features, config.eps, config.affine)
    if config.name == "instance":
        return lambda num_features: nn.InstanceNorm2d(num_features, config.eps, affine=config.affine)
    return _timm_norm(config)


def _window_options(config: NormConfig, layout: Layout) -> dict[str, Any]:
    names = ("window", "eps", "momentum", "affine", "r_max", "warmup_steps")
    return {"gpus": layout.gpus, "hosted": layout.row_range} | {name: getattr(config, name) for name in names}


def _group_norm(config: NormConfig, num_features: int) -> nn.Module:
    _check_groups(config, num_features)
    return nn.GroupNorm(config.groups, num_features, config.eps, config.affine)


def _check_groups(config: NormConfig, num_features: int) -> None:
    if num_features % config.groups:
        raise ConfigError("norm.groups", config.groups, f"a divisor of every layer's channels ({num_features} in one)")


def _timm_norm(config: NormConfig) -> Callable[[int], nn.Module]:
    layers = _timm("layers")
    if not config.affine and config.name in WITH_ACTIVATION:
        raise ConfigError("norm.affine", False, f"true with norm.name {config.name}")
    if config.name == "rms":
        return lambda num_features: _made(layers.RmsNorm2d(num_features, config.eps, config.affine))
    if config.name == "frn":
        return lambda num_features: _made(layers.FilterResponseNormTlu2d(num_features, eps=config.eps))

    def evonorm(num_features: int) -> nn.Module:
        _check_groups(config, num_features)
        return _made(layers.EvoNorm2dS0(num_features, groups=config.groups, eps=config.eps))

    return evonorm


def _made(module: Any) -> nn.Module:
    assert isinstance(module, nn.Module)
    return module


def _timm(module: str) -> Any:
    import_torchvision()  # timm imports it, and it may need help
    try:
        return importlib.import_module(f"timm.{module}")
    except ImportError as error:
        raise ImportError(f"{error}; this norm needs: pip install 'syncbn[train]'") from error


# ---- a whole model


def adapt_model(model: nn.Module, config: NormConfig, layout: Layout) -> nn.Module:
    """Give a model built with BatchNorm the configured normalization.

    Batch normalizations are converted: the layers keep their own eps, which belongs to the model. For the other norms
    each BatchNorm is replaced.
    """
    if config.name in WITH_ACTIVATION:
        raise ConfigError("norm.name", config.name, _NEEDS_CONVNET)
    if config.name in _KINDS:
        if not config.affine:
            raise ConfigError(
                "norm.affine", False, "true with a torchvision model, whose layers have a weight and bias"
            )
        return convert(model, _KINDS[config.name], momentum=config.momentum, **layer_options(config, layout))
    if config.name == "nf" and not _residual_ends(model):
        raise ConfigError("norm.name", "nf", "a ResNet, whose branches can begin at zero, or another norm")
    make = norm_factory(config, layout)
    for parent, name, child in _children(model):
        if isinstance(child, _BatchNorm):
            setattr(parent, name, _begin_alike(make(child.num_features), child))
    return adapt_convolutions(model, config)


def adapt_convolutions(model: nn.Module, config: NormConfig) -> nn.Module:
    """What a norm does to the convolutions and activations of a model that has its weights: their values are kept."""
    if config.name == "weight":
        for _, _, child in _children(model):
            if isinstance(child, nn.Conv2d):
                _bias(child)
                nn.utils.parametrizations.weight_norm(child)
    if config.name == "mabn":
        for _, _, child in _children(model):
            if isinstance(child, nn.Conv2d):
                centre(child)
    if config.name in ("ws_group", "nf"):
        layers = _timm("layers")
        kind = layers.StdConv2d if config.name == "ws_group" else layers.ScaledStdConv2d
        ends = _residual_ends(model) if config.name == "nf" else set()
        for parent, name, child in _children(model):
            if isinstance(child, nn.Conv2d):
                # A branch that begins as zero leaves the signal's scale alone (SkipInit; De and Smith 2020, arXiv
                # 2002.10444): what keeps it in residual networks that nothing normalizes.
                extra = {"gamma": _RELU_GAIN, "gain_init": float(child not in ends)} if config.name == "nf" else {}
                setattr(parent, name, _standardized(child, kind, extra))
    if config.name in WITH_ACTIVATION:
        if any(True for name, child in model.named_children() if not name.startswith(_PLAIN)):
            raise ConfigError(
                "norm.name", config.name, "a norm without an activation of its own, or model.name convnet"
            )
        for parent, name, child in _children(model):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Identity())
    return model


_PLAIN = ("layer", "relu", "pool", "average", "flatten", "linear")
"""Names in a network where every norm is followed by its activation (`convnet`)."""
_NEEDS_CONVNET = "a norm without an activation of its own, or model.name convnet"


def clip_gradients(model: nn.Module, config: NormConfig) -> None:
    """Adaptive gradient clipping of the convolutions' weights, in place (timm's; Brock et al. 2021, section 4.1, which
    leaves the last linear layer out too).

    Biases and gains are left alone: the bound is relative to a parameter's norm, and they begin at zero.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    _timm("utils.agc").adaptive_clip_grad(weights, clip_factor=config.clip_factor)


def _begin_alike(made: nn.Module, replaced: _BatchNorm) -> nn.Module:
    """``made`` with the weight and bias of the layer it replaces: some models begin with zeros in places."""
    with torch.no_grad():
        for name in ("weight", "bias"):
            value, first = getattr(made, name, None), getattr(replaced, name)
            if value is not None and first is not None:
                value.copy_(first)
    return made


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in list(model.modules()) for name, child in parent.named_children()]


def _bias(conv: nn.Conv2d) -> None:
    if conv.bias is None:  # left out because a norm's mean would have taken it away again
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))


def _residual_ends(model: nn.Module) -> set[nn.Module]:
    """The last convolution of each residual branch (this package's blocks and torchvision's ResNets)."""
    ends: set[nn.Module] = set()
    for block in model.modules():
        if type(block).__name__ in ("BasicBlock", "Bottleneck"):
            branch = [m for name, m in block.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
            ends.add(branch[-1])
    return ends


def _standardized(conv: nn.Conv2d, kind: Any, extra: dict[str, Any]) -> nn.Module:
    shape = {"kernel_size": conv.kernel_size, "stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    made = kind(conv.in_channels, conv.out_channels, padding=conv.padding, bias=True, **shape, **extra)
    made.weight = conv.weight
    bias: Tensor = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    made.bias = nn.Parameter(bias.detach())
    return _made(made)
