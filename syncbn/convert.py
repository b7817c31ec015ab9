"""Change the batch-normalization layers of a model in place, and change them back.

Only the class and the attributes of a layer change, never the object or its tensors: whatever holds on to either, an
optimizer or a hook, does not notice. The new attributes of all layers are computed before any layer is touched, and
nothing that can fail comes after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.convert_layer import State, converted_state, layer_options, reverted_state, set_state
from syncbn.layers import BatchRenorm, GhostBatchNorm, SmallBatchNorm, SyncBatchNorm
from syncbn.registry import is_convertible

M = TypeVar("M", bound=nn.Module)
Kind = Literal["sync", "ghost", "renorm"] | type[SmallBatchNorm]

_KINDS: dict[str, type[SmallBatchNorm]] = {"sync": SyncBatchNorm, "ghost": GhostBatchNorm, "renorm": BatchRenorm}
# Options that every kind has, as they are batch normalization's own.
_COMMON = ("eps", "momentum")

# Wrappers that hold on to the class, the parameters or the code of what they wrap: where each is found once it is
# imported (an object of a class that is not imported cannot exist), and the right order.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "syncbn.{verb}(model) first, then DistributedDataParallel(model)"),
    (
        "torch.nn.parallel",
        "DataParallel",
        "its threads are one process and cannot share statistics. Use DistributedDataParallel with a process for each "
        "GPU: syncbn.{verb}(model) first, then DistributedDataParallel(model)",
    ),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "syncbn.{verb}(model) first, then the FSDP wrapper"),
    ("torch.distributed.fsdp", "FSDPModule", "syncbn.{verb}(model) first, then fully_shard(model)"),
    ("torch._dynamo", "OptimizedModule", "syncbn.{verb}(model) first, then torch.compile(model)"),
    (
        "torch.jit",
        "ScriptModule",
        "its code is fixed. Take the Python model that it was made from, and syncbn.{verb} that",
    ),
)


def convert(
    module: M,
    kind: Kind,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    **options: Any,
) -> M:
    """Make every batch-normalization layer of ``module`` a layer of this package, in place.

    Layers, parameters and buffers stay the same objects: optimizers made before, hooks, shared layers,
    ``requires_grad``, training mode, device and dtype stay as they are, and checkpoints load in both directions. What
    the options do not name is kept from each layer: ``eps``, ``momentum`` (for renorm too, whose paper has 0.01), and
    with whom it synchronizes (an ``nn.SyncBatchNorm`` stays synchronized over its process group whatever the kind;
    ``sync=False`` ends that). Called again with the same kind and options it changes nothing; with others, layers are
    converted from what they were at first.

    Instance norms and frozen layers (torchvision's ``FrozenBatchNorm2d``, timm's ``FrozenBatchNormAct2d``) are no
    ``_BatchNorm`` of torch's and are left alone. A converted layer takes inputs of any number of dimensions.

    timm's ``BatchNormAct2d`` and ``SyncBatchNormAct`` normalize, drop and activate. Where they drop nothing, a
    converted layer applies their ReLU, LeakyReLU or SiLU in its own pass over memory; to replace the activation
    afterwards, :func:`revert` first.

    Args:
        module: a model or a single layer, not yet wrapped by DistributedDataParallel, FSDP, torch.compile or the like.
        kind: ``"sync"``, ``"ghost"`` or ``"renorm"``, or the layer's class.
        where: convert only the layers for which ``where(qualified_name, layer)`` is true.
        options: ``eps``, ``momentum``, and what :class:`~syncbn.SyncBatchNorm`, :class:`~syncbn.GhostBatchNorm` or
            :class:`~syncbn.BatchRenorm` takes, such as ``ghost_batch_size`` or ``sync_group_size``.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: an option that the kind does not have, or a value that cannot be; a wrapper around or in the model;
            a subclass of batch normalization that is not known (see :func:`syncbn.register_batchnorm`); a layer that is
            lazy, parametrized, sharded, or has a ``forward`` of its own. Nothing has been changed then.
    """
    cls = _layer_class(kind)
    _check_options(cls, options)
    _refuse_wrappers(module, "convert")
    states = []
    for layer, name in _chosen_layers(module, where).items():
        with _naming(name, layer, "converted"):
            states.append((name, layer, converted_state(layer, cls, name or None, options)))
    for name, layer, state in states:
        if state is not None:
            set_state(layer, cls, state)
        elif vars(layer)["qualified_name"] is None:  # made by hand and just as wanted: all that it lacks is the name
            vars(layer)["qualified_name"] = name or None
    return module


def revert(module: M) -> M:
    """Undo :func:`convert`, in place: the converted layers of ``module`` get their first class and attributes back.

    Parameters and buffers stay the same objects and keep their values. (One exception: where the model was made
    ``half()`` in between, the statistics, which a converted layer keeps wide, become half as well.) A layer that was
    made as one of this package's is left as it was made. Works on a copy or an unpickled model as well.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: a wrapper around or in the model, a layer whose class was changed after the conversion (by a
            parametrization, say), or one whose process group cannot be had here. Nothing has been changed then.
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


