"""Batch normalization on the CPU where nothing travels: torch's native layer, put together anew, renorm included.

A process alone with one group needs no wire format for its statistics and no separate passes: the whole is as few calls
as can be, which is what counts for the small tensors of a deep network. What does not fit returns None, and the general
kernels serve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional.finish import Limits, Running
from syncbn.functional.stats import WIRE_DTYPE, compute_dtype
from syncbn.kernels.cpu import backward_sums, grad_input
from syncbn.kernels.cpu_finish import LARGE, host_corrections, update_running, weight_of_new
from syncbn.kernels.cpu_ghost import ghost_backward, ghost_forward
from syncbn.kernels.cpu_one_group import LONG, SHORT, is_far
from syncbn.kernels.cpu_stats import channel_sums, native_affine, sums_of_moments
from syncbn.kernels.layout import Layout, layout_of

_aten = torch.ops.aten

_SMALL = 1 << 19
"""Elements up to which torch's own statistics of planes serve: it goes over them slowly, but with few calls."""
_TINY = 1e-30
"""An eps below this may leave a variance that is no float32, and an infinite standard deviation's inverse."""


class Local(NamedTuple):
    """What the forward pass returns; all but y is for the backward pass, in the compute dtype: (C,), or of each group
    (G, C)."""

    y: Tensor
    mean: Tensor
    invstd: Tensor
    scale: Tensor | None
    """The weight, times r."""
    r: Tensor | None
    d: Tensor | None


