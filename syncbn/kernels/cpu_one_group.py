"""The passes on the CPU for one group without an epilogue, in as few calls as can be.

What the general kernels do block by block is one call each here, on the tensor as it is. A call costs as much as some
ten thousand elements, and with several processes on a host more: most layers of a network are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.functional.stats import WIRE_DTYPE, compute_dtype
from syncbn.kernels.cpu_stats import native_affine, native_sums
from syncbn.kernels.layout import Layout, layout_of

FAR = 8.0
"""``slope * x + constant`` loses |mean|/std roundings against ``slope * (x - mean) + shift``; beyond this many, which
are 5e-7 in float32, the slower form is taken."""
SHORT = 1 << 13
"""Elements a channel up to which torch's kernels add up interleaved values, which they do one after the other."""
LONG = 1 << 15
"""The same for torch's whole backward pass, where the general kernels take more time for it."""


def is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether a mean is far from 0, or not finite: then the elementwise step has to subtract it from the values."""
    product = mean * invstd
    return product.numel() > 0 and not float(torch.linalg.vector_norm(product, torch.inf)) <= FAR


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """As :func:`syncbn.functional.normalize.normalize`, or None where it does not serve."""
    layout = layout_of(x, None, 1)
    if layout is None or is_far(mean, invstd):
        return None
    dtype = compute_dtype(x)
    slope = (invstd if scale is None else invstd * scale)[0].to(dtype)
    constant = None if shift is None else shift[0].to(dtype)
    y = torch.empty_like(x)
    native_affine(layout.native(x), slope, constant, layout.native(y), mean[0].to(dtype))
    return y


def backward_sums(grad_output: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor | None:
    """The sums (1, 2, C) of :func:`syncbn.functional.normalize.backward_sums`, or None where it does not serve."""
    layout = layout_of(x, None, 1)
    if layout is None or not _adds_exactly(layout):
        return None
    high = mean[0].to(compute_dtype(x))
    sums = torch.stack(native_sums(layout.native(grad_output), layout.native(x), high)).to(WIRE_DTYPE)
    total, product = sums.unbind(0)
    product.addcmul_(mean[0] - high, total, value=-1).mul_(invstd[0])
    return sums.unsqueeze(0)


def _adds_exactly(layout: Layout) -> bool:
    return layout.planes or layout.elements <= SHORT


def grad_input(
    dz: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor | None, means: Tensor
) -> Tensor | None:
    """As :func:`syncbn.functional.normalize.grad_input`, or None where it does not serve."""
    layout = layout_of(x, None, 1)
    if layout is None or x.dtype != compute_dtype(x) or is_far(mean, invstd):
        return None
    mean_dz, mean_dz_xhat = means[0].unbind(0)
    factor = invstd[0]
    slope = (factor * mean_dz_xhat).mul_(factor).neg_()
    constant = torch.addcmul(factor * mean_dz, slope, mean[0]).neg_()
    slope_dz = factor if scale is None else factor * scale[0]
    slope, constant, slope_dz = torch.stack((slope, constant, slope_dz)).to(x.dtype).unbind(0)
    grad = torch.empty_like(x)
    result = native_affine(layout.native(x), slope, constant, layout.native(grad))
    result.addcmul_(layout.native(dz), slope_dz.view(1, -1, 1, 1))
    return grad
