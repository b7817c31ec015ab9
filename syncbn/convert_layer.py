"""One layer, converted and reverted, and the registry of classes that can be converted.

A layer is described by its class and its attributes, :data:`State`. A conversion computes a new state, which has the
same tensors and hooks as the old one and a :class:`Conversion` that undoes it. Nothing changes until :func:`set_state`.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import Scope, make_scope, resolve
from syncbn.compat import import_timm
from syncbn.functional.epilogue import ActivationName
from syncbn.layers import BatchRenorm, GhostBatchNorm, SmallBatchNorm, SyncBatchNorm

State = dict[str, Any]
"""The attributes of a layer, as in ``vars(layer)``."""
After = Callable[[Any, Tensor], Tensor]
"""Called with the layer and the normalized values; returns what the layer returns."""

KINDS: dict[str, type[SmallBatchNorm]] = {"sync": SyncBatchNorm, "ghost": GhostBatchNorm, "renorm": BatchRenorm}

_COUNTER = "num_nonfinite_batches"


# -- the registry ------------------------------------------------------------------------------------------------------


def register_batchnorm(cls: type[_BatchNorm], after: After | None = None) -> None:
    """Let :func:`syncbn.convert` change layers of class ``cls``, a subclass of torch's batch normalization.

    A subclass may do more than normalize, and a conversion must not lose that. Therefore only known classes are
    converted: torch's ``BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm``, the layers of this package, timm's
    ``BatchNormAct2d`` and ``SyncBatchNormAct``, and registered classes. Subclasses of ``cls`` are not registered with
    it. Registering a class again replaces ``after``.

    Args:
        cls: a class whose ``forward(x)`` is ``after(self, batch_norm(x))``.
        after: what ``cls`` does after normalizing, called with the layer and the normalized (N, C, *) values. The
            layer has its attributes and submodules, but not the methods of ``cls``. It must be a function defined at
            the top level of a module, because it is pickled with the model. None if ``cls`` only normalizes.

    Raises:
        ValueError: ``cls`` is not a subclass of torch's batch normalization or needs no registration, or ``after``
            cannot be imported by its name.

    Example:
        >>> class MyBatchNorm(nn.BatchNorm2d):
        ...     pass
        >>> register_batchnorm(MyBatchNorm)  # it only normalizes
    """
    if not (isinstance(cls, type) and issubclass(cls, _BatchNorm)):
        raise ValueError(f"expected a subclass of torch's batch normalization (such as nn.BatchNorm2d), got {cls!r}")
    if cls in _KNOWN:
        raise ValueError(f"{cls.__name__} is converted as it is and cannot be registered; register a subclass of it")
    module = sys.modules.get(getattr(after, "__module__", None) or "")
    if after is not None and getattr(module, getattr(after, "__qualname__", ""), None) is not after:
        raise ValueError(
            f"after={after!r} cannot be imported by its name, and so could not be pickled with a model; "
            "define it with def at the top level of a module"
        )
    _registered[cls] = after


def is_convertible(cls: type) -> bool:
    """Whether exactly this class, not only a base of it, is known."""
    return cls in _KNOWN or cls in _registered or _full_name(cls) in _KNOWN_BY_NAME


def follows(cls: type) -> After | None:
    """What a class that can be converted does after normalizing; None if it does nothing more."""
    return _registered[cls] if cls in _registered else _KNOWN_BY_NAME.get(_full_name(cls))


def drop_then_act(layer: Any, x: Tensor) -> Tensor:
    """What timm's layers do after normalizing."""
    for name in ("drop", "act"):
        if hasattr(layer, name):
            x = getattr(layer, name)(x)
    return x


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_KNOWN = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *KINDS.values()))
_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
# By name, because importing timm is slow and optional. SplitBatchNorm2d is not here: it has several sets of statistics.
_KNOWN_BY_NAME: dict[str, After] = {
    _NORM_ACT: drop_then_act,
    "timm.layers.norm_act.SyncBatchNormAct": drop_then_act,
}
_registered: dict[type, After | None] = {}


# -- the classes of converted layers -----------------------------------------------------------------------------------


def _of_dimension(cls: type[SmallBatchNorm], torchs: type[_BatchNorm]) -> type[SmallBatchNorm]:
    """A subclass of both, under which a converted layer still is an instance of torch's class of its dimension.

    Its ``__name__`` is that of ``cls``, which users know. Its qualified name is that of this module's attribute.
    """
    name = cls.__name__ + torchs.__name__.removeprefix("BatchNorm")
    attributes = {"__module__": __name__, "__qualname__": name, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, torchs), attributes)


