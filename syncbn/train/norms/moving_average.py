r"""Moving average batch normalization (MABN; Yan et al. 2020, arXiv 2001.06838, section 4), on logical GPUs.

It differs from batch normalization in two ways. No mean is subtracted; the convolutions' weights are centred instead
(:class:`Centred`). And the statistics, mean(x^2) in the forward and mean(g * z) in the backward pass (g is the gradient
with respect to z), are averaged over the last m batches.

Details follow the paper's code (github.com/megvii-model/MABN, ``MABN.py``), with three exceptions:

* There the windows are used after m batches and from batch ``warmup_steps`` on; here after ``max(m, warmup_steps)``.
* There r stays 1 for at least 1000 iterations; here only until the windows are used, as runs may be short.
* There the exponential average starts at 1, which takes about 5 / momentum iterations to be forgotten; here it starts
  at the first batch's value, as in the code's ImageNet version (``cls/networks/MABN.py``).

The code's defaults are m = 32 / per-GPU batch size, momentum 0.02 (written there as 0.98), r_max 5, 100 iterations of
warm-up, eps 1e-5. They suit runs of 1e5 iterations. A window lags behind the weights by half its length: a run of 160
steps on `mnist5k` at learning rate 0.1 trains well with m = 4 or 8, and not with 16.

Each logical GPU has its own windows. As the result must not depend on the number of processes, a layer has *rows* for
all logical GPUs of the run. A process updates those it hosts, and :func:`exchange_rows` distributes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from syncbn.collectives import gathered
from syncbn.functional.normalize import Affine, backward_sums, grad_input, normalize
from syncbn.functional.statistics import WIRE_DTYPE, Groups, group_sums
from syncbn.layers import SampleGroups
from syncbn.train.config import NormConfig

_Average = Callable[[Tensor], Tensor]


def _fits(values: Tensor, buffer: Tensor) -> Tensor:
    """(G, 1) bool: whether all channels of a row of ``values`` (G, C) are finite in the buffer's dtype."""
    return torch.isfinite(values.to(buffer.dtype)).all(1, keepdim=True)


def _averaged(window: Tensor, values: Tensor, slot: Tensor, kept: Tensor, moving: Tensor) -> Tensor:
    """Store ``values`` (G, C) in ``window`` (G, m, C); returns its mean, or ``values`` until it is used: (G, C)."""
    row = torch.arange(len(values), device=values.device)
    before = window[row, slot]
    window[row, slot] = torch.where(kept, values.to(window.dtype), before)
    return torch.where(moving, window.mean(1, dtype=WIRE_DTYPE), values)