def _chosen_layers(module: nn.Module, where: Callable[[str, nn.Module], bool] | None) -> dict[_BatchNorm, str]:
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and (where is None or where(name, layer)):
            with _naming(name, layer, "converted"):
                _check_layer(layer)
            layers[layer] = name
    return layers


def _layer_class(kind: Any) -> type[SmallBatchNorm]:
    for name, cls in _KINDS.items():
        if kind is cls or kind == name:
            return cls
    raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))} or such a layer's class, got {kind!r}")


def _check_options(cls: type[SmallBatchNorm], options: dict[str, Any]) -> None:
    known = layer_options(cls)
    names = ", ".join((*_COMMON, *known))
    for name, value in options.items():
        if name not in known and name not in _COMMON:
            raise ValueError(f"{cls.__name__} has no option {name!r} (got {name}={value!r}); its options are {names}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{cls.__name__} needs the option {name!r}; its options are {names}")
    eps, momentum = options.get("eps", 1e-5), options.get("momentum", 0.1)
    if not (isinstance(eps, float | int) and eps > 0):
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    if not (momentum is None or (isinstance(momentum, float | int) and 0 <= momentum <= 1)):
        raise ValueError(f"momentum must be a number from 0 to 1, or None for a cumulative average, got {momentum!r}")
    # The layer's own checks of the values, before any layer of the model can be named as the culprit.
    cls(num_features=1, device="meta", **options)


@contextmanager
def _naming(name: str, layer: nn.Module, verb: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_describe(name, layer)} cannot be {verb}: {error}") from error


def _refuse_wrappers(module: nn.Module, verb: str) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"syncbn.{verb} expects a torch.nn.Module, got {module!r}")
    wrappers = [(getattr(sys.modules.get(path), name, None), advice) for path, name, advice in _WRAPPERS]
    for name, child in module.named_modules():
        found = next((advice for cls, advice in wrappers if cls is not None and isinstance(child, cls)), None)
        # Module.compile() compiles in place and leaves the class as it is.
        if found is None and vars(child).get("_compiled_call_impl") is not None:
            found = "syncbn.{verb}(model) first, then model.compile()"
        if found is not None:
            raise ValueError(f"{_describe(name, child)} is wrapped or compiled already: {found.format(verb=verb)}")


def _check_layer(layer: _BatchNorm) -> None:
    """Refuse a layer of which it is not certain that its class and its tensors say all that it does."""
    cls = type(layer)
    if isinstance(layer, LazyModuleMixin):
        raise ValueError("it does not know its number of features yet; run one forward pass first")
    if parametrize.is_parametrized(layer):
        raise ValueError("it is parametrized; convert first and parametrize then, or remove the parametrizations")
    if "forward" in vars(layer):
        raise ValueError(
            "its forward was replaced on the instance, which the conversion would bypass; delete that first"
        )
    if "_conversion" not in vars(layer) and not is_convertible(cls):
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__} is a subclass that may do more than normalize. Say what with "
            f"syncbn.register_batchnorm({cls.__name__}, after), or leave the layer out with where=..."
        )
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if sharded is not None and any(isinstance(p, sharded) for p in layer.parameters(recurse=False)):
        raise ValueError("its parameters are sharded; convert first, then fully_shard(model) or parallelize it")
    if layer.running_mean is not None and layer.num_batches_tracked is None:
        raise ValueError("it has running statistics and no num_batches_tracked; set that to torch.tensor(0)")


def _describe(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} '{name}'" if name else f"the given {type(module).__name__}"
