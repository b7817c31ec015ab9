"""Activations that converted layers apply themselves: which those are, and what becomes of the activation's module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.convert_layer import State
from syncbn.functional.epilogue import ActivationName
from syncbn.registry import After, after_of, drop_then_act
from syncbn.tracing import find_followers, is_plain

_MARK = "_syncbn_activated"


def mark_activated(layer: Any, y: Tensor) -> Tensor:
    """What a layer with ReLU in it does last: tell :class:`FusedReLU` that there is nothing left to do.

    Compiled there are no marks: the second ReLU changes no value, and the compiler fuses it with what is around it.
    """
    if not torch.compiler.is_compiling():
        if not y.is_inference():  # such a tensor does not tell whether it was changed
            vars(y)[_MARK] = y._version
        return y
    # Evaluation ends with torch's ReLU, whose backward pass needs what it returned, and the second may be in place. The
    # compiler leaves the copy out.
    return y.clone() if y.requires_grad and not layer.training else y


def find_fusions(
    module: nn.Module, layers: Mapping[_BatchNorm, tuple[type[_BatchNorm], State]], save: str
) -> dict[_BatchNorm, Fused]:
    """Which of ``layers`` can apply the activation that follows them in ``module``, and how. Changes nothing.

    Args:
        module: the model.
        layers: those of its batch normalizations that are to be converted, each convertible, with the class and the
            attributes that they have or had before.
        save: the layers' option; what ``"output"`` cannot do is left out.
    """
    found, plain = {}, []
    for layer, (original, before) in layers.items():
        after = after_of(original)
        own = _own_activation(layer) if after is drop_then_act else None
        if before.get("activation") is not None:
            continue
        if own is not None and (options := _options(own, save)) is not None:
            found[layer] = Fused(options, None, None, None)
        elif after is None or (after is drop_then_act and _does_nothing(layer, "drop", "act")):
            plain.append(layer)
    names = {m: name for name, m in module.named_modules()}
    # An activation that lets values through does nothing elsewhere either; ReLU looks for a mark instead.
    pairs = find_followers(module, plain, _is_activation, shared=lambda activation: _kind(activation) is nn.ReLU)
    records = {activation: vars(activation).get("_fusion") for activation in pairs.values()}
    for layer, activation in pairs.items():
        options = _options(activation, save)
        if options is not None:
            record = records[activation] = records[activation] or Fusion(_kind(activation), names[activation])
            found[layer] = Fused(options, mark_activated if _kind(activation) is nn.ReLU else None, record, activation)
    return found


def activation_changes(
    module: nn.Module, after: Mapping[_BatchNorm, Fusion | None], fused: Iterable[Fused] = ()
) -> list[tuple[nn.Module, Fusion | None]]:
    """The activations of ``module`` that change, each with its record, or with None where it is to be as it was.

    Args:
        module: the model.
        after: the record that each layer has afterwards, of those that change.
        fused: what layers are to apply from now on.

    Raises:
        ValueError: one of a pair would change and not the other, which is outside of ``module``.
    """
    modules = list(module.modules())
    activations = {vars(m)["_fusion"]: m for m in modules if type(m) in _ORIGINAL and "_fusion" in vars(m)}
    layers = {m: vars(m).get("_fusion") for m in modules if isinstance(m, _BatchNorm)}
    for layer, record in layers.items():
        if record is not None and layer in after and after[layer] is not record and record not in activations:
            raise ValueError(
                f"'{layer.qualified_name}' applies the activation '{record.name}', which is not in the module given; "
                "give the model that has both"
            )
    remaining = {after.get(layer, record) for layer, record in layers.items()}
    released = {record for record in layers.values() if record is not None} - remaining
    changes: list[tuple[nn.Module, Fusion | None]] = [(m, None) for r, m in activations.items() if r in released]
    added = {f.activation: f.record for f in fused if f.activation is not None}
    return changes + [(m, record) for m, record in added.items() if "_fusion" not in vars(m)]


def reverted_activations(module: nn.Module) -> list[tuple[nn.Module, Fusion | None]]:
    """As :func:`activation_changes`, where no layer of ``module`` applies an activation any more.

    Raises:
        ValueError: as there; or an activation does nothing for the sake of a layer that is not in ``module``.
    """
    layers = {m: vars(m)["_fusion"] for m in module.modules() if isinstance(m, _BatchNorm) and "_fusion" in vars(m)}
    for m in module.modules():
        record = vars(m).get("_fusion")
        if isinstance(m, FusedLeakyReLU | FusedSiLU) and record is not None and record not in layers.values():
            raise ValueError(
                f"the layer that applies the activation '{record.name}' is not in the module given; "
                "give the model that has both"
            )
    return activation_changes(module, dict.fromkeys(layers))


def set_activation(activation: nn.Module, record: Fusion | None) -> None:
    """Make ``activation`` one whose layer applies it; with None, what it was before."""
    if record is not None:
        activation.__class__ = _FUSED[record.original]
        vars(activation)["_fusion"] = record
    else:
        activation.__class__ = vars(activation).pop("_fusion").original


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module, for an activation that is let through the class that it was of."""
    return _ORIGINAL.get(type(module), type(module))


