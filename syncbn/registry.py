"""Which batch-normalization classes can be converted, and what each does after normalizing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.layers import BatchRenorm, GhostBatchNorm, SyncBatchNorm

After = Callable[[Any, Tensor], Tensor]
"""Called with the layer and the normalized values; returns what the layer returns."""


def register_batchnorm(cls: type[_BatchNorm], after: After | None = None) -> None:
    """Let :func:`syncbn.convert` change layers of class ``cls``, a subclass of torch's batch normalization.

    A subclass may do more than normalize, and converting it as if it were plain would drop that silently. So only
    classes that are known are converted: torch's ``BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm``, this package's
    layers, timm's ``BatchNormAct2d`` and ``SyncBatchNormAct``, and those registered here. It holds for ``cls`` itself
    and not for its subclasses. A second registration of a class replaces the first.

    Args:
        cls: the class. Its ``forward`` must be ``after(self, batch_norm(x))``.
        after: what it does after normalizing, called with the layer and the normalized (N, C, *) values. The layer
            still has the attributes and submodules that were set on it, but no methods of ``cls``. A function of a
            module, as it is pickled with the model. None where the class normalizes and nothing else.

    Raises:
        ValueError: ``cls`` is no subclass of torch's batch normalization or needs no registration, or ``after`` is not
            a function that can be imported by its name.
    """
    if not (isinstance(cls, type) and issubclass(cls, _BatchNorm)):
        raise ValueError(f"expected a subclass of torch's batch normalization (such as nn.BatchNorm2d), got {cls!r}")
    if cls in _KNOWN:
        raise ValueError(f"{cls.__name__} is converted as it is and cannot be registered; register a subclass of it")
    if after is not None and not _is_importable(after):
        raise ValueError(
            f"after={after!r} cannot be imported by its name, and so could not be pickled with a model; "
            "define it with def at the top level of a module"
        )
    _registered[cls] = after


def is_convertible(cls: type) -> bool:
    """Whether it is known all that a layer of exactly this class does."""
    return cls in _KNOWN or cls in _registered or _full_name(cls) in _KNOWN_BY_NAME


def after_of(cls: type) -> After | None:
    """What layers of a convertible class do after normalizing; None is nothing."""
    return _registered[cls] if cls in _registered else _KNOWN_BY_NAME.get(_full_name(cls))


def drop_then_act(layer: Any, x: Tensor) -> Tensor:
    """What timm's layers do after normalizing: ``layer.act(layer.drop(x))``, each where the layer has it."""
    for name in ("drop", "act"):
        if hasattr(layer, name):
            x = getattr(layer, name)(x)
    return x


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_importable(function: Any) -> bool:
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return getattr(module, getattr(function, "__qualname__", ""), None) is function


_KNOWN = frozenset(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm, GhostBatchNorm, BatchRenorm)
)
# By name, so that timm need not be imported. Its frozen layers are no batch normalization to torch and stay as they
# are; its SplitBatchNorm2d, which divides the batch among several layers, is left out on purpose.
_KNOWN_BY_NAME: dict[str, After] = {
    "timm.layers.norm_act.BatchNormAct2d": drop_then_act,
    "timm.layers.norm_act.SyncBatchNormAct": drop_then_act,
}
_registered: dict[type, After | None] = {}
