r"""Moving average batch normalization (MABN; Yan et al. 2020, arXiv 2001.06838, section 4), on logical GPUs.

Batch normalization with two changes: no mean is subtracted, so that one statistic is left in each direction (the
convolutions' weights are centred instead, :class:`Centred`), and that one is averaged over the last iterations:

=========  =================================================  =====================================================
direction  statistic of a batch, per channel                  what is used instead
=========  =================================================  =====================================================
forward    second moment, mean(x^2)                           its mean over the last m batches
backward   mean(g * z), g the gradient with respect to z      its mean over the last m batches
=========  =================================================  =====================================================

The paper leaves details to its code (github.com/megvii-model/MABN, ``MABN.py``). They are kept here, except for:

* There the window is used after m batches and from batch ``warmup_steps`` on; here after ``max(m, warmup_steps)``.
* There r stays 1 for at least 1000 iterations; here it is freed when the windows are used, as runs may be short.
* There the exponential average begins at 1; here at the first batch's value, as in the code's ImageNet version
  (``cls/networks/MABN.py``): 1 would take about 5 / momentum iterations to be forgotten.

The code's defaults are m = 32 / per-GPU batch size, momentum 0.02 (0.98 there, the weight of the old value), r_max 5,
100 iterations of warm-up, eps 1e-5. They are for runs of 1e5 iterations: a window lags behind the weights by half its
length, and a run of 160 steps that learns fast with m = 4 or 8 does not with 16 (`mnist5k`, learning rate 0.1).

The windows of a GPU are its own. As an experiment must not depend on how many processes execute it, a layer has *rows*
for all logical GPUs of the run; a process works on those that it hosts, and :func:`exchange_rows` tells all of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from syncbn.functional.normalize import Affine, backward_sums, grad_input, normalize
from syncbn.functional.statistics import WIRE_DTYPE, Groups, group_sums
from syncbn.layers import SampleGroups


@dataclass(frozen=True, eq=False)
class Place:
    """Where the statistics of one forward pass and of its backward pass go: a row for each of G logical GPUs."""

    slot: Tensor
    """(G,) int64: position in the windows."""
    kept: Tensor
    """(G, 1) bool: whether they go there at all."""
    moving: Tensor
    """(G, 1) bool: whether the window's mean is used, and not the batch's own value."""


def second_moments(x: Tensor, groups: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor]:
    """Count (G, 1) and mean of squares (G, C), float64, of ``x`` (N, C, *); both are 0 for a group without samples."""
    c = x.shape[1]
    count, _, squares = group_sums(x, Groups(groups, num_groups)).split((1, c, c), 1)
    return count, squares / count.clamp(min=1)


def fits(values: Tensor, buffer: Tensor) -> Tensor:
    """(G, 1) bool: whether all channels of a row of ``values`` (G, C) are finite, in the buffer's dtype too."""
    return torch.isfinite(values.to(buffer.dtype)).all(1, keepdim=True)


def averaged(window: Tensor, values: Tensor, place: Place) -> Tensor:
    """Put ``values`` in their place, in the window itself, and return what is used of it.

    Args:
        window: (G, m, C) floating.
        values: (G, C) float64.
        place: where to; of a row that is not kept the window stays as it is.

    Returns:
        (G, C) float64: the window's mean, or ``values`` themselves where it is not moving yet.
    """
    row = torch.arange(len(values), device=values.device)
    before = window[row, place.slot]
    window[row, place.slot] = torch.where(place.kept, values.to(window.dtype), before)
    return torch.where(place.moving, window.mean(1, dtype=WIRE_DTYPE), values)


def correction(moment: Tensor, running: Tensor, eps: float, r_max: float, moving: Tensor) -> Tensor:
    """``r = clip(sqrt(moment + eps) / sqrt(running + eps), 1/r_max, r_max)``, and 1 where nothing is ``moving`` yet.

    ``moment`` (G, C) float64 is the one that normalizes, ``running`` (G, C) the exponential average from before this
    batch, ``moving`` (G, 1) bool.
    """
    r = torch.sqrt((moment + eps) / (running.to(moment.dtype) + eps)).clamp(1.0 / r_max, r_max)
    return torch.where(moving, r, 1.0)


def update_rows(running: Tensor, tracked: Tensor, moment: Tensor, momentum: float | None, kept: Tensor) -> None:
    """Update the exponential averages (G, C) and the numbers of batches (G,) in place, where ``kept``.

    The average is of ``moment`` (G, C), the one that normalizes: the window's, once that is used. The first batch's
    value is taken as it is; ``momentum`` is the weight of a later one, or None for a cumulative average.
    """
    number = tracked.unsqueeze(1).to(moment.dtype)
    factor = 1.0 / (number + 1.0) if momentum is None else torch.where(number > 0, momentum, torch.ones_like(number))
    new = running + factor * (moment - running)
    running.copy_(torch.where(kept, new.to(running.dtype), running))
    tracked.add_(kept.squeeze(1).to(tracked.dtype))


