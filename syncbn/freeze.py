"""Frozen layers: they normalize by their running statistics, which stay as they are."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.domain_statistics import AFFINE, holders
from syncbn.layers import Frozen, SmallBatchNorm

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, affine: bool = False) -> M:
    """Make the layers of ``model`` normalize by their running statistics from now on, in place.

    This is usual when a pretrained network is fine-tuned on batches that are too small for good statistics. A frozen
    layer stays in evaluation mode: ``train()`` leaves it there, and nothing updates its running statistics, neither
    ``torch.optim.swa_utils.update_bn`` nor :func:`syncbn.update_population_statistics`. It never communicates. For
    :class:`~syncbn.BatchRenorm`, the number of steps stands still too. Copies and pickles are frozen as well; a
    ``state_dict`` is not, so call this again when a model is made anew.

    Freezing again replaces what was asked before. Freeze a part of a model by giving that part.

    Args:
        model: a model whose batch normalizations are layers of this package. Layers that are frozen by their class,
            such as torchvision's ``FrozenBatchNorm2d``, stay as they are.
        affine: freeze ``weight`` and ``bias`` too, as ``FrozenBatchNorm2d`` does: they no longer need gradients, and
            those that they have are dropped, so that no optimizer changes them. Do this before wrapping the model with
            DistributedDataParallel, which expects a gradient for each parameter that it found. If False, they are
            trained.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a layer has no running statistics, or is one of torch's; or there is no layer. The model is
            unchanged then.

    Example:
        >>> import syncbn, torch
        >>> model = syncbn.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "sync")
        >>> model = freeze(model).train()
        >>> x = torch.randn(16, 4)
        >>> torch.equal(model(x), model.eval()(x)), int(model[1].num_batches_tracked)
        (True, 0)
    """
    layers = []
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, SmallBatchNorm):
            remedy = "call syncbn.convert(model, ...) first"
            raise ValueError(f"freeze: {type(layer).__name__} {name!r} is no layer of this package; {remedy}")
        if layer.running_mean is None:
            raise ValueError(f"freeze: layer {name!r} has no running statistics; make it with track_running_stats=True")
        layers.append(layer)
    if not layers:
        raise ValueError("freeze: the model has no layer of this package; call syncbn.convert(model, ...) first")
    for layer in layers:
        _unfreeze(layer)
        stopped = _stop_training(layer) if affine else ()
        layer.frozen_state, layer.training = Frozen(layer.training, stopped), False
    return model


def unfreeze(model: M) -> M:
    """Undo :func:`freeze`, in place.

    Layers are in the mode that the last ``train()`` or ``eval()`` asked for, and parameters that were frozen need
    gradients again. Layers that are not frozen stay as they are.

    Returns:
        ``model`` itself.

    Example:
        >>> import syncbn
        >>> unfreeze(freeze(syncbn.SyncBatchNorm(4))).training
        True
    """
    for layer in model.modules():
        if isinstance(layer, SmallBatchNorm):
            _unfreeze(layer)
    return model


def _stop_training(layer: SmallBatchNorm) -> tuple[str, ...]:
    """Freeze the weights and biases of ``layer``; the names of those that were trained."""
    stopped = []
    for prefix, holder in holders(layer):
        for name, parameter in holder.named_parameters():
            own = name in AFFINE or name.startswith("parametrizations.")
            if own and parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None  # an optimizer would go on with the old one
                stopped.append(prefix + name)
    return tuple(stopped)


def _unfreeze(layer: SmallBatchNorm) -> None:
    if layer.frozen_state is None:
        return
    parameters = dict(layer.named_parameters())
    for name in layer.frozen_state.parameters:
        if name in parameters:
            parameters[name].requires_grad_()
    layer.training = layer.frozen_state.training
    del layer.frozen_state
