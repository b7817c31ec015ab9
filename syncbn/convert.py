"""Change the batch-normalization layers of a model in place, and change them back.

Only the class and the attributes of a layer change, never the object or its tensors, so optimizers and hooks keep
working. The new attributes of all layers are computed before any layer is changed, and nothing after that can fail.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Required, TypedDict, TypeVar, Unpack, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.convert_layer import KINDS, converted_state, is_convertible, options_of, reverted_state, set_state
from syncbn.frozen_batchnorm import State, is_frozen
from syncbn.functional.epilogue import ActivationName
from syncbn.functional.running import RunningUpdate
from syncbn.layers import BatchRenorm, GhostBatchNorm, Remainder, Save, SmallBatchNorm, SyncBatchNorm

M = TypeVar("M", bound=nn.Module)
Where = Callable[[str, nn.Module], bool] | None
Sync = Literal["sync"] | type[SyncBatchNorm]
Ghost = Literal["ghost"] | type[GhostBatchNorm]
Renorm = Literal["renorm"] | type[BatchRenorm]


class _Options(TypedDict, total=False):
    eps: float
    momentum: float | None
    process_group: Any
    sync_group_size: int | None
    activation: ActivationName | None
    negative_slope: float
    save: Save


class SyncOptions(_Options, total=False):
    """Options of ``convert(model, "sync")``; see :class:`syncbn.SyncBatchNorm`."""


class GhostOptions(_Options, total=False):
    """Options of ``convert(model, "ghost")``; see :class:`syncbn.GhostBatchNorm`."""

    ghost_batch_size: Required[int]
    remainder: Remainder
    running_update: RunningUpdate
    sync: bool
    max_ghost_groups: int | None


class RenormOptions(_Options, total=False):
    """Options of ``convert(model, "renorm")``; see :class:`syncbn.BatchRenorm`."""

    r_max: float
    d_max: float
    warmup_steps: int
    r_ramp_end: int
    d_ramp_end: int
    sync: bool
    ghost_batch_size: int | None
    remainder: Remainder
    max_ghost_groups: int | None


# Wrappers that hold the class, the parameters or the code of what they wrap, with what to do instead. Their modules are
# slow to import, and a module that is not imported has no instances.
_WRAPPERS = {
    "torch.nn.parallel.DistributedDataParallel": "{first}, then DistributedDataParallel(model){inner}",
    "torch.nn.parallel.DataParallel": "its threads are one process and cannot share statistics. Use "
    "DistributedDataParallel with a process for each GPU: {first}, then DistributedDataParallel(model){inner}",
    "torch.distributed.fsdp.FullyShardedDataParallel": "{first}, then the FSDP wrapper",
    "torch.distributed.fsdp.FSDPModule": "{first}, then fully_shard(model)",
    "torch._dynamo.OptimizedModule": "{first}, then torch.compile(model)",
    "torch.jit.ScriptModule": "its code is fixed. Take the Python model: {first}, then script it",
}


@overload
def convert(
    module: M, kind: Sync, *, where: Where = None, frozen: bool = False, **options: Unpack[SyncOptions]
) -> M: ...
@overload
def convert(
    module: M, kind: Ghost, *, where: Where = None, frozen: bool = False, **options: Unpack[GhostOptions]
) -> M: ...
@overload
def convert(
    module: M, kind: Renorm, *, where: Where = None, frozen: bool = False, **options: Unpack[RenormOptions]
) -> M: ...
def convert(module: M, kind: Any, *, where: Where = None, frozen: bool = False, **options: Any) -> M:
    """Make every batch-normalization layer of ``module`` a layer of this package, in place.

    Layers, parameters and buffers stay the same objects. Optimizers, hooks, shared layers, ``requires_grad``, training
    mode, device and dtype are not affected, and checkpoints load in both directions. Each layer keeps its own ``eps``
    and ``momentum`` (also for ``"renorm"``, whose paper uses 0.01) unless the options name them. An
    ``nn.SyncBatchNorm`` stays synchronized over its process group whatever the kind, unless ``sync=False``.

    Calling it again with the same kind and options changes nothing. With others, layers are converted from what they
    were at first. Instance norms stay as they are. If no layer is converted, a warning says so. A converted
    ``nn.BatchNorm2d`` still is an instance of that class, for code that looks for it; so are 1-D and 3-D layers.

    timm's ``BatchNormAct2d`` and ``SyncBatchNormAct`` keep their dropout and activation. A ReLU, LeakyReLU or SiLU
    without dropout is applied in the same pass over memory; to replace it afterwards, :func:`revert` first.

    Args:
        module: a model or a single layer. Convert it before wrapping it with DistributedDataParallel, FSDP or
            torch.compile.
        kind: ``"sync"``, ``"ghost"`` or ``"renorm"``, or the class of the layer.
        where: convert only the layers for which ``where(qualified_name, layer)`` is true.
        frozen: make frozen layers, such as torchvision's, detectron2's and timm's, trainable ones with the same numbers
            and a momentum of 0.1. Make the optimizer afterwards. DETR's, whose ``eps`` is not known, need the option.
        options: ``eps``, ``momentum`` and the options of :class:`~syncbn.SyncBatchNorm`,
            :class:`~syncbn.GhostBatchNorm` or :class:`~syncbn.BatchRenorm`, such as ``ghost_batch_size``.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: the kind has no such option or it has a wrong value; ``module`` is wrapped or contains a wrapper; a
            layer's class is an unknown subclass of batch normalization (see :func:`syncbn.register_batchnorm`); a
            layer is lazy, parametrized, sharded, or has a ``forward`` of its own; or a frozen layer does more than
            normalize. The model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> model = convert(model, "ghost", ghost_batch_size=4)
        >>> type(model[1]).__name__, model[1].ghost_batch_size
        ('GhostBatchNorm', 4)
    """
    cls = next((cls for name, cls in KINDS.items() if kind in (name, cls)), None)
    if cls is None:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))} or such a layer's class, got {kind!r}")
    _check_options(cls, options)
    _refuse_wrappers(module, "convert")
    states = []
    for name, layer in module.named_modules():
        found = isinstance(layer, _BatchNorm) or (frozen and is_frozen(layer))
        if found and (where is None or where(name, layer)):
            with _naming(name, layer, "converted"):
                _check_layer(layer)
                states.append((name, layer, converted_state(layer, cls, name or None, options)))
    _warn_of_what_stays(module, [layer for _, layer, _ in states], where is not None, frozen)
    for name, layer, state in states:
        if state is not None:
            set_state(layer, state["_conversion"].converted, state)
        elif isinstance(layer, SmallBatchNorm) and layer.qualified_name is None:
            layer.qualified_name = name or None
    return module


def revert(module: M) -> M:
    """Undo :func:`convert`, in place: converted layers get back their first class and attributes.

    Parameters and buffers stay the same objects and keep their values. There are two exceptions: the statistics of a
    converted layer stay float32 in ``half()``, and become half when the layer is reverted; and a layer that was frozen
    is frozen again, so that its parameters become buffers with the trained values, without gradients. Layers that were
    made as one of this package's stay as they were made. It also works on copies and unpickled models.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: ``module`` is wrapped or contains a wrapper; a converted layer is frozen (:func:`syncbn.freeze`) or
            has domains (:func:`syncbn.domains`); its class was changed after the conversion (such as by a
            parametrization); or the process group of an unpickled layer does not exist here. The model is
            unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(revert(convert(model, "sync"))[1]).__name__
        'BatchNorm2d'
    """
    _refuse_wrappers(module, "revert")
    states: list[tuple[nn.Module, type[nn.Module], State]] = []
    for name, layer in module.named_modules():
        if "_conversion" in vars(layer):
            with _naming(name, layer, "reverted"):
                states.append((layer, *reverted_state(layer)))
    for changed, first, state in states:
        set_state(changed, first, state)
    return module


def _check_options(cls: type[SmallBatchNorm], options: dict[str, Any]) -> None:
    known = options_of(cls)
    names = ", ".join(known)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{cls.__name__} has no option {name!r} (got {name}={value!r}); its options are {names}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{cls.__name__} needs the option {name!r}; its options are {names}")
    momentum = options.get("momentum", 0.1)
    if not (momentum is None or (isinstance(momentum, float | int) and 0 <= momentum <= 1)):
        raise ValueError(f"momentum must be a number from 0 to 1, or None for a cumulative average, got {momentum!r}")
    cls(num_features=1, device="cpu", **options)  # a wrong value raises here, before an error could blame a layer


def _warn_of_what_stays(module: nn.Module, found: list[nn.Module], selected: bool, frozen: bool) -> None:
    """Say that no layer was found and which may have been meant, or that frozen ones stay frozen."""
    if not found:
        kinds = Counter(type(m).__name__ for m in module.modules() if "norm" in type(m).__name__.lower())
        names = ", ".join(f"{number} {name}" for name, number in kinds.items())
        other = f"; it has {names}, which stay as they are" if names else ""
        left_out = ", or `where` leaves all of them out" if selected else ""
        has_frozen = not frozen and any(is_frozen(m) for m in module.modules())
        remedy = "; frozen=True makes the frozen ones trainable layers" if has_frozen else ""
        said = f"syncbn.convert has changed nothing: the model has no batch normalization{left_out}{other}{remedy}"
        warnings.warn(said, UserWarning, stacklevel=3)
    if frozen and any(layer.frozen_state is not None for layer in found if isinstance(layer, SmallBatchNorm)):
        said = (
            "frozen=True is about frozen classes; layers frozen by syncbn.freeze stay so until syncbn.unfreeze(model)"
        )
        warnings.warn(f"syncbn.convert: {said}", UserWarning, stacklevel=3)


@contextmanager
def _naming(name: str, layer: nn.Module, verb: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_describe(name, layer)} cannot be {verb}: {error}") from error


def _refuse_wrappers(module: nn.Module, verb: str) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"syncbn.{verb} expects a torch.nn.Module, got {module!r}")
    wrappers = {_imported(path): advice for path, advice in _WRAPPERS.items()}
    for name, child in module.named_modules():
        found = [advice for cls, advice in wrappers.items() if cls is not None and isinstance(child, cls)]
        if vars(child).get("_compiled_call_impl") is not None:  # compiled in place, class unchanged
            found.append("{first}, then model.compile()")
        if found:
            inner = "; the model in the wrapper is its attribute .module" if verb == "revert" else ""
            advice = found[0].format(first=f"syncbn.{verb}(model) first", inner=inner)
            raise ValueError(f"{_describe(name, child)} is wrapped or compiled already: {advice}")


def _imported(path: str) -> Any:
    """The class of this name, or None if its module is not imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _check_layer(layer: nn.Module) -> None:
    """Refuse a layer that may do more than its class and tensors say."""
    cls = type(layer)
    if isinstance(layer, LazyModuleMixin):
        raise ValueError("it does not know its number of features yet; run one forward pass first")
    if parametrize.is_parametrized(layer):
        raise ValueError("it is parametrized; convert first and parametrize then, or remove the parametrizations")
    if "forward" in vars(layer):
        raise ValueError("its forward was replaced on the instance and would not be called; delete it first")
    if isinstance(layer, _BatchNorm) and "_conversion" not in vars(layer) and not is_convertible(cls):
        if cls.__name__ == "SplitBatchNorm2d":  # timm's
            raise ValueError("it has several sets of statistics; convert the model without them, then syncbn.domains")
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__} is a subclass that may do more than normalize. Say what it does with "
            f"syncbn.register_batchnorm({cls.__name__}, after), or leave the layer out with where=..."
        )
    sharded = _imported("torch.distributed.tensor.DTensor")
    if sharded is not None and any(isinstance(p, sharded) for p in layer.parameters(recurse=False)):
        raise ValueError("its parameters are sharded; convert first, then fully_shard(model) or parallelize it")
    if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.num_batches_tracked is None:
        raise ValueError("it has running statistics and no num_batches_tracked; set that to torch.tensor(0)")


def _describe(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} '{name}'" if name else f"the given {type(module).__name__}"
