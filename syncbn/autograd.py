"""The one autograd function: normalization whose statistics are themselves functions of the input, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.collectives import all_reduce_sum
from syncbn.functional.normalize import backward_sums, grad_input, normalize
from syncbn.functional.stats import group_sums, moments


class NormalizeWithStatistics(torch.autograd.Function):
    r"""``y = (x - mean) * invstd * scale + shift`` where mean and invstd are those of the samples that share a group.

    Each process holds its own ``x`` (N, C, *), N differing between processes and possibly 0, and the same ``mean``,
    ``invstd`` (G, C) and ``count`` (G, 1), which are already reduced over the process group. ``scale`` and ``shift``
    (G, C) carry weight and bias, and renorm's r and d. All of them are float64.

    Backward, with xhat = (x - mean) * invstd and sums over a group's elements on all processes:

    * grad_x = invstd * (scale * dy - sum(scale * dy) / count - xhat * sum(scale * dy * xhat) / count)
    * grad_scale = sum over this process of dy * xhat; grad_shift = sum over this process of dy

    One collective of 2C numbers a group, taken part in also where this process's x needs no gradient: another's may (an
    empty batch made by hand has no history). The products with ``scale`` are what is summed, so the gradient is right
    even where the processes' scales differ. Saved: x (not a copy), mean, invstd, scale and count.

    ``mean`` and ``invstd`` come in as constants, their part in the gradient being the second and third term above. A
    second derivative needs them as functions of x: when the backward pass is itself recorded (``create_graph=True``)
    they are computed anew from x, by the same functions, with the reductions recorded too.

    Forward and context are apart, and the rule for ``vmap`` derived, for the transforms of ``torch.func``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        groups: Tensor | None,
        eps: float,
        group_name: str | None,
    ) -> Tensor:
        return normalize(x, mean, invstd, scale, shift, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, _, mean, invstd, count, groups, ctx.eps, ctx.group_name = inputs
        ctx.save_for_backward(x, scale, mean, invstd, count, groups)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, invstd, count, groups = ctx.saved_tensors
        num_groups = mean.shape[0]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            sums = all_reduce_sum(group_sums(x, groups, num_groups), ctx.group_name)
            _, mean, var = moments(sums)
            invstd = torch.rsqrt(var + ctx.eps)
        sum_dy, sum_dy_xhat = backward_sums(grad_output, x, mean, invstd, groups, num_groups)
        grad_x = None
        if ctx.needs_input_grad[0] or ctx.group_name is not None:
            packed = all_reduce_sum(torch.cat((scale * sum_dy, scale * sum_dy_xhat), 1), ctx.group_name)
            mean_dy, mean_dy_xhat = (packed / count.clamp(min=1)).chunk(2, 1)
        if ctx.needs_input_grad[0]:
            grad_x = grad_input(grad_output, x, mean, invstd, scale, mean_dy, mean_dy_xhat, groups)
        return grad_x, sum_dy_xhat, sum_dy, None, None, None, None, None, None


def statistics(
    x: Tensor, groups: Tensor | None, num_groups: int, group_name: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count (G, 1), mean and biased variance (G, C), float64, of each group over all processes. One collective."""
    with torch.no_grad():
        return moments(all_reduce_sum(group_sums(x, groups, num_groups), group_name))
