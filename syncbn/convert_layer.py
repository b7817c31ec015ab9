"""A layer's class and attributes, changed and changed back. What :mod:`syncbn.convert` does to one layer."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import Scope, make_scope, resolve
from syncbn.functional.epilogue import ActivationName
from syncbn.layers import SmallBatchNorm
from syncbn.registry import after_of, drop_then_act

State = dict[str, Any]
"""The attributes of a layer, as in ``vars(layer)``."""

_COUNTER = "num_nonfinite_batches"
# What a layer is given or collects once it is configured. It does not make it another layer.
_NOT_SETTINGS = frozenset(("sample_groups", "qualified_name", "after", "observer"))
_ABSENT = object()


def layer_options(cls: type) -> dict[str, inspect.Parameter]:
    """What layers of class ``cls`` can be configured with, their base's options too where the class hands them on."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "_configure" in vars(base):
            parameters = inspect.signature(vars(base)["_configure"]).parameters
            found |= {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return found


def original_state(layer: nn.Module) -> tuple[type[_BatchNorm], State]:
    """The class and a copy of the attributes that ``layer`` has, or had before it was converted.

    Raises:
        ValueError: the class was changed after the conversion, or a process group is none that this process knows.
    """
    state = dict(vars(layer))
    # A conversion adds to these two containers; the other ones stay the layer's own.
    state["_buffers"] = dict(state["_buffers"])
    state["_non_persistent_buffers_set"] = set(state["_non_persistent_buffers_set"])
    conversion: Conversion | None = state.get("_conversion")
    if conversion is None:
        if isinstance(layer, nn.SyncBatchNorm) and layer.process_group is not None:
            state["process_group"] = remember(layer.process_group)
        return type(layer), state  # type: ignore[return-value]
    if type(layer) is not conversion.converted:
        raise ValueError(
            f"its class was changed from {conversion.converted.__name__} after the conversion; undo that first"
        )
    for name in conversion.added:
        state.pop(name, None)
    state.update(conversion.replaced)
    if conversion.added_counter:
        state["_buffers"].pop(_COUNTER, None)
        state["_non_persistent_buffers_set"].discard(_COUNTER)
    return conversion.original, state


def converted_state(
    layer: nn.Module, cls: type[SmallBatchNorm], name: str | None, options: dict[str, Any]
) -> State | None:
    """The attributes of ``layer`` as a ``cls``, with the record that undoes them; None where it is just that already.

    ``layer`` itself is not touched. The conversion runs on a stand-in that has its attributes, so that what can fail,
    the change of class included, fails here.

    Raises:
        ValueError: the layer cannot be a ``cls`` with these options.
    """
    original, before = original_state(layer)
    probe: Any = object.__new__(original)
    dropped = {"process_group", *layer_options(original)}
    vars(probe).update((key, value) for key, value in original_state(layer)[1].items() if key not in dropped)
    probe.__class__ = cls
    # What a layer of this package computes is kept, as opposed to how and over which samples.
    own: dict[str, Any] = {key: before[key] for key in ("activation", "negative_slope") if key in before}
    after = after_of(original)
    if after is drop_then_act and not {"activation", "negative_slope"} & options.keys():
        applied = _own_activation(layer, options.get("save", "input"))
        own, after = own | applied, None if applied else after
    own |= {key: value for key, value in options.items() if key not in ("eps", "momentum")}
    probe._configure(**{**own, **_scope_options(cls, before, options)})
    for key in ("eps", "momentum"):
        vars(probe)[key] = options.get(key, before[key])
    probe.qualified_name = name
    probe.after = after
    if (counter := layer._buffers.get(_COUNTER)) is not None:
        probe._buffers[_COUNTER] = counter

    state = vars(probe)
    state["_conversion"] = conversion = _record(original, cls, before, state)
    names = {*conversion.replaced, *conversion.added}
    if (last := vars(layer).get("_conversion")) is not None:
        names |= {*last.replaced, *last.added}
    settings = [key for key in names if not (key.startswith("_") or key in _NOT_SETTINGS)]
    unchanged = type(layer) is cls and all(vars(layer).get(k, _ABSENT) == state.get(k, _ABSENT) for k in settings)
    return None if unchanged else state


def reverted_state(layer: nn.Module) -> tuple[type[_BatchNorm], State]:
    """The class and the attributes with which a converted ``layer`` is again what it was.

    Raises:
        ValueError: as :func:`original_state`; or its process group cannot be had here.
    """
    original, state = original_state(layer)
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


def _record(original: type[_BatchNorm], cls: type[SmallBatchNorm], before: State, after: State) -> Conversion:
    containers = ("_buffers", "_non_persistent_buffers_set")
    return Conversion(
        original,
        cls,
        replaced={k: v for k, v in before.items() if k not in containers and after.get(k, _ABSENT) is not v},
        added=(*(after.keys() - before.keys()), "_conversion"),
        added_counter=_COUNTER in after["_buffers"] and _COUNTER not in before["_buffers"],
    )


def _scope_options(cls: type[SmallBatchNorm], before: State, options: dict[str, Any]) -> dict[str, Any]:
    """What makes a ``cls`` synchronize with whom the original does, where the options do not say."""
    if options.get("sync") is False or any(options.get(k) is not None for k in ("process_group", "sync_group_size")):
        return {}
    if "process_group" in before:
        group: RememberedGroup | None = before["process_group"]
        scope: Scope | None = Scope() if group is None else Scope(ranks=group.ranks)
    else:
        scope = before.get("scope")
    if scope is None:
        return {}
    found: dict[str, Any] = {"process_group": scope.ranks, "sync_group_size": scope.sync_group_size}
    return found | ({"sync": True} if "sync" in layer_options(cls) else {})


def _own_activation(layer: nn.Module, save: str) -> dict[str, Any]:
    """The options with which ``layer``, one of timm's, applies its activation itself; none if that is not certain.

    A hook or a ``forward`` set on the activation, or anything that is dropped, would be bypassed.
    """
    drop, act = getattr(layer, "drop", None), getattr(layer, "act", None)
    if type(act) not in _ACTIVATIONS or not _is_plain(act) or not (drop is None or _is_identity(drop)):
        return {}
    slope = act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0
    if not (isinstance(slope, float | int) and math.isfinite(slope)) or (save == "output" and slope <= 0):
        return {}
    return {"activation": _ACTIVATIONS[type(act)]} | (
        {"negative_slope": slope} if isinstance(act, nn.LeakyReLU) else {}
    )


def _is_identity(module: Any) -> bool:
    return type(module) is nn.Identity and _is_plain(module)


def _is_plain(module: Any) -> bool:
    """Whether a call of ``module`` does what its class does, and no more."""
    return not any(vars(module).get(name) for name in ("forward", *_HOOKS))


_ACTIVATIONS: dict[type | None, ActivationName] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def remember(group: Any) -> RememberedGroup:
    """A process group as a converted layer keeps it."""
    try:
        scope = make_scope(group)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"its process_group {group!r} is none that this process is in now; set it to None or to such a group"
        ) from error
    assert scope.ranks is not None
    return RememberedGroup(scope.ranks, group)