_CONVERTED: dict[tuple[type, type], type[SmallBatchNorm]] = {
    (cls, torchs): _of_dimension(cls, torchs)
    for cls in KINDS.values()
    for torchs in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
globals().update({cls.__qualname__: cls for cls in _CONVERTED.values()})  # where pickles look for them


def __getattr__(name: str) -> Any:
    """The class of a converted layer of timm, which is made when it is needed: a pickle may be the first to ask."""
    cls = next((cls for cls in KINDS.values() if name == f"{cls.__name__}Act2d"), None)
    if cls is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return converted_class(cls, import_timm("layers").BatchNormAct2d)


def converted_class(cls: type[SmallBatchNorm], original: type[_BatchNorm]) -> type[SmallBatchNorm]:
    """The class of an ``original`` that is converted to ``cls``."""
    if _full_name(original) == _NORM_ACT and (cls, original) not in _CONVERTED:
        # timm asks for its own class before it keeps an activation, such as in freeze_batch_norm_2d.
        _CONVERTED[cls, original] = made = _of_dimension(cls, original)
        globals()[made.__qualname__] = made
    return next((_CONVERTED[cls, base] for base in original.__mro__ if (cls, base) in _CONVERTED), cls)


# -- one layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Conversion:
    """What undoes a conversion. The layer has it as ``_conversion``, and it is copied and pickled with the layer."""

    original: type[_BatchNorm]
    converted: type[SmallBatchNorm]
    replaced: State
    """Attributes that were replaced or removed, with their values."""
    added: tuple[str, ...]
    """Names of the new attributes."""


def options_of(cls: type[SmallBatchNorm]) -> dict[str, inspect.Parameter]:
    """The arguments of ``cls`` that :func:`syncbn.convert` takes: those that do not follow from the old layer."""
    parameters = inspect.signature(cls).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in _FROM_LAYER}


_FROM_LAYER = frozenset(("num_features", "affine", "track_running_stats", "device", "dtype", "bias"))
_ALL_OPTIONS = frozenset(name for cls in KINDS.values() for name in options_of(cls))
_OF_TORCH = frozenset(vars(nn.BatchNorm1d(1, device="meta"))) - _ALL_OPTIONS
"""The attributes of torch's layers that no option sets."""


def _original_state(layer: nn.Module) -> tuple[type[_BatchNorm], State]:
    """The class and a copy of the attributes of ``layer``, or those it had before it was converted."""
    state = dict(vars(layer))
    state["_buffers"] = copy.copy(state["_buffers"])  # reverting changes its content
    conversion: Conversion | None = state.get("_conversion")
    if conversion is None:
        if isinstance(layer, nn.SyncBatchNorm) and layer.process_group is not None:
            state["process_group"] = RememberedGroup(make_scope(layer.process_group), layer.process_group)
        return type(layer), state  # type: ignore[return-value]
    if type(layer) is not conversion.converted:
        raise ValueError(
            f"its class was changed from {conversion.converted.__name__} after the conversion; undo that first"
        )
    for name in conversion.added:
        state.pop(name, None)
    state.update(conversion.replaced)
    return conversion.original, state


def converted_state(layer: _BatchNorm, cls: type[SmallBatchNorm], name: str | None, options: State) -> State | None:
    """The attributes of ``layer`` as a ``cls``; None if it is one with these options already."""
    original, before = _original_state(layer)
    after, converted = follows(original), converted_class(cls, original)
    kept = {key: before[key] for key in ("eps", "momentum")}
    if issubclass(original, SmallBatchNorm):  # these say what the layer computes, unlike its other options
        kept |= {key: before[key] for key in ("activation", "negative_slope")}
    if after is drop_then_act and not {"activation", "negative_slope"} & options.keys():
        own = _own_activation(layer, options.get("save", "input"))
        kept, after = kept | own, None if own else after
    new: Any = cls(
        num_features=before["num_features"],
        affine=False,
        track_running_stats=layer.running_mean is not None,
        device="meta" if layer.running_mean is None else layer.running_mean.device,
        **{**kept, **options, **_scope_options(cls, original, before, options)},
    )
    new.qualified_name, new.after = name, after

    dropped = {"process_group"} | (_ALL_OPTIONS if issubclass(original, SmallBatchNorm) else set())
    old = {key: value for key, value in before.items() if key not in dropped}
    state = old | {key: value for key, value in vars(new).items() if key not in _OF_TORCH}
    if type(layer) is converted and all(vars(layer).get(key) == state.get(key) for key in ("scope", *options_of(cls))):
        return None
    if _COUNTER in vars(layer):
        state[_COUNTER] = vars(layer)[_COUNTER]
    replaced = {k: v for k, v in before.items() if k != "_buffers" and (k not in state or state[k] is not v)}
    state["_conversion"] = Conversion(original, converted, replaced, (*(state.keys() - before.keys()), "_conversion"))
    return state