def _options(activation: nn.Module, save: str) -> dict[str, Any] | None:
    """The options of a layer that applies ``activation``; None where it cannot."""
    options: dict[str, Any] = {"activation": _NAMES[_kind(activation)]}
    slope = None
    if isinstance(activation, nn.LeakyReLU):
        slope = activation.negative_slope
        if not (isinstance(slope, float | int) and math.isfinite(slope)):
            return None
        options["negative_slope"] = slope
    return None if save == "output" and not (slope is not None and slope > 0) else options


def _is_activation(module: nn.Module) -> bool:
    return _kind(module) in _NAMES and is_plain(module)


def _does_nothing(layer: nn.Module, *names: str) -> bool:
    parts = [getattr(layer, name) for name in names if hasattr(layer, name)]
    return all(type(part) is nn.Identity and is_plain(part) for part in parts)


def _own_activation(layer: nn.Module) -> nn.Module | None:
    """The activation inside one of timm's layers, where nothing else happens after normalizing."""
    act = getattr(layer, "act", None)
    return act if isinstance(act, nn.Module) and _is_activation(act) and _does_nothing(layer, "drop") else None


class Fused(NamedTuple):
    """How a layer is to apply an activation."""

    options: dict[str, Any]
    """Of the layer, over those of all layers."""
    after: After | None
    record: Fusion | None
    activation: nn.Module | None
    """The module that is to let values through; None where it is part of the layer itself."""

    @property
    def attributes(self) -> State:
        """Of the layer, besides its options."""
        return {"after": self.after} | ({} if self.record is None else {"_fusion": self.record})


@dataclass(frozen=True, eq=False)
class Fusion:
    """One object on an activation and on each layer that applies it, as ``_fusion``; copied and pickled with them."""

    original: type[nn.Module]
    """The activation's class."""
    name: str
    """The activation's name within the model."""


class FusedReLU(nn.ReLU):
    """ReLU that knows the output of a layer that has applied it, and returns that as it is.

    It serves as ReLU elsewhere: one module is often used behind normalizations and behind additions. The layer's output
    is known by a mark that is gone after this, and that does not count once the values were changed in place.
    """

    def forward(self, input: Tensor) -> Tensor:
        marked = not torch.compiler.is_compiling() and _MARK in vars(input)
        return input if marked and vars(input).pop(_MARK) == input._version else super().forward(input)


class FusedLeakyReLU(nn.LeakyReLU):
    """A LeakyReLU that the layer before has applied already."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedSiLU(nn.SiLU):
    """A SiLU that the layer before has applied already."""

    def forward(self, input: Tensor) -> Tensor:
        return input


_NAMES: dict[type[nn.Module], ActivationName] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: FusedReLU,
    nn.LeakyReLU: FusedLeakyReLU,
    nn.SiLU: FusedSiLU,
}
_ORIGINAL = {fused: original for original, fused in _FUSED.items()}
