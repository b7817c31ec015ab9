"""Ghost batches on the CPU where nothing travels: equal runs of consecutive samples, each in the cache in its turn."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.functional.finish import Running
from syncbn.functional.stats import compute_dtype
from syncbn.kernels.cpu import normalize
from syncbn.kernels.cpu_finish import LARGE, move_running
from syncbn.kernels.cpu_one_group import is_far
from syncbn.kernels.cpu_stats import plane_sums
from syncbn.kernels.layout import Layout, is_consecutive, layout_of

_aten = torch.ops.aten

_FEW = 1 << 14
"""Elements of a group below which several groups are better worked on together, as the general kernels do."""
_SHORT = 1 << 12
"""Elements a channel and group up to which torch's own statistics serve for interleaved values."""


def ghost_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    groups: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y, and mean and invstd of each group (G, C) in the compute dtype; the running statistics are updated.

    None, and nothing is changed, where the groups are no equal runs, or more care is needed.
    """
    if x.numel() == 0 or not is_consecutive(groups, num_groups) or x.dtype != compute_dtype(x):
        return None
    layout = layout_of(x, None, 1)
    n = x.numel() // x.shape[1] // num_groups
    if layout is None or n < 2 or n * layout.c < _FEW or (not layout.planes and n > _SHORT):
        return None
    if layout.planes:
        found = _planes(layout, x, weight, bias, eps, groups, num_groups, n)
    else:
        found = _runs(x, weight, bias, eps, num_groups)
    if found is None:
        return None
    y, mean, invstd, unbiased = found
    if running is not None:
        divisor = running.divisor or num_groups
        move_running(running, mean.sum(0) / divisor, unbiased.sum(0) / divisor)
    return y, mean.to(x.dtype), invstd.to(x.dtype)


def _planes(
    layout: Layout,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: Tensor,
    num_groups: int,
    n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    found = plane_sums(layout, layout.matrix(x))
    mean, square = (t.view(num_groups, -1, layout.c).sum(1).div_(n) for t in found)
    var = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
    invstd = (var + eps).rsqrt_()
    if not _is_near(mean, invstd, var):
        return None
    scale, shift = (None if t is None else t.expand(num_groups, layout.c) for t in (weight, bias))
    return normalize(x, mean, invstd, scale, shift, groups), mean, invstd, var * (n / (n - 1))


def _runs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    y, c = torch.empty_like(x), x.shape[1]
    # Running statistics with a momentum of 1 are the mean and the unbiased variance.
    unbiased = torch.zeros(num_groups, c, dtype=x.dtype, device="cpu")
    mean, invstd, scratch = torch.empty_like(unbiased), torch.empty_like(unbiased), torch.zeros_like(unbiased[0])
    parts = zip(x.chunk(num_groups), y.chunk(num_groups), strict=True)
    inner = layout_of(x[: len(x) // num_groups], None, 1)
    assert inner is not None, "a run of whole samples is as dense as all"
    for (source, target), m, i, var in zip(parts, mean, invstd, unbiased, strict=True):
        _aten.native_batch_norm.out(
            inner.native(source), weight, bias, scratch, var, True, 1.0, eps,
            out=inner.native(target), save_mean=m, save_invstd=i,
        )  # fmt: skip
    return (y, mean, invstd, unbiased) if _is_near(mean, invstd, unbiased) else None


def _is_near(mean: Tensor, invstd: Tensor, var: Tensor) -> bool:
    return not is_far(mean, invstd) and float(torch.linalg.vector_norm(var, torch.inf)) < LARGE


def ghost_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that ``needs`` asks for."""
    num_groups = len(mean)
    inner = layout_of(x[: len(x) // num_groups], None, 1)
    layout = layout_of(x, None, 1)
    assert inner is not None
    assert layout is not None
    gradient = layout.tensor(layout.matrix(grad_output))
    grad = torch.empty_like(x) if needs[0] else None
    targets = [None] * num_groups if grad is None else grad.chunk(num_groups)
    parts = zip(x.chunk(num_groups), gradient.chunk(num_groups), targets, strict=True)
    sums: list[tuple[Tensor, Tensor]] = []
    for (source, dy, target), m, i in zip(parts, mean, invstd, strict=True):
        part, *of_parameters = _aten.native_batch_norm_backward(
            inner.native(dy), inner.native(source), weight, None, None, m, i, True, 0.0, needs
        )
        if target is not None:
            target.copy_(inner.from_native(part))
        sums.append(of_parameters)
    grad_weight, grad_bias = (
        torch.stack(t).sum(0) if need else None for t, need in zip(zip(*sums, strict=True), needs[1:], strict=True)
    )
    return grad, grad_weight, grad_bias
