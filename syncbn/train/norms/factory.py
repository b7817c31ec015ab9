"""The normalization of a run: a factory of layers, and the changes it makes to a whole model.

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

Cross-iteration batch normalization (Yao et al. 2021, arXiv 2002.05712) is left out: it corrects the statistics of past
iterations by their gradients with respect to the weights of the convolution before, which a layer has no access to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.compat import import_timm
from syncbn.convert import convert
from syncbn.convert_layer import is_convertible
from syncbn.layers import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.train.config import ConfigError, NormConfig, require
from syncbn.train.logical_gpus import Partition
from syncbn.train.norms.followed import followed
from syncbn.train.norms.moving_average import MovingAverageBatchNorm, centre

_Kind = type[SyncBatchNorm] | type[GhostBatchNorm] | type[BatchRenorm]
_KINDS: dict[str, _Kind] = {"sync": SyncBatchNorm, "renorm": BatchRenorm}
_KINDS |= dict.fromkeys(("batch", "ghost", "frozen"), GhostBatchNorm)
_RELU_GAIN = (2 / (1 - 1 / math.pi)) ** 0.5
"""1 / standard deviation of relu(z) for standard normal z. With this gain the output of a convolution has unit variance
(Brock et al. 2021, arXiv 2101.08692, section 4.2)."""
_WITH_ACTIVATION = ("evonorm", "frn")
"""Norms that have an activation of their own and replace the one after them."""
_NEEDS_CONVNET = "a norm without an activation of its own, or model.name convnet"


def _layer_arguments(config: NormConfig, partition: Partition) -> dict[str, Any]:
    """Arguments for the layer class of a norm in ``_KINDS``. Local batch normalization is one ghost batch per GPU."""
    options: dict[str, Any] = {}
    if _KINDS[config.name] is GhostBatchNorm:
        options |= {"ghost_batch_size": partition.ghost_batch_size, "remainder": "smaller"}
    if config.name == "sync" or len(partition.ranks) > 1:
        options["process_group"] = partition.ranks
    if config.name == "renorm":
        options |= {"r_max": config.r_max, "d_max": config.d_max, "warmup_steps": config.warmup_steps}
        options |= {"r_ramp_end": config.r_ramp_end, "d_ramp_end": config.d_ramp_end}
    return options


def norm_factory(config: NormConfig, partition: Partition) -> Callable[[int], nn.Module]:
    """A function from a number of channels to a layer."""
    name, eps, affine = config.name, config.eps, config.affine
    require(affine or name not in _WITH_ACTIVATION, "norm.affine", affine, f"true with norm.name {name}")
    if name in _KINDS:
        options = _layer_arguments(config, partition)
        return partial(_KINDS[name], eps=eps, momentum=config.momentum, affine=affine, **options)
    makers: dict[str, Callable[[int], nn.Module]] = {
        "mabn": partial(MovingAverageBatchNorm, config=config, gpus=partition.gpus, hosted=partition.row_range),
        "group": lambda channels: nn.GroupNorm(_groups(config, channels), channels, eps, affine),
        "ws_group": lambda channels: nn.GroupNorm(_groups(config, channels), channels, eps, affine),
        "layer": lambda channels: nn.GroupNorm(1, channels, eps, affine),
        "instance": lambda channels: nn.InstanceNorm2d(channels, eps, affine=affine),
        "rms": lambda channels: import_timm("layers").RmsNorm2d(channels, eps, affine),
        "frn": lambda channels: import_timm("layers").FilterResponseNormTlu2d(channels, eps=eps),
        "evonorm": lambda channels: import_timm("layers").EvoNorm2dS0(
            channels, groups=_groups(config, channels), eps=eps
        ),
    }
    return makers.get(name, lambda channels: nn.Identity())


def _groups(config: NormConfig, channels: int) -> int:
    expected = f"a divisor of every layer's channels ({channels} in one)"
    require(channels % config.groups == 0, "norm.groups", config.groups, expected)
    return config.groups


# ---- a whole model


def adapt_model(model: nn.Module, config: NormConfig, partition: Partition) -> nn.Module:
    """Give a model with BatchNorm the configured normalization.

    For this package's layers the model is converted, and each layer keeps its eps. Other norms replace each BatchNorm.
    """
    require(config.name not in _WITH_ACTIVATION, "norm.name", config.name, _NEEDS_CONVNET)
    if config.name in _KINDS:
        expected = "true with a torchvision model, whose layers have a weight and bias"
        require(config.affine, "norm.affine", False, expected)
        own = f"{NormConfig.eps}, or nothing: the layers of this model keep the eps that they have"
        require(config.eps == NormConfig.eps, "norm.eps", config.eps, own)
        try:
            return convert(model, _KINDS[config.name], momentum=config.momentum, **_layer_arguments(config, partition))
        except ValueError as error:
            raise ConfigError("norm.name", config.name, f"a model whose layers can be changed ({error})") from error
    resnet = "a ResNet, whose branches can start at zero, or another norm"
    require(config.name != "nf" or bool(_residual_ends(model)), "norm.name", "nf", resnet)
    make = norm_factory(config, partition)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a second name of a child
            if isinstance(child, _BatchNorm):
                if child not in made:  # a layer that the model uses in several places stays one layer
                    made[child] = _in_place_of(child, make, config)
                setattr(parent, name, made[child])
    return adapt_convolutions(model, config)


def _in_place_of(layer: _BatchNorm, make: Callable[[int], nn.Module], config: NormConfig) -> nn.Module:
    """What a norm that is none of this package's layers puts in place of ``layer``."""
    kind = type(layer).__name__
    known = f"a model without {kind}, which may do more than normalize: see syncbn.register_batchnorm"
    require(is_convertible(type(layer)), "norm.name", config.name, known)
    flat = isinstance(layer, nn.BatchNorm2d) or config.name != "rms"
    require(flat, "norm.name", "rms", f"a norm for inputs of a {kind}; rms is for 2-D images")
    made = _instance_norm(layer, config) if config.name == "instance" else make(layer.num_features)
    # Some models start with zeros in places. A norm that has no weight or bias leaves them out.
    made.load_state_dict(dict(layer.named_parameters(recurse=False)), strict=False)
    return followed(made, layer)


