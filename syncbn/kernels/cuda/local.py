"""The forward and the backward pass of groups that are all on this process, in as few launches as there are passes.

Between the passes over x little is computed, but each small operation of torch is a launch, and takes as long as a pass
over a small x. So one kernel does it all: :func:`~syncbn.kernels.cuda.functions.launch_finish` in the forward pass, and
``gradients_kernel`` in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncbn.functional.epilogue import Epilogue
from syncbn.functional.finish import LocalStatistics
from syncbn.functional.normalize import Affine, scale_and_shift
from syncbn.functional.running import Running
from syncbn.functional.statistics import WIRE_DTYPE, Groups, compute_dtype, group_counts
from syncbn.kernels.cuda.finish import Results, gradients_kernel
from syncbn.kernels.cuda.functions import (
    backward_sums,
    finish,
    finish_blocks,
    grad_input,
    group_sums,
    is_finishable,
    launch_finish,
    normalize,
    on,
)


def local_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None,
    groups: Groups,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The steps up to :func:`normalize`; see :class:`syncbn.kernels.dispatch.Kernels`."""
    sums = group_sums(x, groups)
    shape = (2, groups.number, x.shape[1])
    corrections = None
    if is_finishable(sums, running):
        moments = torch.empty(shape, dtype=WIRE_DTYPE, device=x.device)
        if running is not None and running.limits is not None:
            corrections = torch.empty(shape, dtype=compute_dtype(x), device=x.device)
        r, d = (None, None) if corrections is None else corrections
        launch_finish(sums, eps, running, Results(moments[0], None, moments[1], r, d, sums.new_empty(shape[::2])))
    else:
        _, mean, invstd, r, d, _ = finish(sums, eps, running)
        moments = torch.stack((mean, invstd))
        corrections = None if r is None or d is None else torch.stack((r, d)).to(compute_dtype(x))
    affine = _affine(moments, weight, bias, corrections)
    return normalize(x, affine, groups, epilogue), moments, corrections


def local_backward(
    grad_output: Tensor,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, torch.dtype | None],
    statistics: LocalStatistics,
    groups: Groups,
    epilogue: Epilogue,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:
    """The whole backward pass; see :class:`syncbn.kernels.dispatch.Kernels`."""
    weight, bias, bias_dtype = parameters
    moments, corrections = statistics
    c = x.shape[1]
    if not c or not (corrections is None or corrections.is_contiguous()):
        return None
    affine = _affine(moments, weight, bias, corrections)
    dz, rest, sums = backward_sums(grad_output, x, affine, groups, epilogue)
    means = torch.empty_like(sums)
    grad_weight = grad_bias = None
    if needs[1]:
        assert weight is not None, "its gradient is wanted"
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if needs[2]:
        grad_bias = torch.empty(c, dtype=bias_dtype, device=x.device)
    counts = None if groups.index is None else group_counts(x, groups)
    scale = affine.scale
    block_groups, block_columns, blocks = finish_blocks(groups.number, c)
    with on(x):
        gradients_kernel[(blocks,)](
            sums,
            counts,
            float(x.numel() // c),
            scale,
            (0, 0) if scale is None else scale.stride(),
            corrections,
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