def reverted_state(layer: nn.Module) -> tuple[type[_BatchNorm], State]:
    """The class and the attributes with which a converted ``layer`` is what it was."""
    original, state = _original_state(layer)
    if isinstance(group := state.get("process_group"), RememberedGroup):
        state["process_group"] = group.group()
    weight = state["_parameters"].get("weight")
    if weight is not None and not issubclass(original, SmallBatchNorm):
        # `half()` leaves a converted layer its wide statistics, which torch's layers cannot use with narrow parameters.
        for name in ("running_mean", "running_var"):
            buffer = state["_buffers"][name]
            if buffer is not None and buffer.dtype.itemsize > weight.dtype.itemsize:
                state["_buffers"][name] = buffer.to(weight.dtype)
    return original, state


def set_state(layer: nn.Module, cls: type[nn.Module], state: State) -> None:
    """Make ``layer`` a ``cls`` with exactly these attributes."""
    layer.__class__ = cls
    vars(layer).clear()
    vars(layer).update(state)


def _scope_options(cls: type[SmallBatchNorm], original: type[_BatchNorm], before: State, options: State) -> State:
    """Options that keep the ranks with which the old layer synchronizes, unless ``options`` name others."""
    if options.get("sync") is False or any(options.get(k) is not None for k in ("process_group", "sync_group_size")):
        return {}
    if issubclass(original, nn.SyncBatchNorm):
        scope = Scope() if before["process_group"] is None else before["process_group"].scope
    else:
        scope = before["scope"] if issubclass(original, SmallBatchNorm) else None
    if scope is None:
        return {}
    found: State = {"process_group": scope.ranks, "sync_group_size": scope.sync_group_size}
    return found | ({"sync": True} if "sync" in options_of(cls) else {})


_ACTIVATIONS: dict[type | None, ActivationName] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}


def _own_activation(layer: nn.Module, save: str) -> State:
    """The options with which ``layer``, one of timm's, applies its activation itself; empty if it cannot.

    It cannot if ``act`` or ``drop`` has a hook or a ``forward`` of its own, which would not be called.
    """
    drop, act = getattr(layer, "drop", None), getattr(layer, "act", None)
    drops = drop is not None and not (type(drop) is nn.Identity and _is_plain(drop))
    if drops or type(act) not in _ACTIVATIONS or not _is_plain(act):
        return {}
    found: State = {"activation": _ACTIVATIONS[type(act)]}
    if isinstance(act, nn.LeakyReLU):
        found["negative_slope"] = act.negative_slope
    invertible = found.get("negative_slope", 0) > 0
    return found if invertible or save == "input" else {}


def _is_plain(module: Any) -> bool:
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return not any(vars(module).get(name) for name in ("forward", *hooks))


class RememberedGroup:
    """The process group of a converted ``nn.SyncBatchNorm``. Copies have the same group; pickles have its ranks."""

    def __init__(self, scope: Scope, group: Any = None) -> None:
        self.scope, self._group = scope, group

    def __deepcopy__(self, memo: Any) -> RememberedGroup:
        return self

    def __reduce__(self) -> Any:
        return RememberedGroup, (self.scope,)

    def group(self) -> Any:
        """The group. After unpickling it is looked up or made, which all of its ranks must do."""
        if self._group is None:
            ranks = list(self.scope.ranks or ())
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError(
                    f"its process group of ranks {ranks} needs torch.distributed.init_process_group(...) first"
                )
            # resolve() has no group for a process alone, but nn.SyncBatchNorm takes None for the world.
            self._group = resolve(self.scope) or dist.new_group(ranks, use_local_synchronization=True)
        return self._group