def adapt_convolutions(model: nn.Module, config: NormConfig) -> nn.Module:
    """Make the changes that a norm needs outside its layers, to convolutions and activations. Weights are kept."""
    if config.name in _WITH_ACTIVATION:
        # In `convnet` alone an activation follows every norm.
        modules = ("layer", "relu", "pool", "average", "flatten", "linear")
        plain = all(name.startswith(modules) for name, _ in model.named_children())
        require(plain, "norm.name", config.name, _NEEDS_CONVNET)
        for parent, name, child in _children(model):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Identity())
    ends = _residual_ends(model) if config.name == "nf" else set()
    for parent, name, child in _children(model):
        if not isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if config.name == "weight":
            if child.bias is None:  # the mean of BatchNorm would have cancelled it
                child.bias = nn.Parameter(child.weight.new_zeros(child.out_channels))
            nn.utils.parametrizations.weight_norm(child)
        elif config.name == "mabn":
            centre(child)
        elif config.name == "ws_group":
            setattr(parent, name, _standardized(_flat(child, config), import_timm("layers").StdConv2d))
        elif config.name == "nf":
            # A branch that starts at zero keeps the scale of the signal in a residual network without normalization
            # (SkipInit; De and Smith 2020, arXiv 2002.10444).
            gain = {"gamma": _RELU_GAIN, "gain_init": float(child not in ends)}
            setattr(parent, name, _standardized(_flat(child, config), import_timm("layers").ScaledStdConv2d, **gain))
    return model


def clip_gradients(model: nn.Module, config: NormConfig) -> None:
    """Adaptive gradient clipping of the convolutions' weights (Brock et al. 2021, arXiv 2102.06171, section 4.1; timm).

    As in the paper, the last linear layer is left out. Biases and gains are too: the bound is relative to a parameter's
    norm, and they start at zero.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    import_timm("utils.agc").adaptive_clip_grad(weights, clip_factor=config.clip_factor)


def _flat(conv: nn.Module, config: NormConfig) -> nn.Conv2d:
    """``conv``, if it is torch's convolution of images. A subclass may pad otherwise, as timm's ``Conv2dSame`` does."""
    if type(conv) is not nn.Conv2d:
        expected = f"a norm for a {type(conv).__name__}; {config.name} is for torch's Conv2d"
        raise ConfigError("norm.name", config.name, expected)
    return conv


def _instance_norm(layer: _BatchNorm, config: NormConfig) -> nn.Module:
    """Instance normalization for the inputs of a BatchNorm layer."""
    kinds = {nn.BatchNorm1d: nn.InstanceNorm1d, nn.BatchNorm3d: nn.InstanceNorm3d}
    made = next((kind for known, kind in kinds.items() if isinstance(layer, known)), nn.InstanceNorm2d)
    return made(layer.num_features, config.eps, affine=config.affine)


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in list(model.modules()) for name, child in parent.named_children()]


def _residual_ends(model: nn.Module) -> set[nn.Module]:
    """The last convolution of each residual branch (this package's blocks and torchvision's and timm's ResNets)."""
    blocks = [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    aside = ("downsample", "se.")  # the shortcut and the weighting of channels
    return {
        [m for name, m in block.named_modules() if isinstance(m, nn.Conv2d) and not name.startswith(aside)][-1]
        for block in blocks
    }


def _standardized(conv: nn.Conv2d, kind: Any, **options: Any) -> nn.Module:
    """A convolution of timm's class ``kind`` with the weight of ``conv``, and a bias."""
    shape = {"kernel_size": conv.kernel_size, "stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    made: nn.Conv2d = kind(conv.in_channels, conv.out_channels, padding=conv.padding, bias=True, **shape, **options)
    made.weight = conv.weight
    bias: Tensor = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    made.bias = nn.Parameter(bias.detach())
    return made
