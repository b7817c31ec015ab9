"""The one autograd function: normalization whose statistics are themselves functions of the input, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.collectives import all_reduce_sum, start_all_reduce_sum
from syncbn.functional.epilogue import NO_EPILOGUE, ActivationName, Epilogue, activation_grad, invert
from syncbn.functional.finish import Limits, Running
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
    ) -> Tensor:
        scale, shift = scale_and_shift(weight, bias, r, d, mean.shape[0])
        epilogue = Epilogue(residual, activation, negative_slope)
        return pick(x).normalize(x, mean, invstd, scale, shift, groups, epilogue)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, residual, r, d, mean, invstd, count, groups = inputs[:10]
        ctx.eps, ctx.group_name, ctx.activation, ctx.negative_slope, ctx.save_output = inputs[10:]
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
        num_groups = mean.shape[0]
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recorded:
            if ctx.save_output:
                raise RuntimeError("a second derivative needs the layer's input, which save='output' does not keep")
            sums = all_reduce_sum(group_sums(x, groups, num_groups), ctx.group_name)
            _, mean, var = moments(sums)
            invstd = torch.rsqrt(var + ctx.eps)
        scale, shift = scale_and_shift(weight, bias, r, d, num_groups)
        epilogue = Epilogue(residual, ctx.activation, ctx.negative_slope)
        ratio = None
        if ctx.save_output:
            # The output before the activation is itself an x, of mean `shift` and standard deviation `scale`.
            x = invert(x, epilogue)
            grad_output, epilogue = activation_grad(grad_output, x, epilogue), NO_EPILOGUE
            ratio = invstd if scale is None else invstd * scale
            mean = torch.zeros_like(mean) if shift is None else shift.to(mean.dtype)
            invstd = torch.ones_like(mean) if scale is None else scale.to(mean.dtype).reciprocal()
        kernels = pick(x)
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = found = pending = None
        alone = kernels.backward_alone if needs_x and groups is None and ratio is None else None
        if alone is not None and ctx.group_name is None:
            found = alone(grad_output, x, mean, invstd, scale, shift, epilogue)
        if found is not None:
            dz, sums, grad_x = found
        else:
            dz, rest, sums = kernels.backward_sums(
                grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue
            )
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
        return grad_x, grad_weight, grad_bias, dz if needs_residual else None, *(None,) * 11


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply(*args)``, without its inspection of signatures, which takes as long as a small layer.

    That serves default arguments, which the functions here do not have, and the transforms of ``torch.func``.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-any-return]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc, no-any-return]


class NormalizeLocally(torch.autograd.Function):
    """Batch normalization where nothing travels, by an implementation's shortcut; see :class:`LocalForward`.

    The output is what :func:`normalize_locally` has found already. A second derivative goes by the long way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: Tensor | None,
        found: tuple[Tensor | None, ...],
        eps: float,
    ) -> Tensor | None:
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, groups, *found[1:])
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, groups, *found = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        recorded = torch.is_grad_enabled()
        backward = None if recorded else pick(x).local_backward
        if backward is not None:
            return *backward(grad_output, x, tuple(found), needs), None, None, None
        r, d = (None if t is None else t.to(torch.float64).unsqueeze(0) for t in found[-2:])
        with torch.no_grad():
            count, mean, var = moments(group_sums(x, groups, 1 if groups is None else len(found[0])))
        with torch.enable_grad():
            # Other tensors than the layer's own, whose hooks are not for this inner pass.
            inputs = [
                t if t is None else t.view_as(t) if recorded else t.detach().requires_grad_() for t in (x, weight, bias)
            ]
            y = NormalizeWithStatistics.apply(  # type: ignore[no-untyped-call]
                *inputs, None, r, d, mean, torch.rsqrt(var + ctx.eps), count, groups, ctx.eps,
                None, None, 0.0, False,
            )  # fmt: skip
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
        gradients = iter(torch.autograd.grad(y, wanted, grad_output, create_graph=recorded))
        return *(next(gradients) if need else None for need in needs), None, None, None


def normalize_locally(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    limits: Limits | None,
    update: bool,
    groups: Tensor | None,
    num_groups: int,
) -> Tensor | None:
    """Batch normalization of groups that are all here, or None where there is no shortcut for it."""
    with torch.no_grad():
        kernels = pick(x)
    if kernels.local_native is not None and limits is None and groups is None:
        y = kernels.local_native(x, weight, bias, running if update else None, eps)
        if y is not None:
            return y
    if kernels.local_forward is None:
        return None
    with torch.no_grad():
        found = kernels.local_forward(x, weight, bias, running, eps, limits, update, groups, num_groups)
    return None if found is None else apply(NormalizeLocally, x, weight, bias, groups, found, eps)


def statistics_sums(x: Tensor, groups: Tensor | None, num_groups: int, group_name: str | None) -> Tensor:
    """Count, sum and sum of squares, (G, 2C + 1) float64, of each group over all processes. One collective."""
    with torch.no_grad():
        return all_reduce_sum(pick(x).group_sums(x, groups, num_groups), group_name)
