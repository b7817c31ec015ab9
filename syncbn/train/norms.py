"""The normalization that a run's configuration names, as a factory of layers and as a conversion of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.convert import convert
from syncbn.modules import BatchRenorm, GhostBatchNorm, SmallBatchNorm, SyncBatchNorm
from syncbn.train.config import ConfigError, NormConfig
from syncbn.train.logical import Layout

_KINDS: dict[str, type[SmallBatchNorm]] = {
    "batch": GhostBatchNorm,
    "sync": SyncBatchNorm,
    "ghost": GhostBatchNorm,
    "renorm": BatchRenorm,
}


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
    if config.name == "none":
        return lambda num_features: nn.Identity()
    if config.name == "group":
        return lambda num_features: _group_norm(config, num_features)
    kind, options = _KINDS[config.name], layer_options(config, layout)
    return lambda num_features: kind(
        num_features, eps=config.eps, momentum=config.momentum, affine=config.affine, **options
    )


def _group_norm(config: NormConfig, num_features: int) -> nn.Module:
    if num_features % config.groups:
        raise ConfigError("norm.groups", config.groups, f"a divisor of every layer's channels ({num_features} in one)")
    return nn.GroupNorm(config.groups, num_features, config.eps, config.affine)


def adapt_model(model: nn.Module, config: NormConfig, layout: Layout) -> nn.Module:
    """Give a model built with BatchNorm the configured normalization.

    Batch normalizations are converted: the layers keep their own eps, which belongs to the model. For `none` and
    `group` each BatchNorm is replaced.
    """
    if config.name in _KINDS:
        if not config.affine:
            raise ConfigError(
                "norm.affine", False, "true with a torchvision model, whose layers have a weight and bias"
            )
        return convert(model, _KINDS[config.name], momentum=config.momentum, **layer_options(config, layout))
    make = norm_factory(config, layout)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, make(child.num_features))
    return model