class NormalizeByMovingAverages(torch.autograd.Function):
    r"""``y = z * scale + shift`` with ``z = x * invroot``; its gradient uses a moving average as well.

    ``x`` is (N, C, *). ``invroot``, ``scale`` = weight * r and ``shift`` = bias are (G, C) float64; autograd carries
    the gradients of scale and shift on to weight and bias, with r constant.

    Backward, with g = scale * dy: ``average`` turns sum(g * z), (G, C), into psi, the moving average of its mean;

    * grad_x = invroot * (g - z * psi), the exact gradient if psi is the mean over this batch
    * grad_scale = sum(dy * z); grad_shift = sum(dy)

    Saved: x (not a copy), invroot, scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, invroot: Tensor, scale: Tensor, shift: Tensor, groups: Groups, average: _Average
    ) -> Tensor:
        ctx.save_for_backward(x, invroot, scale)
        ctx.groups, ctx.average = groups, average
        return normalize(x, Affine(torch.zeros_like(invroot), invroot, scale, shift), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, invroot, scale = ctx.saved_tensors
        zeros = torch.zeros_like(invroot)
        affine = Affine(zeros, invroot, scale)
        _, _, sums = backward_sums(grad_output, x, affine, ctx.groups)
        sum_dy, sum_dy_z = sums.unbind(1)
        psi = ctx.average(scale * sum_dy_z)
        grad_x = grad_input(grad_output, x, affine, torch.stack((zeros, psi), 1), ctx.groups)
        return grad_x, None, sum_dy_z, sum_dy, None, None


class MovingAverageBatchNorm(nn.Module):
    """Moving average batch normalization of the logical GPUs that a process hosts; see the module's docstring.

    Evaluation uses the exponential average, averaged over all logical GPUs, after :func:`exchange_rows`. The row of a
    GPU stays as it is if the GPU has no samples in a batch, or if its statistic is not finite, forward or backward.

    The run has ``gpus`` (R) logical GPUs, and this process those in ``hosted``.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    sample_groups: SampleGroups | None
    """The hosted GPU of each sample of the next batch, counted from the first one; None if all are on the first."""
    gradient_scale: float | Tensor
    """Factor on the loss before the backward pass: a number or a () tensor."""
    window_second_moment: Tensor  # (R, m, C): mean of squares of each GPU's last m batches
    window_gradient: Tensor  # (R, m, C): mean(g * z) of the same batches, for a loss that is a mean over all GPUs
    running_second_moment: Tensor  # (R, C): exponential average; 1 for a GPU that has not seen a batch
    num_batches_tracked: Tensor  # (R,) int64: batches that each GPU has seen
    num_nonfinite_batches: Tensor  # () int64, not saved: statistics left out here because they were not finite

    def __init__(self, num_features: int, config: NormConfig, gpus: int = 1, hosted: range = range(1)) -> None:
        super().__init__()
        assert hosted.stop <= gpus, (hosted, gpus)
        window, affine = config.window, config.affine
        self.num_features, self.window, self.hosted = num_features, window, hosted
        self.eps, self.momentum = config.eps, config.momentum
        self.r_max, self.warmup_steps = config.r_max, config.warmup_steps
        self.sample_groups, self.gradient_scale = None, 1.0
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("window_second_moment", torch.zeros(gpus, window, num_features))
        self.register_buffer("window_gradient", torch.zeros(gpus, window, num_features))
        self.register_buffer("running_second_moment", torch.ones(gpus, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(gpus, dtype=torch.int64))
        self.register_buffer("num_nonfinite_batches", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        gpus = len(self.num_batches_tracked)
        return f"{self.num_features}, gpus={gpus}, window={self.window}, warmup_steps={self.warmup_steps}"

    def rows(self) -> list[Tensor]:
        """The saved buffers, each with a row for each logical GPU."""
        windows = [self.window_second_moment, self.window_gradient]
        return [*windows, self.running_second_moment, self.num_batches_tracked]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` (N, C, *); the output has its shape, dtype and memory format."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            expected = f"(N, C, *) with {self.num_features} channels"
            raise ValueError(f"{type(self).__name__}: got an input of shape {tuple(input.shape)}, expected {expected}")
        return self._normalize_by_windows(input) if self.training else self._normalize_by_running(input)

    def _normalize_by_windows(self, x: Tensor) -> Tensor:
        told = self.sample_groups or SampleGroups(index=None, number=1)
        groups = Groups(told.index, told.number)
        rows = slice(self.hosted.start, self.hosted.start + groups.number)
        with torch.no_grad():
            tracked, running = self.num_batches_tracked[rows], self.running_second_moment[rows]
            count, _, squares = group_sums(x, groups).split((1, self.num_features, self.num_features), 1)
            own = squares / count.clamp(min=1)
            finite = _fits(own, running)
            moving = (tracked >= max(self.warmup_steps, self.window)).unsqueeze(1)
            slot, kept = tracked % self.window, (count > 0) & finite
            moment = _averaged(self.window_second_moment[rows], own, slot, kept, moving)
            # r uses the exponential average before this batch.
            r = torch.sqrt((moment + self.eps) / (running.to(moment.dtype) + self.eps))
            r = torch.where(moving, r.clamp(1.0 / self.r_max, self.r_max), 1.0)
            self._update(running, tracked, moment, kept)
            self.num_nonfinite_batches.add_((~finite).sum())
            invroot = torch.rsqrt(moment + self.eps)
        window, loss_scale = self.window_gradient[rows], self.gradient_scale

        def average(sum_gz: Tensor) -> Tensor:
            # The window holds gradients of the loss itself, because neither the number of processes (by which DDP
            # divides) nor the loss scale of half precision may change it. A second backward pass of the same forward
            # stores the same value in the same place.
            phi = sum_gz / count.clamp(min=1) / loss_scale
            return _averaged(window, phi, slot, kept & _fits(phi, window), moving) * loss_scale

        scale, shift = self._scale_and_shift(r)
        output: Tensor = NormalizeByMovingAverages.apply(  # type: ignore[no-untyped-call]
            x, invroot, scale, shift, groups, average
        )
        return output

    def _update(self, running: Tensor, tracked: Tensor, moment: Tensor, kept: Tensor) -> None:
        """Update the rows that are ``kept``. The exponential average starts at the first batch's moment."""
        number = tracked.unsqueeze(1).to(moment.dtype)
        if self.momentum is None:
            factor = 1.0 / (number + 1.0)
        else:
            factor = torch.where(number > 0, self.momentum, torch.ones_like(number))
        new = running + factor * (moment - running)
        running.copy_(torch.where(kept, new.to(running.dtype), running))
        tracked.add_(kept.squeeze(1).to(tracked.dtype))

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        seen = self.num_batches_tracked > 0
        weight = torch.where(seen.any(), seen, ~seen).to(WIRE_DTYPE)  # rows that have seen a batch; all if none has
        moment = (self.running_second_moment.to(WIRE_DTYPE) * weight.unsqueeze(1)).sum(0, keepdim=True) / weight.sum()
        scale, shift = self._scale_and_shift(torch.ones_like(moment))
        return normalize(x, Affine(torch.zeros_like(moment), torch.rsqrt(moment + self.eps), scale, shift))

    def _scale_and_shift(self, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.weight is None or self.bias is None:
            return r, torch.zeros_like(r)
        return self.weight.to(r.dtype) * r, self.bias.to(r.dtype).expand_as(r)


class Centred(nn.Module):
    """Parametrization of a convolution's weight that subtracts each filter's mean (weight centralization).

    A layer that subtracts no mean needs inputs whose mean is near zero, and centred filters give such outputs.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """(C, *) -> (C, *)."""
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def centre(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Centre a convolution's weights, in place. Filters of a single weight are left alone, as they would become 0."""
    if conv.weight[0].numel() > 1:
        nn.utils.parametrize.register_parametrization(conv, "weight", Centred())


def exchange_rows(model: nn.Module) -> None:
    """Copy each process's rows to all processes of the default group, with one collective for all layers.

    Every process must call it before an evaluation, a checkpoint or the end of a run.
    """
    layers = [m for m in model.modules() if isinstance(m, MovingAverageBatchNorm)]
    if not layers or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [(buffer, layer.hosted) for layer in layers for buffer in layer.rows()]
    # float64 represents float32 and counts exactly.
    own = torch.cat([buffer[hosted.start : hosted.stop].to(WIRE_DTYPE).flatten() for buffer, hosted in buffers])
    found = gathered(own)
    # The processes host consecutive GPUs in the order of their ranks.
    parts = found.split([buffer.numel() // len(found) for buffer, _ in buffers], dim=1)
    for (buffer, _), part in zip(buffers, parts, strict=True):
        buffer.copy_(part.reshape(buffer.shape))