@dataclass(frozen=True, eq=False)
class Conversion:
    """What undoes a conversion. Kept on the layer as ``_conversion``; plain data that is copied and pickled with it."""

    original: type[_BatchNorm]
    converted: type[SmallBatchNorm]
    replaced: State
    """Attributes that were replaced or removed, with their values."""
    added: tuple[str, ...]
    """Names of the attributes that are new."""
    added_counter: bool
    """Whether the buffer ``num_nonfinite_batches`` is new."""


class RememberedGroup:
    """The process group of an ``nn.SyncBatchNorm``: itself where it was made, its ranks where it is unpickled."""

    def __init__(self, ranks: tuple[int, ...], group: Any = None) -> None:
        self.ranks = ranks
        self._group = group

    def __deepcopy__(self, memo: Any) -> RememberedGroup:
        return self

    def __reduce__(self) -> Any:
        return RememberedGroup, (self.ranks,)

    def group(self) -> Any:
        """The group. Unpickled, it is looked up or made, and all its ranks must ask for it.

        Raises:
            ValueError: there are no process groups yet, or this process is not among the ranks.
        """
        if self._group is None:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError(
                    f"its process group of ranks {self.ranks} needs torch.distributed.init_process_group(...) first"
                )
            # A process alone in its group has none for resolve(), but None is the world for nn.SyncBatchNorm.
            self._group = resolve(Scope(ranks=self.ranks)) or dist.new_group(
                list(self.ranks), use_local_synchronization=True
            )
        return self._group
