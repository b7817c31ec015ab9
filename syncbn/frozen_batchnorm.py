"""Frozen batch normalizations, made trainable and frozen again.

torchvision, detectron2, timm, and each detector of transformers that descends from DETR have such a class of their own.
All hold the same four tensors as buffers, by which they are known here: none of these packages is imported.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, Any]
"""The attributes of a layer, as in ``vars(layer)``."""

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_WITH_ACTIVATION = "timm.layers.norm_act.FrozenBatchNormAct2d"
_TOLERANCE = 1e-6
"""Of the largest value, in float64: another order of the same operations is below 1e-9 unless the mean is a million
standard deviations away from 0. An activation, or 1e-3 in place of 1e-5 as eps with a variance of 1, is above 1e-4."""


@dataclass(frozen=True, eq=False)
class Frozen:
    """What a layer was before it was made trainable."""

    original: type[nn.Module]
    buffers: tuple[str, ...]
    replaced: State
    added: tuple[str, ...]


def is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` holds the four tensors of a batch normalization as buffers, and no other tensor."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    return (
        not isinstance(module, _BatchNorm)
        and not any(parameter is not None for parameter in module._parameters.values())
        and buffers.keys() == set(_TENSORS)
        and len({buffer.shape for buffer in buffers.values()}) == 1
        and all(buffer.dim() == 1 and buffer.is_floating_point() for buffer in buffers.values())
    )


def thawed(layer: nn.Module, eps: float | None) -> tuple[type[_BatchNorm], State, Frozen]:
    """The class and the attributes of a trainable batch normalization with the numbers of a frozen ``layer``.

    Its parameters share the memory of the buffers. ``eps`` is for layers that have no such attribute.

    Raises:
        ValueError: eps is not known, or ``layer`` computes something else.
    """
    eps = getattr(layer, "eps", eps)
    if eps is None:
        raise ValueError("it has no attribute eps; pass eps=... with the value in its forward (DETR's is 1e-5)")
    cls, old = type(layer), dict(vars(layer))
    acts = f"{cls.__module__}.{cls.__qualname__}" == _WITH_ACTIVATION
    if not acts:
        _check_forward(layer, eps)
    buffers = old["_buffers"]
    new = nn.BatchNorm2d(len(buffers["weight"]), eps, affine=False, track_running_stats=False)  # without tensors
    new.affine = new.track_running_stats = True
    new._parameters = {name: nn.Parameter(buffers[name]) for name in ("weight", "bias")}
    tracked = torch.zeros((), dtype=torch.int64, device=buffers["running_mean"].device)
    new._buffers = {**{name: buffers[name] for name in ("running_mean", "running_var")}, "num_batches_tracked": tracked}
    state = old | {key: value for key, value in vars(new).items() if key not in old or key in _CHANGED}
    replaced = {key: value for key, value in old.items() if key != "_buffers" and state[key] is not value}
    frozen = Frozen(cls, tuple(buffers), replaced, tuple(state.keys() - old.keys()))
    return (sys.modules[cls.__module__].BatchNormAct2d if acts else nn.BatchNorm2d), state, frozen


_CHANGED = ("_parameters", "_buffers", "num_features", "eps", "affine", "track_running_stats")


def frozen_again(frozen: Frozen, state: State) -> tuple[type[nn.Module], State]:
    """The class and the attributes of a layer that was ``frozen``, with the numbers of its trainable ``state``."""
    tensors = state["_parameters"] | state["_buffers"]
    old = {key: value for key, value in state.items() if key not in frozen.added} | frozen.replaced
    old["_buffers"] = {name: tensors[name].detach() if name in _TENSORS else None for name in frozen.buffers}
    return frozen.original, old


def _check_forward(layer: nn.Module, eps: float) -> None:
    """Refuse a class that does more than its tensors say, by trying it on values around its running mean."""
    if any(type(buffer) is not Tensor or buffer.is_meta for buffer in layer.buffers(recurse=False)):
        return  # without numbers, as in a model that is built before its checkpoint is read
    # In float64 on the CPU, where two ways to compute the same agree; hooks are not called.
    copied = copy.deepcopy(layer).to("cpu", torch.float64)
    weight, bias, mean, var = (copied.get_buffer(name) for name in _TENSORS)
    with torch.no_grad():
        sigma = (var + eps).sqrt()
        normalized = torch.linspace(-4, 4, 8, dtype=torch.float64)[:, None]
        expected = normalized * weight + bias
        x = mean + normalized * sigma
        try:
            found = type(copied).forward(copied, x[:, :, None, None])
        except Exception as error:  # whatever the class does
            raise ValueError(f"its forward cannot be tried on a batch ({error})") from error
    if type(expected) is not Tensor:  # a fake tensor, which has no numbers
        return
    same = isinstance(found, Tensor) and found.shape == (*x.shape, 1, 1)
    scale = float(expected.abs().max().clamp(min=1e-300))
    if not same or not torch.allclose(found[:, :, 0, 0], expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
        raise ValueError(
            f"its forward is not (x - running_mean) / sqrt(running_var + {eps}) * weight + bias; leave it out with "
            "where=..., or build the model with torch's batch normalization"
        )
