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
from syncbn.domain_statistics import domains_of
from syncbn.drop_act import drop_then_act, own_activation
from syncbn.frozen_batchnorm import Frozen, State, frozen_again, is_frozen, thawed
from syncbn.layers import BatchRenorm, GhostBatchNorm, SmallBatchNorm, SyncBatchNorm

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


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_KNOWN = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *KINDS.values()))
# By name, because importing timm is slow and optional. SplitBatchNorm2d is not here: it has several sets of statistics.
_TIMMS = "timm.layers.norm_act.BatchNormAct2d"
_KNOWN_BY_NAME: dict[str, After] = {
    _TIMMS: drop_then_act,
    "timm.layers.norm_act.SyncBatchNormAct": drop_then_act,
    **{f"syncbn.norm_act.{name}Act2d": drop_then_act for name in ("SyncBatchNorm", "GhostBatchNorm", "BatchRenorm")},
}
_registered: dict[type, After | None] = {}


# -- the classes of converted layers -----------------------------------------------------------------------------------


def _of_dimension(cls: type[SmallBatchNorm], torchs: type[_BatchNorm]) -> type[SmallBatchNorm]:
    """A subclass of both, under which a converted layer still is an instance of torch's class of its dimension.

    Its ``__name__`` is that of ``cls``, which users know. Its qualified name is that of this module's attribute.
    """
    attributes = {"__module__": __name__, "__qualname__": cls.__name__ + torchs.__name__[-2:], "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, torchs), attributes)


_CONVERTED: dict[tuple[type, type], type[SmallBatchNorm]] = {
    (cls, torchs): _of_dimension(cls, torchs)
    for cls in KINDS.values()
    for torchs in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
globals().update({cls.__qualname__: cls for cls in _CONVERTED.values()})  # where pickles look for them


def converted_class(cls: type[SmallBatchNorm], original: type[_BatchNorm]) -> type[SmallBatchNorm]:
    """The class of an ``original`` that is converted to ``cls``."""
    if any(_full_name(base) == _TIMMS for base in original.__mro__):
        from syncbn.norm_act import WITH_ACTIVATION  # timm is imported already, as there is a layer of it

        return WITH_ACTIVATION[cls]
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
    frozen: Frozen | None = None
    """What the layer was before it became an ``original``, if it was a frozen one."""


def options_of(cls: type[SmallBatchNorm]) -> dict[str, inspect.Parameter]:
    """The arguments of ``cls`` that :func:`syncbn.convert` takes: those that do not follow from the old layer."""
    parameters = inspect.signature(cls).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in _FROM_LAYER}


_FROM_LAYER = frozenset(("num_features", "affine", "track_running_stats", "device", "dtype", "bias"))
_ALL_OPTIONS = frozenset(name for cls in KINDS.values() for name in options_of(cls))
_OF_TORCH = frozenset(vars(nn.BatchNorm1d(1, device="meta"))) - _ALL_OPTIONS
"""The attributes of torch's layers that no option sets."""


def _original_state(layer: nn.Module, eps: float | None = None) -> tuple[type[_BatchNorm], State, Frozen | None]:
    """The class and a copy of the attributes of ``layer``, or those it had before it was converted.

    If it is or was a frozen layer, these are those of a trainable one. ``eps`` is for frozen layers without this
    attribute.
    """
    if is_frozen(layer):
        return thawed(layer, eps)
    state = dict(vars(layer))
    state["_buffers"] = copy.copy(state["_buffers"])  # reverting changes its content
    conversion: Conversion | None = state.get("_conversion")
    if conversion is None:
        if isinstance(layer, nn.SyncBatchNorm) and layer.process_group is not None:
            state["process_group"] = RememberedGroup(make_scope(layer.process_group), layer.process_group)
        return type(layer), state, None  # type: ignore[return-value]
    if type(layer) is not conversion.converted:
        raise ValueError(
            f"its class was changed from {conversion.converted.__name__} after the conversion; undo that first"
        )
    for name in conversion.added:
        state.pop(name, None)
    state.update(conversion.replaced)
    return conversion.original, state, conversion.frozen


def converted_state(layer: nn.Module, cls: type[SmallBatchNorm], name: str | None, options: State) -> State | None:
    """The attributes of ``layer`` as a ``cls``; None if it is one with these options already."""
    original, before, frozen = _original_state(layer, options.get("eps"))
    after, converted = follows(original), converted_class(cls, original)
    kept = {key: before[key] for key in ("eps", "momentum")}
    if issubclass(original, SmallBatchNorm):  # these say what the layer computes, unlike its other options
        kept |= {key: before[key] for key in ("activation", "negative_slope")}
    if after is drop_then_act and not {"activation", "negative_slope"} & options.keys():
        own = own_activation(layer, options.get("save", "input"))
        kept, after = kept | own, None if own else after
    mean: Tensor | None = before["_buffers"]["running_mean"]
    new: Any = cls(
        num_features=before["num_features"],
        affine=False,
        track_running_stats=mean is not None,
        device="meta" if mean is None else mean.device,
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
    added = (*(state.keys() - before.keys()), "_conversion")
    state["_conversion"] = Conversion(original, converted, replaced, added, frozen)
    return state


def reverted_state(layer: nn.Module) -> tuple[type[nn.Module], State]:
    """The class and the attributes with which a converted ``layer`` is what it was."""
    if getattr(layer, "frozen_state", None) is not None:
        raise ValueError("it is frozen, and would be trained again; call syncbn.unfreeze(model) first")
    default = getattr(layer, "default_domain", None)
    if default is not None:
        names = ", ".join(map(repr, (default, *domains_of(layer))))
        raise ValueError(f"it has the domains {names}; choose one with syncbn.domains(model, [{default!r}]) first")
    original, state, frozen = _original_state(layer)
    if isinstance(group := state.get("process_group"), RememberedGroup):
        state["process_group"] = group.group()
    weight = state["_parameters"].get("weight")
    if weight is not None and not issubclass(original, SmallBatchNorm):
        # `half()` leaves a converted layer its wide statistics, which torch's layers cannot use with narrow parameters.
        for name in ("running_mean", "running_var"):
            buffer = state["_buffers"][name]
            if buffer is not None and buffer.dtype.itemsize > weight.dtype.itemsize:
                state["_buffers"][name] = buffer.to(weight.dtype)
    return (original, state) if frozen is None else frozen_again(frozen, state)


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
