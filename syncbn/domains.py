"""Running statistics of their own for each kind of data that a model is trained on, with shared weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.domain_statistics import AFFINE, BUFFERS, PREFIX, DomainStatistics, domains_of
from syncbn.layers import SmallBatchNorm

M = TypeVar("M", bound=nn.Module)


def domains(model: M, names: Sequence[str], *, affine: bool = False) -> M:
    """Give each layer of ``model`` running statistics for each of the domains ``names``, in place.

    A domain is a kind of data, such as the images of one camera or adversarial examples. If batches of several kinds
    are trained on in turn, one set of running statistics fits none of them. :func:`domain` chooses the domain whose
    statistics a forward pass uses and updates. This is domain-specific batch normalization (Chang et al. 2019, arXiv
    1906.03950, section 3) and the auxiliary batch normalization of AdvProp (Xie et al. 2020, arXiv 1911.09665, section
    4.2).

    The first domain is the default. Its statistics are the layer's own buffers, so that checkpoints of it have
    BatchNorm's keys; those of another domain have the keys ``domain_NAME.running_mean`` and so on. A new domain starts
    with the values of the default. So do all domains if a checkpoint without domains is loaded.

    Afterwards the model has exactly these domains. Call it again to add some, to leave some out, or to make another one
    the default. With one name, the layers are plain again and have that domain's statistics.

    ``num_nonfinite_batches`` counts the batches of all domains together.

    Args:
        model: a model whose batch normalizations are layers of this package. Layers without running statistics need no
            domains and stay as they are.
        names: names of the domains, without dots.
        affine: whether each domain has its own ``weight`` and ``bias`` as well, as in both papers. Then call this
            before the optimizer is made and before the model is wrapped; under DistributedDataParallel, a step that
            leaves out a domain needs ``find_unused_parameters=True``. If False, the domains share them.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``names`` are no distinct names; the model has no layer with running statistics, or has one of
            torch's; it is within :func:`domain`; or its parameters are frozen and domains are to have their own. The
            model is unchanged then.

    Example:
        >>> import syncbn
        >>> model = syncbn.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "sync")
        >>> model = domains(model, ["clean", "adversarial"])
        >>> with syncbn.domain(model, "adversarial"):
        ...     y = model(torch.randn(16, 4))
        >>> model[1].num_batches_tracked.item(), model[1].domain_adversarial.num_batches_tracked.item()
        (0, 1)
    """
    _check_names(names)
    for layer in _layers(model, affine):
        set_domains(layer, names, affine)
    return model


def _layers(model: nn.Module, affine: bool) -> list[SmallBatchNorm]:
    """The layers of ``model`` that can have domains; ValueError for one that needs them and cannot."""
    layers = []
    for path, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None:
            continue
        if not isinstance(layer, SmallBatchNorm):
            problem = "is no layer of this package; call syncbn.convert(model, ...) first"
            raise ValueError(f"domains: {type(layer).__name__} {path!r} {problem}")
        if layer.num_batches_tracked is None:
            raise ValueError(f"domains: layer {path!r} has no num_batches_tracked; set it to torch.tensor(0)")
        if layer.active_domain is not None:
            within = layer.active_domain.domain
            raise ValueError(f"domains: the model is in the domain {within!r}; leave its context first")
        if affine and layer.frozen_state is not None and layer.frozen_state.parameters:
            raise ValueError(f"domains: the parameters of layer {path!r} are frozen; call syncbn.unfreeze(model) first")
        layers.append(layer)
    if not layers:
        raise ValueError("domains: the model has no layer of this package with running statistics")
    return layers


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Within this context the layers of ``model`` use and update the running statistics of the domain ``name``.

    Outside of it they use those of the default domain. Contexts may be nested; the innermost holds, and each restores
    what was before, also after an exception. All that works with running statistics works with those of the domain:
    training, evaluation, :func:`syncbn.update_population_statistics`, :func:`syncbn.accumulate_statistics`,
    :func:`syncbn.fold`. A checkpoint has all domains, and a copy begins in the default domain, whatever the context.

    All ranks that share statistics have to be in the same domain: the checks that notice a different layer notice a
    different domain too. The backward pass may run outside. Activation checkpointing, which runs the forward pass
    again, needs :func:`syncbn.checkpoint_contexts`.

    Args:
        model: a model with domains, wrapped or not, or a part of one.
        name: one of its domains.

    Raises:
        ValueError: the model has no such domain, or the statistics of several passes are being collected (see
            :func:`syncbn.accumulate_statistics`): enter the domain first.

    Example:
        >>> import syncbn
        >>> model = syncbn.domains(syncbn.BatchRenorm(4), ["day", "night"])
        >>> with domain(model, "night"):
        ...     y = model(torch.randn(16, 4))
    """
    chosen: list[tuple[SmallBatchNorm, DomainStatistics | None, DomainStatistics | None]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, SmallBatchNorm) or layer.default_domain is None:
            continue
        held = domains_of(layer)
        if name != layer.default_domain and name not in held:
            known = ", ".join(map(repr, (layer.default_domain, *held)))
            raise ValueError(f"domain: expected one of {known}, got {name!r} (layer {path!r})")
        wanted = held.get(name)
        if wanted is not layer.active_domain and layer.observer is not None:
            remedy = "enter the domain first, and collect those of each domain by themselves"
            raise ValueError(f"domain: statistics of several passes are being collected here; {remedy}")
        chosen.append((layer, layer.active_domain, wanted))
    if not chosen:
        raise ValueError(f"domain: the model has no domains, got {name!r}; call syncbn.domains(model, [...]) first")
    try:
        for layer, _, wanted in chosen:
            layer.use_domain(wanted)
        yield
    finally:
        for layer, before, _ in chosen:
            layer.use_domain(before)


def _check_names(names: Any) -> None:
    given = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    right = all(isinstance(name, str) and name and "." not in name for name in given)
    if not given or not right or len(set(given)) != len(given):
        raise ValueError(f"domains: expected a list of different names without dots, got {names!r}")


@torch.no_grad()
def set_domains(layer: SmallBatchNorm, names: Sequence[str], affine: bool) -> None:
    """Give ``layer`` exactly these domains."""
    held = domains_of(layer)
    values = {name: _values(layer, held.get(name)) for name in names}
    for name in held:
        delattr(layer, PREFIX + name)
    for name in names[1:]:
        kept = held.get(name)
        if kept is None or kept.has_affine != affine:
            kept = DomainStatistics(name, layer, affine)
        layer.add_module(PREFIX + name, kept)
        _write(values[name], kept)
    _write(values[names[0]], layer)
    if len(names) > 1:
        layer.default_domain = names[0]
    else:
        vars(layer).pop("default_domain", None)


def _values(layer: SmallBatchNorm, held: DomainStatistics | None) -> dict[str, Tensor | None]:
    """Copies of what ``layer`` computes with in a domain; None is the default one."""
    statistics, parameters = held or layer, held if held is not None and held.has_affine else layer
    tensors = [(name, getattr(statistics, name)) for name in BUFFERS]
    tensors += [(name, getattr(parameters, name)) for name in AFFINE]
    return {name: None if tensor is None else tensor.clone() for name, tensor in tensors}


def _write(values: dict[str, Tensor | None], to: nn.Module) -> None:
    for name, value in values.items():
        if value is not None and hasattr(to, name):
            getattr(to, name).copy_(value)
