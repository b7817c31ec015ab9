"""Running statistics across processes: one flat reduction for all layers of a model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.layers import SmallBatchNorm


class RunningStatistics:
    """The running means and variances of a model's layers, averaged over the ranks of the default world.

    A moving average is linear in what goes into it: the mean of the ranks' averages is the average of their means. So
    layers that do not communicate may be reconciled at any time, before an evaluation or a checkpoint; training goes on
    from there as if they had been reduced at every step.
    """

    def __init__(self, model: nn.Module, kind: type[SmallBatchNorm] = SmallBatchNorm) -> None:
        layers = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
        self._buffers: list[Tensor] = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Begin the reduction; it runs while other work is done."""
        assert self._flat is None, "a reduction is under way"
        if not self._buffers or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # float64, so that the average of equal values is that value and float32 averages are rounded once.
        self._flat = torch.cat([b.detach().to(torch.float64) for b in self._buffers])
        self._work = dist.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        """Wait for the reduction, if one was begun, and write the averages."""
        if self._flat is None or self._work is None:
            return
        self._work.wait()
        averages = (self._flat / dist.get_world_size()).split([b.numel() for b in self._buffers])
        with torch.no_grad():
            for buffer, average in zip(self._buffers, averages, strict=True):
                buffer.copy_(average)
        self._flat = self._work = None


def reconcile(model: nn.Module) -> None:
    """Set every layer's running statistics to their mean over the ranks of the default world. One collective.

    Every rank must call it, with the same model. ``num_batches_tracked`` is left alone: it is the same on all ranks
    that took the same number of steps.
    """
    statistics = RunningStatistics(model)
    statistics.start()
    statistics.finish()
