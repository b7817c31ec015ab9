"""The one autograd function: normalization whose statistics are themselves functions of the input, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.collectives import all_reduce_sum, start_all_reduce_sum
from syncbn.functional.epilogue import NO_EPILOGUE, ActivationName, Epilogue, activation_grad, invert
from syncbn.functional.finish import Limits, Running, Statistics
from syncbn.functional.normalize import scale_and_shift
from syncbn.functional.stats import group_sums, moments
from syncbn.kernels import pick


class NormalizeWithStatistics(torch.autograd.Function):
    r"""``y = activation((x - mean) * invstd * scale + shift + residual)``, the statistics those of x's groups.

    Each process holds its own ``x`` (N, C, *), N differing between processes and possibly 0, and the same ``mean``,
    ``invstd`` (G, C) and ``count`` (G, 1), float64, which are already reduced over the process group. ``scale`` and
    ``shift`` are ``weight * r`` and ``weight * d + bias``, with ``weight`` and ``bias`` (C,) and renorm's ``r`` and
    ``d`` (G, C), which are constants; any of them may be None. ``residual`` has x's shape and dtype.

    Backward, with xhat = (x - mean) * invstd, dz = dy * activation'(...) and sums over a group's elements on all
    processes unless it is said otherwise:

    * grad_x = invstd * (scale * dz - sum(scale * dz) / count - xhat * sum(scale * dz * xhat) / count)
    * grad_scale = sum over this process of dz * xhat; grad_shift = sum over this process of dz
    * grad_weight = sum over groups of r * grad_scale + d * grad_shift; grad_bias = sum over groups of grad_shift
    * grad_residual = dz

    One collective of 2C numbers a group, taken part in also where this process's x needs no gradient: another's may (an
    empty batch made by hand has no history). The products with ``scale`` are what is summed, so the gradient is right
    even where the processes' scales differ. While it is under way the gradients of weight and bias are computed.

    Saved: x (not a copy), the parameters, mean, invstd, count, r and d, and the residual where there is an activation.
    With ``save_output`` the output is saved in place of x, and xhat had from it; see :class:`syncbn.SmallBatchNorm`.
    ``done`` is the output where :func:`forward_alone` has made it already.

    ``mean`` and ``invstd`` come in as constants, their part in the gradient being the second and third term above. A
    second derivative needs them as functions of x: when the backward pass is itself recorded (``create_graph=True``)
    they are computed anew from x, by the same functions, with the reductions recorded too.

    Forward and context are apart, and the rule for ``vmap`` derived, for the transforms of ``torch.func``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        r: Tensor | None,
        d: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        groups: Tensor | None,
        eps: float,
        group_name: str | None,
        activation: ActivationName | None,
        negative_slope: float,
        save_output: bool,
        done: tuple[Tensor] | None,
    ) -> Tensor:
        if done is not None:
            return done[0]
        scale, shift = scale_and_shift(weight, bias, r, d, mean.shape[0])
        epilogue = Epilogue(residual, activation, negative_slope)
        return pick(x).normalize(x, mean, invstd, scale, shift, groups, epilogue)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, residual, r, d, mean, invstd, count, groups = inputs[:10]
        ctx.eps, ctx.group_name, ctx.activation, ctx.negative_slope, ctx.save_output = inputs[10:-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.activation is None:
            residual = None
            if not ctx.save_output:
                bias = None
        saved = output if ctx.save_output else x
        ctx.save_for_backward(saved, weight, bias, residual, r, d, mean, invstd, count, groups)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, r, d, mean, invstd, count, groups = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = needs = ctx.needs_input_grad[:4]
        epilogue = Epilogue(residual, ctx.activation, ctx.negative_slope)
        alone = pick(x).backward_alone if ctx.group_name is None and not ctx.save_output else None
        if alone is not None:
            dtypes = (None if weight is None else weight.dtype, ctx.bias_dtype)
            done = alone(grad_output, x, weight, bias, r, d, mean, invstd, count, groups, epilogue, dtypes, needs)
            if done is not None:
                return *done, *(None,) * 12
        num_groups = mean.shape[0]
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recorded:
            if ctx.save_output:
                raise RuntimeError("a second derivative needs the layer's input, which save='output' does not keep")
            sums = all_reduce_sum(group_sums(x, groups, num_groups), ctx.group_name)
            _, mean, var = moments(sums)
            invstd = torch.rsqrt(var + ctx.eps)
        scale, shift = scale_and_shift(weight, bias, r, d, num_groups)
        ratio = None
        if ctx.save_output:
            # The output before the activation is itself an x, of mean `shift` and standard deviation `scale`.
            x = invert(x, epilogue)
            grad_output, epilogue = activation_grad(grad_output, x, epilogue), NO_EPILOGUE
            ratio = invstd if scale is None else invstd * scale
            mean = torch.zeros_like(mean) if shift is None else shift.to(mean.dtype)
            invstd = torch.ones_like(mean) if scale is None else scale.to(mean.dtype).reciprocal()
        kernels = pick(x)
        grad_x = grad_weight = grad_bias = pending = None
        dz, rest, sums = kernels.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
        if needs_x or ctx.group_name is not None:
            scaled = sums if scale is None else sums * scale.unsqueeze(1)
            pending = start_all_reduce_sum(scaled, ctx.group_name)
        # While the reduction is under way, what does not depend on it.
        if needs_weight:
            per_group = sums[:, 1] if r is None else r * sums[:, 1] + d * sums[:, 0]
            grad_weight = (per_group[0] if num_groups == 1 else per_group.sum(0)).to(weight.dtype)
        if needs_bias:
            grad_bias = (sums[0, 0] if num_groups == 1 else sums[:, 0].sum(0)).to(ctx.bias_dtype)
        if pending is not None:
            means = pending.wait() / count.clamp(min=1).unsqueeze(1)
            if needs_x:
                if ratio is not None:  # invstd is 1/scale now, and the gradient's factor is the true one
                    means = means * ratio.unsqueeze(1)
                    scale = ratio if scale is None else ratio * scale
                grad_x = kernels.grad_input(dz, x, mean, invstd, scale, shift, means, groups, rest)
        return grad_x, grad_weight, grad_bias, dz if needs_residual else None, *(None,) * 12


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply(*args)``, without its inspection of signatures, which takes as long as a small layer.

    That serves default arguments, which the functions here do not have, and the transforms of ``torch.func``.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-any-return]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc, no-any-return]


def forward_alone(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    limits: Limits | None,
    update: bool,
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue,
) -> tuple[Tensor, Statistics] | None:
    """All of a forward pass at once, for groups that are all on this process, or None where nothing does that."""
    forward = pick(x, recorded=False).forward_alone
    if forward is None:
        return None
    return forward(x, weight, bias, running, eps, limits, update, groups, num_groups, epilogue)


def statistics_sums(x: Tensor, groups: Tensor | None, num_groups: int, group_name: str | None) -> Tensor:
    """Count, sum and sum of squares, (G, 2C + 1) float64, of each group over all processes. One collective."""
    with torch.no_grad():
        return all_reduce_sum(pick(x).group_sums(x, groups, num_groups), group_name)
