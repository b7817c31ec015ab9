"""Plain batch normalization on the CPU where nothing travels: torch's native layer, put together anew.

A process alone with one group needs no wire format for its statistics and no separate passes: the whole is as few calls
as can be, which is what counts for the small tensors of a deep network. What does not fit returns None, and the general
kernels serve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional.finish import Running
from syncbn.functional.stats import compute_dtype
from syncbn.kernels.cpu import FAR, plane_sums, sums_of_moments
from syncbn.kernels.cpu_finish import update_running
from syncbn.kernels.layout import Layout, layout_of

_aten = torch.ops.aten

_SMALL = 1 << 18
"""Elements up to which torch's own statistics serve: fewer calls. It goes over contiguous planes slowly."""
_SHORT = 1 << 12
"""Elements a channel up to which they serve for interleaved values: it adds them up one after the other."""


class Local(NamedTuple):
    """What the forward pass returns; mean and invstd (C,) in the compute dtype are for the backward pass."""

    y: Tensor
    mean: Tensor
    invstd: Tensor


def local_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> Local | None:
    """Normalize ``x`` (N, C, *) by its own statistics and update the running ones: as the twins do it in three steps.

    None, and nothing is changed, where the tensors do not fit the native kernels, or a mean is far from zero, a value
    not finite, so that more care is needed.
    """
    dtype = compute_dtype(x)
    layout = layout_of(x, None, 1)
    n = x.numel() // max(x.shape[1], 1)
    if layout is None or n < 2 or any(t is not None and t.dtype != dtype for t in (weight, bias)):
        return None
    if running is not None and (running.mean.dtype != dtype or running.mode != "mean" or running.divisor is not None):
        return None
    if x.numel() > _SMALL or (not layout.planes and n > _SHORT):
        return _by_blocks(layout, x, weight, bias, running, eps)
    source = layout.native(x)
    factor = 0.0
    new_mean = new_var = None
    if running is not None:
        factor = running.momentum if running.momentum is not None else 1.0 / (float(running.num_batches_tracked) + 1.0)
        new_mean, new_var = running.mean.clone(), running.var.clone()
    y, mean, invstd = torch.empty_like(x), torch.empty(layout.c, dtype=dtype), torch.empty(layout.c, dtype=dtype)
    _aten.native_batch_norm.out(
        source,
        weight,
        bias,
        new_mean,
        new_var,
        True,
        factor,
        eps,
        out=layout.native(y),
        save_mean=mean,
        save_invstd=invstd,
    )
    if not float(torch.linalg.vector_norm(mean * invstd, torch.inf)) <= FAR:
        return None
    if running is not None:
        assert new_mean is not None
        assert new_var is not None
        if not float(torch.dot(new_var, new_var)) < math.inf:
            return None
        running.mean.copy_(new_mean)
        running.var.copy_(new_var)
        running.num_batches_tracked.add_(1)
    return Local(y, mean, invstd)


def _by_blocks(
    layout: Layout, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> Local | None:
    """With statistics of our own, which are exact for any number of elements."""
    if x.dtype != compute_dtype(x) and not layout.planes:
        return None
    matrix = layout.matrix(x)
    found = plane_sums(layout, matrix) if layout.planes else sums_of_moments(layout, matrix)
    if found is None:
        return None
    sums, squares = (t.sum(0) for t in found)
    n = x.numel() // layout.c
    mean = sums.div_(n)
    var = torch.addcmul(squares.div_(n), mean, mean, value=-1).clamp_(min=0)
    invstd = (var + eps).rsqrt_()
    # Not finite, or beyond what a float32 buffer holds: not less.
    if not float(torch.linalg.vector_norm(mean * invstd, torch.inf)) <= FAR or not float(var.max()) < 1e30:
        return None
    if running is not None:
        update_running(running, mean, var, n)
    dtype = compute_dtype(x)
    mean_of_x, invstd_of_x = mean.to(dtype), invstd.to(dtype)
    y, nothing = torch.empty_like(x), torch.empty(0, dtype=dtype)
    _aten.native_batch_norm.out(
        layout.native(x), weight, bias, mean_of_x, var.to(dtype), False, 0.0, eps,
        out=layout.native(y), save_mean=nothing, save_invstd=nothing,
    )  # fmt: skip
    return Local(y, mean_of_x, invstd_of_x)


def local_backward(
    grad_output: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that ``needs`` asks for; ``mean`` and ``invstd`` as in :class:`Local`."""
    layout = layout_of(x, None, 1)
    assert layout is not None, "the forward pass took it"
    gradient = layout.native(grad_output)
    grad, grad_weight, grad_bias = _aten.native_batch_norm_backward(
        gradient, layout.native(x), weight, None, None, mean, invstd, True, 0.0, needs
    )
    return None if grad is None else layout.from_native(grad), grad_weight, grad_bias
