"""A whole batch normalization of groups that are all on this process, in as few launches as there are passes.

Between the passes over x little is computed, but each small operation of torch is a launch, and takes as long as a pass
over a small x. So one kernel does it all: :func:`~syncbn.kernels.cuda.functions.launch_finish` in the forward pass, and
``gradients_kernel`` in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.functional.epilogue import Epilogue
from syncbn.functional.normalize import Affine, scale_and_shift
from syncbn.functional.running import Running
from syncbn.functional.statistics import WIRE_DTYPE, Groups, compute_dtype, group_counts
from syncbn.kernels.cuda.finish import Results, gradients_kernel
from syncbn.kernels.cuda.functions import (
    backward_sums,
    finish_blocks,
    grad_input,
    group_sums,
    is_finishable,
    launch_finish,
    normalize,
    on,
)

Gradients = tuple[Tensor | None, ...]
"""Of x, weight, bias and residual."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    epilogue: Epilogue,
    groups: Groups,
    eps: float,
    save_output: bool,
) -> Tensor | None:
    """As :func:`syncbn.autograd.batch_norm` for groups that are all on this process.

    Returns:
        the output, or None if the kernels cannot update these running statistics.
    """
    if not is_finishable(groups.number, x.shape[1], running):
        return None
    rule = (epilogue._replace(residual=None), groups.number, eps, save_output)
    y: Tensor = LocalNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, epilogue.residual, groups.index, running, rule
    )
    return y


class LocalNorm(torch.autograd.Function):
    """:class:`syncbn.autograd.SyncedNorm` without a process group. It saves the same, without the count."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        index: Tensor | None,
        running: Running | None,
        rule: tuple[Epilogue, int, float, bool],
    ) -> Tensor:
        activation, number, eps, save_output = rule
        groups = Groups(index, number)
        sums = group_sums(x, groups)
        shape = (2, number, x.shape[1])
        moments, corrections = torch.empty(shape, dtype=WIRE_DTYPE, device=x.device), None
        if running is not None and running.limits is not None:
            corrections = torch.empty(shape, dtype=compute_dtype(x), device=x.device)
        r, d = (None, None) if corrections is None else corrections
        launch_finish(sums, eps, running, Results(moments[0], None, moments[1], r, d, sums.new_empty(2, x.shape[1])))
        affine = _affine(moments, weight, bias, corrections)
        y = normalize(x, affine, groups, activation._replace(residual=residual))
        ctx.rule, ctx.bias_dtype = rule, torch.float32 if bias is None else bias.dtype
        if activation.activation is None:
            residual = None
            bias = bias if save_output else None
        ctx.save_for_backward(y if save_output else x, weight, bias, residual, index, moments, corrections)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x_or_y, weight, bias, residual, index, moments, corrections = ctx.saved_tensors
        activation, number, eps, save_output = ctx.rule
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or save_output:
            grads = torch.ops.syncbn.composed_backward(
                *(grad_output, x_or_y, weight, bias, residual, index, moments),
                moments.new_empty(0) if corrections is None else corrections,
                *(number, activation.activation, activation.negative_slope, eps, save_output, ctx.bias_dtype, needs),
            )
        else:
            affine = _affine(moments, weight, bias, corrections)
            epilogue = activation._replace(residual=residual)
            groups = Groups(index, number)
            grads = _gradients(ctx, grad_output, x_or_y, weight, affine, corrections, groups, epilogue)
        return *grads, None, None, None


def _gradients(
    ctx: Any,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    affine: Affine,
    corrections: Tensor | None,
    groups: Groups,
    epilogue: Epilogue,
) -> Gradients:
    needs = ctx.needs_input_grad
    dz, rest, sums = backward_sums(grad_output, x, affine, groups, epilogue)
    means = torch.empty_like(sums)
    c = x.shape[1]
    grad_weight = grad_bias = None
    if needs[1]:
        assert weight is not None, "its gradient is wanted"
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if needs[2]:
        grad_bias = torch.empty(c, dtype=ctx.bias_dtype, device=x.device)
    scale = affine.scale
    block_groups, block_columns, blocks = finish_blocks(groups.number, c)
    with on(x):
        gradients_kernel[(blocks,)](
            sums,
            None if groups.index is None else group_counts(x, groups),
            float(x.numel() // c),
            scale,
            (0, 0) if scale is None else scale.stride(),
            None if corrections is None else corrections.contiguous(),
            means,
            grad_weight,
            grad_bias,
            groups.number,
            c,
            BLOCK_GROUPS=block_groups,
            BLOCK_COLS=block_columns,
            num_warps=4,
        )
    grad_x = grad_input(dz, x, affine, means, groups, rest) if needs[0] else None
    return grad_x, grad_weight, grad_bias, dz if needs[3] else None


def _affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, corrections: Tensor | None) -> Affine:
    r, d = (None, None) if corrections is None else corrections
    return Affine(moments[0], moments[1], *scale_and_shift(weight, bias, r, d, moments.shape[1]))
