"""The three layers and their base: parameters, buffers and checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.autograd import Rule, batch_norm
from syncbn.collectives import Scope, check_positive, make_scope, max_over_ranks, resolve_name
from syncbn.functional.epilogue import ACTIVATIONS, ActivationName, Epilogue, activate
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running, RunningUpdate
from syncbn.functional.statistics import Groups, compute_dtype
from syncbn.torch_internals import assert_async

Remainder = Literal["error", "smaller"]
Save = Literal["input", "output"]

MIN_WEIGHT = 2.0**-7
"""With ``save="output"`` no weight may be smaller in size than this, nor than this times its bias: what is had from the
output is known to a rounding of (1 + |bias|) / |weight|, here at most some 2^8 of them."""


@dataclass(frozen=True, eq=False)
class SampleGroups:
    """Which samples of a batch share statistics, where a layer's own rule does not say.

    Set on a layer (:attr:`SmallBatchNorm.sample_groups`) it takes the place of ``ghost_batch_size`` in training until
    it is set anew.
    """

    index: Tensor | None
    """Group of each sample, (N,) int64 on the input's device; None where all are in group 0."""
    number: int
    """Groups, those without a sample here included; the same on all ranks that share statistics."""
    divisor: float | None = None
    """What the sum over groups is divided by in the running statistics; None is the number of groups with samples."""
    smallest: int = 0
    """Fewest samples in any group that has some, over all ranks that share statistics; 0 is unknown, and then read from
    the counts."""