def mean_over_gpus(running: Tensor, tracked: Tensor) -> Tensor:
    """(C,) float64: the mean of the rows (R, C) that have seen a batch; of all rows where none has."""
    seen = tracked > 0
    weight = torch.where(seen.any(), seen, ~seen).to(WIRE_DTYPE)
    return (running.to(WIRE_DTYPE) * weight.unsqueeze(1)).sum(0) / weight.sum()


class NormalizeByMovingAverages(torch.autograd.Function):
    r"""``y = z * scale + shift`` with ``z = x / sqrt(moment + eps)``, its gradient by a moving average as well.

    ``x`` is (N, C, *), ``scale`` and ``shift`` (G, C) float64: ``weight * r`` and ``bias``, so that autograd carries
    their gradients on to weight and bias, r being a constant. ``invroot`` = 1 / sqrt(moment + eps), (G, C), and
    ``count``, (G, 1), are float64; ``moment`` is the batch's own mean of squares, or the window's mean of them.

    Backward, with g = scale * dy and sums over a group's elements:

    * phi = sum(g * z) / count goes into its window; psi is that window's mean, or phi as long as moment is the batch's
    * grad_x = invroot * (g - z * psi), the exact gradient for psi = phi
    * grad_scale = sum(dy * z); grad_shift = sum(dy)

    dy is ``gradient_scale`` times the gradient of the loss; the window is of the latter, so that what it holds does not
    depend on the number of processes (by which DDP divides) or on the loss scale of half precision. A second backward
    pass of the same forward puts the same value in the same place. Saved: x (not a copy), scale, invroot, count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        invroot: Tensor,
        count: Tensor,
        groups: Tensor | None,
        window: Tensor,
        place: Place,
        gradient_scale: float | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, invroot, count, groups)
        # The window is written to by each backward pass: no saved tensor, which has to stay as it is.
        ctx.window, ctx.place, ctx.gradient_scale = window, place, gradient_scale
        affine = Affine(torch.zeros_like(invroot), invroot, scale, shift)
        return normalize(x, affine, Groups(groups, len(count)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, invroot, count, groups = ctx.saved_tensors
        place, zeros = ctx.place, torch.zeros_like(invroot)
        affine, samples = Affine(zeros, invroot, scale), Groups(groups, len(count))
        _, _, sums = backward_sums(grad_output, x, affine, samples)
        sum_dy, sum_dy_z = sums.unbind(1)
        phi = scale * sum_dy_z / count.clamp(min=1) / ctx.gradient_scale
        kept = place.kept & fits(phi, ctx.window)
        psi = averaged(ctx.window, phi, Place(place.slot, kept, place.moving)) * ctx.gradient_scale
        grad_x = grad_input(grad_output, x, affine, torch.stack((zeros, psi), 1), samples)
        return grad_x, sum_dy_z, sum_dy, None, None, None, None, None, None


class MovingAverageBatchNorm(nn.Module):
    """Moving average batch normalization of the logical GPUs that a process hosts; see the module's docstring.

    Evaluation normalizes by the exponential average, its mean over all logical GPUs, once :func:`exchange_rows` has
    brought them together. A GPU without samples in a batch keeps its row as it is, and so does one whose statistic is
    not finite, forward or backward (no host synchronization; counted in ``num_nonfinite_batches``, not saved).

    Args:
        num_features: C.
        gpus: R, the logical GPUs of the run.
        hosted: those that this process hosts.
        window: m, batches over which the statistics are averaged; each is one training forward of a GPU.
        eps: added to the second moment under the root.
        momentum: weight of the new value in the exponential average; None is a cumulative average.
        affine: learn ``weight`` and ``bias``.
        r_max: largest correction towards the exponential average, and one over the smallest; at least 1.
        warmup_steps: batches of a GPU that are normalized by themselves alone; as many as the window has, at least.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    sample_groups: SampleGroups | None
    """Which hosted GPU each sample of the next batch is on (group 0 is the first); None where all are on the first."""
    gradient_scale: float | Tensor
    """What the loss is multiplied by before the backward pass: a number or a () tensor."""
    window_second_moment: Tensor
    """(R, m, C): mean of squares of each GPU's last m batches."""
    window_gradient: Tensor
    """(R, m, C): mean(g * z) of the same batches, with respect to a run's loss, which is a mean over all GPUs."""
    running_second_moment: Tensor
    """(R, C): exponential average; 1 where a GPU has not seen a batch."""
    num_batches_tracked: Tensor
    """(R,) int64: batches that each GPU has seen."""
    num_nonfinite_batches: Tensor
    """() int64, not saved: forward statistics of a GPU that were kept out, counted by this process."""

    def __init__(
        self,
        num_features: int,
        *,
        gpus: int = 1,
        hosted: range = range(1),
        window: int = 16,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        r_max: float = 5.0,
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        assert hosted.stop <= gpus, (hosted, gpus)
        self.num_features, self.window, self.hosted = num_features, window, hosted
        self.eps, self.momentum, self.r_max, self.warmup_steps = eps, momentum, r_max, warmup_steps
        self.sample_groups, self.gradient_scale = None, 1.0
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        self.register_buffer("window_second_moment", torch.zeros(gpus, window, num_features))
        self.register_buffer("window_gradient", torch.zeros(gpus, window, num_features))
        self.register_buffer("running_second_moment", torch.ones(gpus, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(gpus, dtype=torch.int64))
        self.register_buffer("num_nonfinite_batches", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        gpus = len(self.num_batches_tracked)
        return f"{self.num_features}, gpus={gpus}, window={self.window}, warmup_steps={self.warmup_steps}"

    def rows(self) -> list[Tensor]:
        """The saved buffers: a row for each logical GPU."""
        return [
            self.window_second_moment,
            self.window_gradient,
            self.running_second_moment,
            self.num_batches_tracked,
        ]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` (N, C, *); the output has its shape, dtype and memory format.

        Raises:
            ValueError: the input has another number of channels.
        """
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: got an input of shape {tuple(input.shape)}, expected (N, C, *) with "
                f"{self.num_features} channels"
            )
        return self._normalize_by_windows(input) if self.training else self._normalize_by_running(input)

    def _normalize_by_windows(self, x: Tensor) -> Tensor:
        groups = self.sample_groups or SampleGroups(index=None, number=1)
        rows = slice(self.hosted.start, self.hosted.start + groups.number)
        with torch.no_grad():
            tracked, running = self.num_batches_tracked[rows], self.running_second_moment[rows]
            count, own = second_moments(x, groups.index, groups.number)
            finite = fits(own, running)
            moving = (tracked >= max(self.warmup_steps, self.window)).unsqueeze(1)
            place = Place(tracked % self.window, (count > 0) & finite, moving)
            moment = averaged(self.window_second_moment[rows], own, place)
            r = correction(moment, running, self.eps, self.r_max, moving)
            update_rows(running, tracked, moment, self.momentum, place.kept)
            self.num_nonfinite_batches.add_((~finite).sum())
            invroot = torch.rsqrt(moment + self.eps)
        scale, shift = self._scale_and_shift(r)
        output: Tensor = NormalizeByMovingAverages.apply(  # type: ignore[no-untyped-call]
            x, scale, shift, invroot, count, groups.index, self.window_gradient[rows], place, self.gradient_scale
        )
        return output

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        moment = mean_over_gpus(self.running_second_moment, self.num_batches_tracked).unsqueeze(0)
        scale, shift = self._scale_and_shift(torch.ones_like(moment))
        return normalize(x, Affine(torch.zeros_like(moment), torch.rsqrt(moment + self.eps), scale, shift))

    def _scale_and_shift(self, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.weight is None or self.bias is None:
            return r, torch.zeros_like(r)
        return self.weight.to(r.dtype) * r, self.bias.to(r.dtype).expand_as(r)


class Centred(nn.Module):
    """A parametrization of a convolution's weight: the mean over each filter is subtracted (weight centralization).

    A layer that subtracts no mean relies on inputs that have none; filters of mean zero bring that about if the images
    or activations before them are alike all over. It is differentiated through.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """(C, *) -> (C, *)."""
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def centre(conv: nn.Conv2d) -> None:
    """Centre a convolution's weights, in place; filters of a single weight stay, as nothing would be left of them."""
    if conv.weight[0].numel() > 1:
        nn.utils.parametrize.register_parametrization(conv, "weight", Centred())


def exchange_rows(model: nn.Module) -> None:
    """Bring each process's rows to all processes of the default world, exactly. One collective for all layers.

    Every process must call it, with the same model, before an evaluation, a checkpoint or the end of a run.
    """
    layers = [m for m in model.modules() if isinstance(m, MovingAverageBatchNorm)]
    if not layers or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [(buffer, layer.hosted) for layer in layers for buffer in layer.rows()]
    # float64 holds what the buffers do, counts included.
    own = torch.cat([buffer[hosted.start : hosted.stop].to(WIRE_DTYPE).flatten() for buffer, hosted in buffers])
    found = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather(list(found.unbind()), own)
    # The processes host consecutive GPUs in the order of their ranks.
    parts = found.split([buffer.numel() // len(found) for buffer, _ in buffers], dim=1)
    for (buffer, _), part in zip(buffers, parts, strict=True):
        buffer.copy_(part.reshape(buffer.shape))
