"""What timm's layers do after they have normalized: dropout, and an activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from syncbn.functional.epilogue import ActivationName


def drop_then_act(layer: Any, x: Tensor) -> Tensor:
    """What timm's layers do after normalizing."""
    for name in ("drop", "act"):
        if hasattr(layer, name):
            x = getattr(layer, name)(x)
    return x


_ACTIVATIONS: dict[type | None, ActivationName] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}


def own_activation(layer: nn.Module, save: str) -> dict[str, Any]:
    """The options with which ``layer``, one of timm's, applies its activation itself; empty if it cannot.

    It cannot if ``act`` or ``drop`` has a hook or a ``forward`` of its own, which would not be called.
    """
    drop, act = getattr(layer, "drop", None), getattr(layer, "act", None)
    drops = drop is not None and not (type(drop) is nn.Identity and _is_plain(drop))
    if drops or type(act) not in _ACTIVATIONS or not _is_plain(act):
        return {}
    found: dict[str, Any] = {"activation": _ACTIVATIONS[type(act)]}
    if isinstance(act, nn.LeakyReLU):
        found["negative_slope"] = act.negative_slope
    invertible = found.get("negative_slope", 0) > 0
    return found if invertible or save == "input" else {}


def _is_plain(module: Any) -> bool:
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return not any(vars(module).get(name) for name in ("forward", *hooks))
