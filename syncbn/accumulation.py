"""Gradient accumulation: one update of the running statistics for all forward passes of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from syncbn.functional.running import Running, unbiased, update_once
from syncbn.functional.statistics import WIRE_DTYPE, moments
from syncbn.layers import SmallBatchNorm


class _Passes:
    """The sums of a layer's batch statistics. They are tensors, so that a compiled graph serves every pass."""

    def __init__(self, layer: SmallBatchNorm, device: torch.device) -> None:
        self._total = layer.running_update == "total"
        # Of the total: as functional.statistics.group_sums. Else the number of groups, their means, unbiased variances.
        self._sums = torch.zeros(1, 2 * layer.num_features + 1, dtype=WIRE_DTYPE, device=device)
        self._divisor = torch.zeros((), dtype=WIRE_DTYPE, device=device)

    def add(self, layer: SmallBatchNorm, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Add the groups of one forward pass: count (G, 1), mean and biased variance (G, C)."""
        if not layer.track_running_stats:  # some code turns it off for a pass that is not to count
            return
        weight = count if self._total else (count > 0).to(count.dtype)
        second = var + mean.square() if self._total else unbiased(var, count)
        self._sums.add_(torch.cat((weight, weight * mean, weight * second), 1).sum(0))
        if layer.sample_groups is not None and layer.sample_groups.divisor is not None:
            self._divisor.add_(layer.sample_groups.divisor)

    @torch.no_grad()
    def update(self, layer: SmallBatchNorm) -> None:
        """Update the running statistics as if the groups of all passes were ghost groups of one batch."""
        held = layer.holder()
        mean, var, tracked = held.running_mean, held.running_var, held.num_batches_tracked
        assert mean is not None, "only layers with running statistics are accumulated"
        assert var is not None, "it comes with the mean"
        assert tracked is not None, "checked in the forward pass"
        running = Running(mean, var, tracked, layer.nonfinite_counter(), layer.momentum)
        if self._total:
            count, step_mean, step_var = moments(self._sums)
            step_var = unbiased(step_var, count)
        else:
            number, step_mean, step_var = self._sums.split((1, len(mean), len(mean)), 1)
            number = torch.where(self._divisor > 0, self._divisor, number.clamp(min=1))
            step_mean, step_var = step_mean / number, step_var / number
        present = (self._sums[0, 0] > 0) | (self._divisor > 0)
        update_once(running, step_mean[0], step_var[0], present)


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Within this context running statistics stay as they are; at its end they are updated once.

    Put the forward and backward passes of one optimizer step in it. Without it ``k`` passes are ``k`` updates, and a
    momentum of 0.1 forgets ``1 - 0.9 ** k`` of the past in each step. With it the passes count like the ghost groups of
    one batch: the update takes the mean over them of mean and unbiased variance, or the total (see ``running_update``
    of :class:`~syncbn.GhostBatchNorm`), and ``num_batches_tracked`` grows by one. If a statistic is not finite, the
    whole step is left out. The corrections of :class:`~syncbn.BatchRenorm` are those of the step's beginning in every
    pass.

    After an exception within the context the running statistics are as they were. On several ranks, use it on all. The
    passes have to be of one domain (:func:`syncbn.domain`): enter the domain first.

    Args:
        model: a model with layers of this package. Torch's own batch normalizations are left alone.

    Raises:
        ValueError: the context is within another one of the same model, or a layer has
            ``running_update="sequential"``, which is an update for each group.

    Example:
        >>> import syncbn
        >>> model = nn.Sequential(nn.Linear(4, 8), syncbn.SyncBatchNorm(8))
        >>> with accumulate_statistics(model):
        ...     for micro_batch in torch.randn(32, 4).split(8):
        ...         (model(micro_batch).square().mean() / 4).backward()
        >>> int(model[1].num_batches_tracked)
        1
    """
    passes: list[tuple[SmallBatchNorm, _Passes]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, SmallBatchNorm) and layer.running_mean is not None:
            if layer.observer is not None:
                raise ValueError("accumulate_statistics: the model is in such a context already; use one at a time")
            if layer.running_update == "sequential":
                remedy = "which is an update for each group; choose 'mean' or 'total'"
                raise ValueError(f"accumulate_statistics: layer '{name}' has running_update='sequential', {remedy}")
            passes.append((layer, _Passes(layer, layer.running_mean.device)))
    for layer, each in passes:
        layer.observer = each.add
    try:
        yield
    finally:
        for layer, _ in passes:
            layer.observer = None
    for layer, each in passes:
        each.update(layer)
