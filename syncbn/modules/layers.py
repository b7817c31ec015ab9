"""The three layers: a signature each, and renorm's corrections."""

from __future__ import annotations

import math
from typing import Any

from syncbn.functional.epilogue import ActivationName
from syncbn.functional.finish import Limits
from syncbn.functional.running import RunningUpdate
from syncbn.modules.base import Remainder, Save, SmallBatchNorm


class SyncBatchNorm(SmallBatchNorm):
    """Batch normalization with the statistics of the samples on all ranks of a process group.

    Signature, parameters, buffers and checkpoints as :class:`torch.nn.SyncBatchNorm`'s, inputs (N, C) or (N, C, *), and
    exact for unequal and for empty batches. Without an initialised process group, or alone in it, it is
    :class:`torch.nn.BatchNorm2d` for any number of dimensions. ``eval()`` uses the running statistics and never
    communicates. A second derivative, across ranks, works; so does ``torch.compile(fullgraph=True)``.

    Args:
        num_features: C.
        eps: added to the variance under the root.
        momentum: weight of the new value in the running statistics; None is a cumulative average.
        affine: learn ``weight`` and ``bias``.
        track_running_stats: keep running statistics; without them evaluation uses the local batch's.
        process_group: which ranks share statistics: a process group or a sequence of global ranks; None is the world.
        device, dtype: of parameters and buffers.
        sync_group_size: share statistics among this many consecutive ranks only.
        bias: with ``affine``, whether there is a ``bias``.
        activation: ``"relu"``, ``"leaky_relu"`` or ``"silu"``, applied in the same pass over memory. With it, or
            without, the layer may be called with a ``residual`` that is added before.
        negative_slope: of ``leaky_relu``.
        save: what is kept for the backward pass, see :attr:`SmallBatchNorm.save`.

    Raises:
        ValueError: both ``process_group`` and ``sync_group_size`` are given; on use, see :meth:`forward`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        sync_group_size: int | None = None,
        bias: bool = True,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._configure(
            process_group=process_group,
            sync_group_size=sync_group_size,
            activation=activation,
            negative_slope=negative_slope,
            save=save,
        )

    def _configure(  # type: ignore[override]
        self,
        *,
        process_group: Any = None,
        sync_group_size: int | None = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super()._configure(
            sync=True,
            process_group=process_group,
            sync_group_size=sync_group_size,
            activation=activation,
            negative_slope=negative_slope,
            save=save,
        )


class GhostBatchNorm(SmallBatchNorm):
    """Batch normalization over runs of ``ghost_batch_size`` consecutive samples (Hoffer et al. 2017, arXiv 1705.08741).

    Each ghost batch is normalized by its own statistics; evaluation ignores the groups. Synchronized, ghost group i of
    each rank is merged with ghost group i of the others.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as :class:`SyncBatchNorm`'s.
        ghost_batch_size: samples in each group, exactly.
        remainder: what to do with a batch that is no multiple of it: ``"error"``, or ``"smaller"`` for a smaller last
            group.
        running_update: how a step's groups enter the running statistics: ``"mean"``, one update with the mean over
            groups of mean and unbiased variance; ``"sequential"``, one update for each group in turn; ``"total"``, one
            update with the mean and variance of the whole batch.
        sync, process_group, sync_group_size: share statistics among ranks; giving either of the latter two implies it.
        max_ghost_groups: synchronized, the groups that travel each step, at least as many as the largest batch has on
            any rank. None: the ranks agree on the number in the first training step, which must be as large as any (one
            small extra collective, once); compiled before that, equal numbers are taken for granted.
        activation, negative_slope, save: as :class:`SyncBatchNorm`'s.
    """

    def __init__(
        self,
        num_features: int,
        ghost_batch_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        remainder: Remainder = "error",
        running_update: RunningUpdate = "mean",
        sync: bool = False,
        process_group: Any = None,
        sync_group_size: int | None = None,
        max_ghost_groups: int | None = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._configure(
            ghost_batch_size=ghost_batch_size,
            remainder=remainder,
            running_update=running_update,
            sync=sync,
            process_group=process_group,
            sync_group_size=sync_group_size,
            max_ghost_groups=max_ghost_groups,
            activation=activation,
            negative_slope=negative_slope,
            save=save,
        )

    def _configure(  # type: ignore[override]
        self,
        *,
        ghost_batch_size: int,
        sync: bool = False,
        process_group: Any = None,
        sync_group_size: int | None = None,
        **options: Any,
    ) -> None:
        super()._configure(
            sync=sync,
            process_group=process_group,
            sync_group_size=sync_group_size,
            ghost_batch_size=ghost_batch_size,
            **options,
        )


class BatchRenorm(SmallBatchNorm):
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275): batch statistics pulled towards the running ones.

    ``y = weight * ((x - mean_B) / sigma_B * r + d) + bias`` with r and d clipped and constant for the gradient; they
    use the running statistics from before the step's update. Evaluation is plain batch normalization. The limits of r
    and d rise with the number of training forwards, which is ``num_batches_tracked`` and so survives a checkpoint.
    Checkpoints are BatchNorm's: the variance is stored, sigma = sqrt(running_var + eps). Activation checkpointing
    repeats the forward pass after the update, with other corrections: keep the layer outside of it.

    Args:
        num_features, eps, affine, device, dtype, bias: as :class:`SyncBatchNorm`'s.
        momentum: the paper's alpha, 0.01.
        track_running_stats: must be True, as the corrections need the running statistics.
        r_max, d_max: limits of r and d after their ramps.
        warmup_steps: training forwards with r = 1 and d = 0.
        r_ramp_end, d_ramp_end: training forward at which each limit reaches its maximum, linearly from the warm-up's
            end.
        sync, process_group, sync_group_size: renormalize statistics that are synchronized among ranks.
        ghost_batch_size, remainder, max_ghost_groups: renormalize each ghost group, as :class:`GhostBatchNorm`.
        activation, negative_slope, save: as :class:`SyncBatchNorm`'s.

    Raises:
        ValueError: a limit or a ramp that cannot be, or ``track_running_stats=False``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5_000,
        r_ramp_end: int = 40_000,
        d_ramp_end: int = 25_000,
        sync: bool = False,
        process_group: Any = None,
        sync_group_size: int | None = None,
        ghost_batch_size: int | None = None,
        remainder: Remainder = "error",
        max_ghost_groups: int | None = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._configure(
            r_max=r_max,
            d_max=d_max,
            warmup_steps=warmup_steps,
            r_ramp_end=r_ramp_end,
            d_ramp_end=d_ramp_end,
            sync=sync,
            process_group=process_group,
            sync_group_size=sync_group_size,
            ghost_batch_size=ghost_batch_size,
            remainder=remainder,
            max_ghost_groups=max_ghost_groups,
            activation=activation,
            negative_slope=negative_slope,
            save=save,
        )

    def _configure(  # type: ignore[override]
        self,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5_000,
        r_ramp_end: int = 40_000,
        d_ramp_end: int = 25_000,
        sync: bool = False,
        process_group: Any = None,
        sync_group_size: int | None = None,
        ghost_batch_size: int | None = None,
        remainder: Remainder = "error",
        max_ghost_groups: int | None = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        if self.running_mean is None:
            raise ValueError(
                "BatchRenorm needs track_running_stats=True: r and d are relative to the running statistics"
            )
        for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            # Infinity is no limit that a ramp could rise to: 0 * inf is not a number.
            if not (limit >= least and math.isfinite(limit)):
                raise ValueError(f"{name} must be a finite number of at least {least}, got {limit!r}")
        for name, end in (("r_ramp_end", r_ramp_end), ("d_ramp_end", d_ramp_end)):
            if not 0 <= warmup_steps <= end:
                raise ValueError(f"expected 0 <= warmup_steps <= {name}, got {warmup_steps!r} and {end!r}")
        super()._configure(
            sync=sync,
            process_group=process_group,
            sync_group_size=sync_group_size,
            ghost_batch_size=ghost_batch_size,
            remainder=remainder,
            max_ghost_groups=max_ghost_groups,
            activation=activation,
            negative_slope=negative_slope,
            save=save,
        )
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        self.r_ramp_end = r_ramp_end
        self.d_ramp_end = d_ramp_end

    def _limits(self) -> Limits | None:
        if not self.training:
            return None
        return Limits(self.r_max, self.d_max, self.warmup_steps, self.r_ramp_end, self.d_ramp_end)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}, "
            f"r_ramp_end={self.r_ramp_end}, d_ramp_end={self.d_ramp_end}"
        )