class SmallBatchNorm(_BatchNorm):
    """Batch normalization over chosen groups of samples, on one or many processes. Base of this package's layers.

    Use :class:`~syncbn.SyncBatchNorm`, :class:`~syncbn.GhostBatchNorm` or :class:`~syncbn.BatchRenorm`.
    """

    scope: Scope | None
    """Which processes share statistics; None is this one alone."""
    ghost_batch_size: int | None
    remainder: Remainder
    max_ghost_groups: int | None
    running_update: RunningUpdate
    sample_groups: SampleGroups | None
    activation: ActivationName | None = None
    """Applied to the normalized values (plus the residual) in the same pass."""
    negative_slope: float = 0.01
    save: Save = "input"
    """What is kept for the backward pass: the input, or the output alone. The latter frees the input's memory where
    nothing else keeps it (a convolution does not keep its output), and needs an activation that can be inverted (none,
    or ``leaky_relu`` of positive slope), no residual, no second derivative (``torch.func`` takes any gradient as if it
    wanted one), and weights away from zero (:data:`MIN_WEIGHT`): In-Place Activated BatchNorm (Rota Bulò et al. 2018,
    arXiv 1712.02616)."""
    qualified_name: str | None
    """Name within the model, for messages; set by :func:`syncbn.convert`."""
    after: Callable[[Any, Tensor], Tensor] | None
    """What a converted layer does to the normalized values (its activation, say); called with the layer and them."""
    observer: Callable[[Any, Tensor, Tensor, Tensor], None] | None
    """Called with the layer and each batch's count (G, 1), mean and biased variance (G, C), instead of an update of the
    running statistics; see :mod:`syncbn.population`."""
    num_nonfinite_batches: Tensor
    """() int64, not saved: batches whose statistics were not finite and so were kept out of the running ones."""

    def __init__(self, *args: Any, bias: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        if not bias:  # not every torch from 2.11 on has this argument
            self.register_parameter("bias", None)
        for name in ("running_mean", "running_var"):
            buffer = getattr(self, name)
            if buffer is not None and buffer.dtype.itemsize < 4:
                setattr(self, name, buffer.float())

    def _configure(
        self,
        *,
        sync: bool,
        process_group: Any = None,
        sync_group_size: int | None = None,
        ghost_batch_size: int | None = None,
        remainder: Remainder = "error",
        max_ghost_groups: int | None = None,
        running_update: RunningUpdate = "mean",
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        """Set all that is not ``_BatchNorm``'s own. Nothing is changed if an argument is wrong."""
        sync = sync or process_group is not None or sync_group_size is not None
        scope = make_scope(process_group, sync_group_size) if sync else None
        for name, value in (("ghost_batch_size", ghost_batch_size), ("max_ghost_groups", max_ghost_groups)):
            check_positive(name, value)
        for name, choice, known in (
            ("remainder", remainder, ("error", "smaller")),
            ("running_update", running_update, ("mean", "sequential", "total")),
            ("activation", activation, (None, *ACTIVATIONS)),
            ("save", save, ("input", "output")),
        ):
            if choice not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {choice!r}")
        if not (isinstance(negative_slope, float | int) and math.isfinite(negative_slope)):
            raise ValueError(f"negative_slope must be a finite number, got {negative_slope!r}")
        invertible = activation is None or (activation == "leaky_relu" and negative_slope > 0)
        if save == "output" and not invertible:
            raise ValueError(
                f"save='output' needs an activation that can be inverted: None or 'leaky_relu' with a positive "
                f"negative_slope, got {activation!r} and {negative_slope!r}"
            )
        self.scope = scope
        self.ghost_batch_size = ghost_batch_size
        self.remainder = remainder
        self.max_ghost_groups = max_ghost_groups
        self.running_update = running_update
        self.activation = activation
        self.negative_slope = negative_slope
        self.save = save
        self.sample_groups = None
        self.qualified_name = None
        self.after = None
        self.observer = None
        self._agreed_groups: int | None = None
        if self.running_mean is not None:
            zero = torch.zeros((), dtype=torch.int64, device=self.running_mean.device)
            self.register_buffer("num_nonfinite_batches", zero, persistent=False)

    # -- torch.nn.Module's own -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # What the ranks have agreed on holds for these processes and this training, and is no part of a copy or a file.
        return {**vars(self), "_agreed_groups": None}

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self._buffers.get("num_nonfinite_batches") is not None:
            self.num_nonfinite_batches.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `module.half()` must not narrow the running statistics: a moving average in bf16 stops moving.
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype.itemsize < 4 <= old.dtype.itemsize:
                setattr(self, name, old.to(new.device))
        return self

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            self._fail(input, "expected (N, C) or (N, C, *), that is at least 2 dimensions")
        if input.shape[1] != self.num_features:
            self._fail(input, f"expected {self.num_features} channels in dimension 1, got {input.shape[1]}")
        if not input.is_floating_point():
            self._fail(input, f"expected a floating-point input, got {input.dtype}; convert it first")

    def _fail(self, x: Tensor, problem: str) -> NoReturn:
        name = type(self).__name__ if self.qualified_name is None else f"{type(self).__name__} '{self.qualified_name}'"
        raise ValueError(f"{name} (num_features={self.num_features}), input of shape {tuple(x.shape)}: {problem}")

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.scope is not None:
            where = self.scope.ranks if self.scope.ranks is not None else self.scope.sync_group_size
            parts.append(f"sync={'world' if where is None else where}")
        if self.ghost_batch_size is not None:
            parts.append(f"ghost_batch_size={self.ghost_batch_size}, remainder={self.remainder!r}")
        if self.running_update != "mean":
            parts.append(f"running_update={self.running_update!r}")
        if self.activation is not None:
            slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
            parts.append(f"activation={self.activation!r}{slope}")
        if self.save != "input":
            parts.append(f"save={self.save!r}")
        return ", ".join(parts)

    # -- the data path -------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input`` (N, C) or (N, C, *); the output has its shape, dtype and memory format.

        Args:
            input: (N, C) or (N, C, *).
            residual: added to the normalized values before the activation; shape, dtype and device of ``input``.

        Raises:
            ValueError: the input has the wrong number of dimensions or channels, the residual does not fit it, the
                ghost groups leave a remainder, a group holds a single value a channel over all processes, which has no
                variance, or a weight is too small for ``save="output"``.
        """
        self._check_input_dim(input)
        if residual is not None:
            self._check_residual(input, residual)
        if self.training or self.running_mean is None:
            output = self._normalize_by_batch(input, residual)
        else:
            output = self._normalize_by_running(input)
            if residual is not None:
                output = output + residual
            output = activate(output, Epilogue(None, self.activation, self.negative_slope))
        return output if self.after is None else self.after(self, output)

    def _check_residual(self, x: Tensor, residual: Tensor) -> None:
        if self.save == "output":
            self._fail(x, "a residual cannot be had back from the output; use save='input'")
        if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
            self._fail(
                x,
                f"the residual must have the input's shape, dtype and device ({x.dtype}, {x.device}), got "
                f"{tuple(residual.shape)}, {residual.dtype}, {residual.device}",
            )

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        if self.num_features == 0:  # torch looks at channel 0 of an empty input
            return x.clone()
        # One dtype for all four, as torch wants it: they differ after half(), or from the input.
        dtype = compute_dtype(x)
        mean, var, weight, bias = (
            None if t is None else t.to(dtype) for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _normalize_by_batch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        # Evaluation without running statistics uses those of the batch on this process, and never communicates.
        group_name = resolve_name(self.scope) if self.training and self.scope is not None else None
        samples = self._groups(x, group_name)
        weight, bias = self.weight, self.bias  # read once: a parametrization may return other values the second time
        if self.save == "output" and weight is not None:
            self._check_weight(x, weight, bias)
        rule = Rule(
            self.eps,
            Groups(samples.index, samples.number),
            group_name,
            self.save == "output",
            None if self._has_variance(x, samples) else functools.partial(self._check_count, x),
            None if self.observer is None else functools.partial(self.observer, self),
        )
        epilogue = Epilogue(residual, self.activation, self.negative_slope)
        return batch_norm(x, weight, bias, self._running(samples.divisor), epilogue, rule)

    def _running(self, divisor: float | None) -> Running | None:
        mean, var, tracked = map(self._buffer, ("running_mean", "running_var", "num_batches_tracked"))
        if mean is None or var is None:
            return None
        if tracked is None:
            raise ValueError(
                f"{type(self).__name__} has running statistics and no num_batches_tracked; set it to a tensor"
            )
        nonfinite = self._buffer("num_nonfinite_batches")
        assert nonfinite is not None, "registered with the others"
        update = self.training and self.track_running_stats and self.observer is None
        limits = self._limits() if self.training else None
        return Running(mean, var, tracked, nonfinite, self.momentum, self.running_update, divisor, limits, update)

    def _buffer(self, name: str) -> Tensor | None:
        # Attribute access looks here last, and costs ten times as much. A parametrization makes a buffer an attribute.
        return self._buffers[name] if name in self._buffers else getattr(self, name)

    def _limits(self) -> Limits | None:
        """The limits of renorm's corrections in training, or None for a layer without corrections."""
        return None

    def _groups(self, x: Tensor, group_name: str | None) -> SampleGroups:
        n, g = x.shape[0], self.ghost_batch_size
        if self.training and self.sample_groups is not None:
            return self.sample_groups
        if g is None or not self.training:
            return SampleGroups(None, 1, smallest=n)
        if n % g and self.remainder == "error":
            self._fail(
                x,
                f"{n} samples are no multiple of ghost_batch_size={g}; drop the last samples, choose a divisor, "
                "or pass remainder='smaller' for a smaller last group",
            )
        filled = -(-n // g)
        number = max(1, filled if group_name is None else self._common_groups(x, filled, group_name))
        index = None if number == 1 else torch.arange(n, device=x.device).div(g, rounding_mode="floor")
        # A group that is empty here may hold a single sample elsewhere, unless each group is known to be whole.
        whole = self.remainder == "error" and g > 1
        smallest = g if whole else 0 if filled < number else n % g or g
        return SampleGroups(index, number, smallest=smallest)

    def _common_groups(self, x: Tensor, filled: int, group_name: str) -> int:
        """How many ghost groups travel: a number that all ranks agree on, though their batches may differ."""
        number = self.max_ghost_groups or self._agreed_groups
        if number is None:
            if torch.compiler.is_compiling():
                return filled
            number = self._agreed_groups = max_over_ranks(filled, group_name, x.device)
        if filled > number:
            self._fail(
                x,
                f"{filled} ghost groups, but the ranks have agreed on {number} on the wire; pass "
                f"max_ghost_groups={filled} (or more) when the first batch is not the largest",
            )
        return number

    @staticmethod
    def _has_variance(x: Tensor, groups: SampleGroups) -> bool:
        """Whether the shapes alone show that every group has more than one value per channel."""
        return groups.smallest * math.prod(x.shape[2:]) > 1

    def _check_count(self, x: Tensor, counts: Tensor) -> None:
        """Raise unless each group (counts are (G,), over all processes) has a variance.

        All ranks raise or none does: the ranks that skip this check know from their shapes that no total is 1.
        """
        problem = (
            "a group of samples holds one value per channel over all processes, which has no variance; use a larger "
            "batch, more processes in the group, or eval mode with running statistics"
        )
        self._require(x, (counts != 1).all(), problem)

    def _check_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        least = 1.0 if bias is None else bias.detach().abs().clamp(min=1.0)
        enough = (weight.detach().abs() >= MIN_WEIGHT * least).all()
        problem = (
            f"save='output' needs weights of at least {MIN_WEIGHT:g} in size, and {MIN_WEIGHT:g} of their bias; use "
            "save='input' for this layer"
        )
        self._require(x, enough, problem, wait=not x.is_cuda)

    def _require(self, x: Tensor, condition: Tensor, problem: str, wait: bool = True) -> None:
        """ValueError unless the () bool tensor holds, or an error on the device if the host must not wait for it."""
        if torch.compiler.is_compiling() or not wait:
            assert_async(condition, f"{type(self).__name__}: {problem}")
        elif not (x.is_cuda and torch.cuda.is_current_stream_capturing()) and not bool(condition):
            self._fail(x, problem)


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

    def _limits(self) -> Limits:
        return Limits(self.r_max, self.d_max, self.warmup_steps, self.r_ramp_end, self.d_ramp_end)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}, "
            f"r_ramp_end={self.r_ramp_end}, d_ramp_end={self.d_ramp_end}"
        )
