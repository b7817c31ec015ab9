"""What a layer keeps for one more domain: running statistics and, if asked, a weight and a bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

PREFIX = "domain_"
"""A layer has the statistics of the domain ``adversarial`` as its submodule ``domain_adversarial``."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")


class DomainStatistics(nn.Module):
    """The buffers of a batch normalization, as copies of another's, in place of a layer's own in one domain."""

    running_mean: Tensor
    """(C,), float32 or wider."""
    running_var: Tensor
    """(C,), float32 or wider."""
    num_batches_tracked: Tensor
    """() int64."""

    def __init__(self, domain: str, source: Any, has_affine: bool) -> None:
        super().__init__()
        self.domain, self.has_affine = domain, has_affine
        for name in BUFFERS:
            self.register_buffer(name, getattr(source, name).clone())
        for name in AFFINE if has_affine else ():
            value = getattr(source, name)
            own = None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
            self.register_parameter(name, own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with kept_wide(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_running_stats(self) -> None:
        """Give the buffers the values of a new layer."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give buffers and parameters the values of a new layer, as what makes a model from the meta device does."""
        self.reset_running_stats()
        for name, parameter in self.named_parameters():
            parameter.fill_(name == "weight")

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, has_affine={self.has_affine}"


@contextmanager
def kept_wide(module: nn.Module) -> Iterator[None]:
    """Running statistics of ``module`` that are narrowed in this context get back their dtype and values.

    A moving average in bf16 soon stops moving, so that ``module.half()`` must not narrow them.
    """
    before = {name: getattr(module, name) for name in ("running_mean", "running_var")}
    yield
    for name, old in before.items():
        new = getattr(module, name)
        if new is not None and new.dtype.itemsize < 4 <= old.dtype.itemsize:
            setattr(module, name, old.to(new.device))


def domains_of(layer: nn.Module) -> dict[str, DomainStatistics]:
    """What a layer holds besides its own statistics, by domain."""
    return {child.domain: child for child in layer.children() if isinstance(child, DomainStatistics)}


def holders(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules with running statistics of a layer, with the prefix of their names in its state: itself first."""
    yield "", layer
    for domain, held in domains_of(layer).items():
        yield f"{PREFIX}{domain}.", held


def add_missing_domains(layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Add to a checkpoint that knows no domain of this layer what the layer's domains start from: its own values."""
    held = domains_of(layer)
    if any(key.startswith(prefix + PREFIX) for key in state_dict):
        return
    for domain, statistics in held.items():
        for name in statistics.state_dict():
            value = state_dict.get(prefix + name)
            if value is None and name == "num_batches_tracked":  # a checkpoint of before torch 0.4.1
                value = torch.tensor(0)
            if value is not None:
                # With load_state_dict(assign=True) a tensor of the checkpoint becomes the layer's own.
                state_dict[f"{prefix}{PREFIX}{domain}.{name}"] = value.clone()
