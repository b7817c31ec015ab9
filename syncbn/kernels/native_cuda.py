"""The passes on CUDA by torch's own batch-normalization kernels, for machines without Triton.

They take one group of samples and know no epilogue, and they keep the memory format of contiguous and 4-D channels_last
input alone; whatever else goes to the functional twins. Where a kernel would keep less than the twin promises it is
given other numbers, or not used:

* ``batch_norm_stats`` returns the mean in float32 unless the input is float64. For half precision that is enough: its
  values have 11 bits, so |mean|/std is at most some 2^11 and the mean's rounding at most 2^-13 standard deviations, and
  2^-16 in bfloat16: below a rounding of the output. For float32 it is not (6e-4 standard deviations at |mean|/std of
  1e4), so there the twin runs.
* ``batch_norm_elemt`` and the backward kernels take any mean: they are given the part of it that they can represent,
  and the rest goes into the constant term, as in the twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.functional import normalize as twin
from syncbn.functional import stats as stats_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import finish
from syncbn.functional.stats import WIRE_DTYPE, compute_dtype

__all__ = ["backward_sums", "finish", "grad_input", "group_sums", "normalize"]

_EPS = 2.0**-126
"""Added to the variance where the variance alone is wanted: else an invstd of 0 could be that of 0 or of infinity."""
_LEAST_SLOPE = 2.0**-40
"""The backward kernel multiplies by the slope last, so that what is added is divided by it first."""


def _fits(x: Tensor, groups: Tensor | None, epilogue: Epilogue) -> bool:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return groups is None and not epilogue and x.numel() > 0 and (channels_last or x.is_contiguous())


def _row(values: Tensor, x: Tensor) -> Tensor:
    """The one group's values (C,) in the dtype of the kernels' arithmetic."""
    return values[0].to(compute_dtype(x)).contiguous()


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """As :func:`syncbn.functional.stats.group_sums`."""
    if x.dtype == torch.float32 or not _fits(x, groups, NO_EPILOGUE):
        return stats_twin.group_sums(x, groups, num_groups)
    mean, invstd = (t.to(WIRE_DTYPE) for t in torch.batch_norm_stats(x, _EPS))
    var = (invstd.square().reciprocal() - _EPS).clamp(min=0)
    count = x.numel() // x.shape[1]
    return torch.cat((mean.new_full((1,), count), count * mean, count * (var + mean.square()))).unsqueeze(0)


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`."""
    if not _fits(x, groups, epilogue):
        return twin.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    high, low = twin.split_mean(mean, x)
    slope = invstd if scale is None else invstd * scale
    constant = -low * slope if shift is None else shift - low * slope
    return torch.batch_norm_elemt(x, None, _row(constant, x), _row(high, x), _row(slope, x), 0.0)


def backward_sums(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue = NO_EPILOGUE,
) -> tuple[Tensor, Epilogue, Tensor]:
    """As :func:`syncbn.functional.normalize.backward_sums`."""
    if not _fits(x, groups, epilogue):
        return twin.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
    dy = _like(grad_output, x)
    high, low = twin.split_mean(mean, x)
    sum_dz, sum_dz_xmu, _, _ = torch.batch_norm_backward_reduce(
        dy, x, _row(high, x), _row(invstd, x), None, True, False, False
    )
    sum_dz, sum_dz_xmu = sum_dz.to(WIRE_DTYPE), sum_dz_xmu.to(WIRE_DTYPE)
    return dy, NO_EPILOGUE, torch.stack((sum_dz.unsqueeze(0), (sum_dz_xmu - low * sum_dz) * invstd), 1)


def grad_input(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    means: Tensor,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.grad_input`."""
    if not _fits(x, groups, epilogue):
        return twin.grad_input(dz, x, mean, invstd, scale, shift, means, groups, epilogue)
    high, low = twin.split_mean(mean, x)
    mean_dz, mean_dz_xhat = means.unbind(1)
    slope_x = -invstd.square() * mean_dz_xhat
    constant = -invstd * mean_dz - slope_x * low
    slope_dz = (invstd if scale is None else invstd * scale).to(WIRE_DTYPE)
    slope_dz = torch.copysign(slope_dz.abs().clamp(min=_LEAST_SLOPE), slope_dz)
    # The kernel: (dz - sum_dy / count - (x - mean) * invstd^2 * sum_dy_xmu / count) * invstd * weight.
    sum_dy, sum_dy_xmu = _row(-constant / slope_dz, x), _row(-slope_x / slope_dz, x)
    one, count = torch.ones_like(sum_dy), torch.ones(1, dtype=torch.int32, device=x.device)
    weight = _row(slope_dz, x)
    return torch.batch_norm_backward_elemt(_like(dz, x), x, _row(high, x), one, weight, sum_dy, sum_dy_xmu, count)


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the layout of ``x``: the kernels for channels_last want both in it."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