def local_native(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> Tensor | None:
    """All of a plain layer by torch's own operator and its autograd, and the running statistics looked at before use.

    None, and nothing is changed, where that is not fast or not exact enough, or a mean is far from zero or a value not
    finite.
    """
    layout = _layout(x, weight, bias, running, eps)
    if layout is None or not _is_small(layout, x) or (running is not None and running.divisor is not None):
        return None
    if x.dtype != compute_dtype(x) or not (layout.planes or x.dim() in (2, 4, 5)):
        return None  # torch's statistics would be narrow without parameters, and its output contiguous
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        # Activation checkpointing ends its second pass as soon as it has what was saved: the other form updates the
        # running statistics before it saves.
        return None
    factor = 0.0
    new_mean = new_var = None
    if running is not None:
        factor = weight_of_new(running)
        new_mean, new_var = running.mean.clone(), running.var.clone()
    y, mean, invstd = torch.native_batch_norm(x, weight, bias, new_mean, new_var, True, factor, eps)
    if is_far(mean, invstd):
        return None
    if running is not None:
        assert new_mean is not None
        assert new_var is not None
        if not float(torch.dot(new_var, new_var)) < math.inf:
            return None
        running.mean.copy_(new_mean)
        running.var.copy_(new_var)
        running.num_batches_tracked.add_(1)
    return y


def _layout(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> Layout | None:
    """The layout of ``x`` where native kernels can serve at all."""
    dtype = compute_dtype(x)
    layout = layout_of(x, None, 1)
    if layout is None or x.numel() < 2 * layout.c or any(t is not None and t.dtype != dtype for t in (weight, bias)):
        return None
    if running is not None and (running.mean.dtype != dtype or running.mode != "mean"):
        return None
    return layout if eps >= _TINY else None


def _is_small(layout: Layout, x: Tensor) -> bool:
    return x.numel() <= (_SMALL if layout.planes else SHORT * layout.c)


def local_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    limits: Limits | None = None,
    update: bool = True,
    groups: Tensor | None = None,
    num_groups: int = 1,
) -> Local | None:
    """Normalize ``x`` (N, C, *) by its own statistics and update the running ones: as the twins do it in three steps.

    None, and nothing is changed, where the tensors do not fit the native kernels, or a mean is far from zero or a value
    not finite, so that more care is needed.
    """
    layout = _layout(x, weight, bias, running, eps)
    if layout is None:
        return None
    if groups is not None and limits is None:
        found = ghost_forward(x, weight, bias, running if update else None, eps, groups, num_groups)
        return None if found is None else Local(*found, weight, None, None)
    if groups is not None or (running is not None and running.divisor is not None):
        return None
    dtype = compute_dtype(x)
    moments = _small_moments(layout, x) if _is_small(layout, x) else _moments(layout, x)
    if moments is None:
        return None
    mean, var = moments
    invstd = (var + eps).rsqrt_()
    if is_far(mean, invstd) or not float(var.max()) < LARGE:
        return None
    r = d = None
    scale, shift = weight, bias
    if limits is not None:
        assert running is not None, "corrections are relative to running statistics"
        r, d = (t.to(dtype) for t in host_corrections(mean, invstd, running, eps, limits))
        scale, shift = (r, d) if weight is None else (weight * r, weight * d)
        shift = shift if bias is None else shift.add_(bias)
    if running is not None and update:
        update_running(running, mean, var, x.numel() // layout.c)
    mean, invstd = mean.to(dtype), invstd.to(dtype)
    y = torch.empty_like(x)
    native_affine(layout.native(x), scale, shift, layout.native(y), mean, var.to(dtype), eps)
    return Local(y, mean, invstd, scale, r, d)


def _small_moments(layout: Layout, x: Tensor) -> tuple[Tensor, Tensor] | None:
    if x.dtype != compute_dtype(x):
        return None
    mean, var = torch.batch_norm_update_stats(layout.native(x), None, None, 0.0)
    return mean, var


def _moments(layout: Layout, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance (C,) float64, exact for any number of elements."""
    if x.dtype != compute_dtype(x) and not layout.planes:
        return None
    matrix = layout.matrix(x)
    found = channel_sums(layout, matrix) if layout.planes else sums_of_moments(layout, matrix)
    if found is None:
        return None
    mean, square = (t.view(-1).div_(x.numel() // layout.c) for t in found)
    return mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)


def local_backward(
    grad_output: Tensor, x: Tensor, found: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that ``needs`` asks for; ``found`` is :class:`Local` without y."""
    mean, invstd, scale, r, d = found
    assert mean is not None
    assert invstd is not None
    if mean.dim() == 2:
        return ghost_backward(grad_output, x, scale, mean, invstd, needs)
    layout = layout_of(x, None, 1)
    assert layout is not None, "the forward pass took it"
    if not layout.planes and layout.elements > LONG:
        return _backward_by_blocks(grad_output, x, Local(x, mean, invstd, scale, r, d), needs)
    mask = needs if d is None else [needs[0], needs[1], needs[1] or needs[2]]
    grad, grad_scale, grad_shift = _aten.native_batch_norm_backward(
        layout.native(grad_output), layout.native(x), scale, None, None, mean, invstd, True, 0.0, mask
    )
    if grad is not None:
        grad = layout.from_native(grad)
    if r is None or d is None or grad_scale is None:
        return grad, grad_scale, grad_shift
    return grad, torch.addcmul(grad_scale * r, grad_shift, d), grad_shift if needs[2] else None


def _backward_by_blocks(
    grad_output: Tensor, x: Tensor, found: Local, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same by the general kernels, which do not add up more values than are exact enough."""
    mean, invstd = (t.to(WIRE_DTYPE).unsqueeze(0) for t in (found.mean, found.invstd))
    scale = None if found.scale is None else found.scale.unsqueeze(0)
    _, _, sums = backward_sums(grad_output, x, mean, invstd, scale, None, None, 1)
    scaled = sums if scale is None else sums * scale.unsqueeze(1)
    n = x.numel() // x.shape[1]
    grad = grad_input(grad_output, x, mean, invstd, scale, None, scaled / n) if needs[0] else None
    grad_shift, grad_scale = sums[0].unbind(0)
    if found.r is not None and found.d is not None:
        grad_scale = grad_scale * found.r + grad_shift * found.d
    dtype = found.mean.dtype
    return grad, grad_scale.to(dtype) if needs[1] else None, grad_shift.to(dtype) if needs[2] else None
