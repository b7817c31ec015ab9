"""Batch normalization folded into the convolutions before it, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from syncbn.convert_layer import follows, is_convertible
from syncbn.domains import set_domains
from syncbn.drop_act import drop_then_act
from syncbn.freeze import unfreeze
from syncbn.functional.epilogue import ActivationName
from syncbn.layers import SmallBatchNorm

M = TypeVar("M", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(model: M) -> M:
    """A copy of ``model`` for inference, whose normalizations are part of the convolutions before them.

    In evaluation a batch normalization is a fixed scale and shift of each channel. Where it follows a convolution, a
    transposed convolution or a linear layer, both become one layer with other weights (Jacob et al. 2018, arXiv
    1712.05877, section 3.2). The outputs are the same up to rounding. An activation that is part of the normalization
    stays, as does what else its class does. Fold a model as the last step: the copy cannot be trained further. Within
    :func:`syncbn.domain` the copy is that of the domain.

    The graph of the model is found by ``torch.fx``, which leaves the model itself as it is.

    Args:
        model: a model in evaluation mode, with layers of this package or torch's batch normalizations.

    Raises:
        ValueError: the model is in training mode; torch.fx cannot trace it; or a normalization does not follow such a
            layer alone, has no running statistics, or is used more than once. All these layers are named.

    Example:
        >>> import syncbn
        >>> model = syncbn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), "sync").eval()
        >>> folded = fold(model)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> type(folded[1]).__name__, torch.allclose(folded(x), model(x), atol=1e-5)
        ('Identity', True)
    """
    folded = _settled(model)
    norms = {name: m for name, m in folded.named_modules() if isinstance(m, _BatchNorm)}
    training = [name for name, norm in norms.items() if norm.training]
    if training:
        raise ValueError(f"fold: the normalization {training[0]!r} is in training mode; call model.eval() first")
    before = _layers_before(folded, norms)
    for name, norm in norms.items():
        owner, _, attribute = name.rpartition(".")
        setattr(folded.get_submodule(owner), attribute, _rest(norm))
        owner, _, attribute = before[name].rpartition(".")
        setattr(folded.get_submodule(owner), attribute, _fused(folded.get_submodule(before[name]), norm))
    return folded


def _settled(model: M) -> M:
    """A copy whose layers have the statistics in use alone, and are not frozen."""
    settled = copy.deepcopy(model)
    for layer, own in zip(list(model.modules()), list(settled.modules()), strict=True):
        if isinstance(layer, SmallBatchNorm) and layer.default_domain is not None:
            assert isinstance(own, SmallBatchNorm), "a copy"
            chosen = layer.default_domain if layer.active_domain is None else layer.active_domain.domain
            set_domains(own, [chosen], affine=False)
    return unfreeze(settled)


class _Leaves(torch.fx.Tracer):
    """A normalization is a leaf, whatever its class."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _layers_before(model: nn.Module, norms: dict[str, _BatchNorm]) -> dict[str, str]:
    """By the name of each normalization, the name of the layer that it can be folded into."""
    try:
        nodes = _Leaves().trace(model).nodes
    except Exception as error:  # whatever the model's code does with a proxy
        raise ValueError(f"fold: torch.fx cannot trace {type(model).__name__}: {error}") from error
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    found: dict[str, str] = {}
    refused: list[str] = []
    for node in nodes:
        if node.op != "call_module" or node.target not in norms:
            continue
        source = node.args[0]
        if calls[node.target] > 1:
            refused.append(f"{node.target} is used {calls[node.target]} times")
        elif not _is_known(norms[node.target]):
            refused.append(f"{node.target} is a {type(norms[node.target]).__name__}, which may do more than normalize")
        elif norms[node.target].running_mean is None:
            refused.append(f"{node.target} has no running statistics")
        elif len(node.args) + len(node.kwargs) > 1:
            refused.append(f"{node.target} takes a residual or a mask")
        elif source.op != "call_module" or not _takes(model.get_submodule(source.target), norms[node.target]):
            refused.append(f"{node.target} follows no convolution or linear layer of its size")
        elif calls[source.target] > 1 or len(source.users) > 1:
            refused.append(f"the output of {source.target}, before {node.target}, is used elsewhere too")
        else:
            found[node.target] = source.target
    refused += [f"{name} is not called" for name in norms if name not in calls]
    if refused:
        raise ValueError(f"fold: these normalizations cannot be part of a layer before them: {'; '.join(refused)}")
    return found


def _is_known(norm: _BatchNorm) -> bool:
    if isinstance(norm, SmallBatchNorm):
        return norm.after in (None, drop_then_act)
    return is_convertible(type(norm)) and follows(type(norm)) in (None, drop_then_act)


def _takes(layer: nn.Module, norm: _BatchNorm) -> bool:
    if type(layer) in _CONVOLUTIONS or type(layer) in _TRANSPOSED:
        return norm.num_features == layer.out_channels
    return type(layer) is nn.Linear and norm.num_features == layer.out_features


def _fused(layer: nn.Module, norm: _BatchNorm) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))  # type: ignore[type-var]


def _rest(norm: _BatchNorm) -> nn.Module:
    """What a layer does after it has normalized."""
    steps: list[nn.Module] = []
    if isinstance(norm, SmallBatchNorm):
        steps.append(_activation(norm.activation, norm.negative_slope))
    if not isinstance(norm, SmallBatchNorm) or norm.after is drop_then_act:
        steps += [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    steps = [step for step in steps if not isinstance(step, nn.Identity)]
    if len(steps) > 1:
        return nn.Sequential(*steps)
    return steps[0] if steps else nn.Identity()


def _activation(name: ActivationName | None, negative_slope: float) -> nn.Module:
    modules = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(negative_slope), "silu": nn.SiLU()}
    return nn.Identity() if name is None else modules[name]
