"""Statistics of groups of samples: what travels between processes, and what is made of it.

Shapes used throughout: ``x`` is (N, C, *) with any number of further dimensions; ``groups`` is an int64 tensor (N,)
with the group of each sample, 0 <= groups[i] < num_groups, or None where all samples are in group 0. G is
``num_groups``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The one dtype of everything that is reduced, whatever the input: ranks whose inputs differ in dtype (autocast, an
# empty batch) still send the same bytes, counts are exact to 2^53, and E[x^2] - E[x]^2 loses (mean/std)^2 * 1e-16 only.
WIRE_DTYPE = torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of elementwise arithmetic on ``x``: its own, and float32 for half precision."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def per_sample(x: Tensor) -> tuple[int, ...]:
    """The dimensions of ``x`` (N, C, *) within a sample: all from 2 on."""
    return tuple(range(2, x.dim()))


def spread(values: Tensor, groups: Tensor | None, x: Tensor) -> Tensor:
    """Values per group (G, C), laid out to broadcast over ``x`` (N, C, *) in its compute dtype: (N or 1, C, 1, ...)."""
    if groups is not None:
        values = values.index_select(0, groups)
    return values.to(compute_dtype(x)).reshape(values.shape + (1,) * (x.dim() - 2))


def merge_samples(values: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """Sum values per sample (N, K) within each group: (G, K). A group without samples is zeros."""
    if groups is None:
        assert num_groups == 1, "without a group of each sample there is one group"
        return values.sum(0, keepdim=True)
    return values.new_zeros(num_groups, values.shape[1]).index_add(0, groups, values)


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """Count, sum and sum of squares of each channel in each group.

    Args:
        x: (N, C, *), any floating dtype; N may be 0.
        groups: (N,) int64 or None.
        num_groups: G.

    Returns:
        (G, 2C + 1) float64: the count (elements a channel), C sums, C sums of squares. Additive: the sums of a batch
        are the sums of its parts, however it is cut.

    The elements are centred on their own sample's mean before they are squared, and the centre is put back in float64
    (Chan, Golub, LeVeque 1983, eq. 2.1), so float32 input with |mean| >> std loses nothing on the way.
    """
    n, c = x.shape[0], x.shape[1]
    dims = per_sample(x)
    size = math.prod(x.shape[2:])
    if dims:
        wide = x.to(compute_dtype(x))
        # Any centre near the values gives the same sums; that it depends on x is therefore no path for a gradient.
        centre = wide.detach().sum(dims, keepdim=True) / max(size, 1)
        centred = wide - centre
        centre = centre.reshape(n, c).to(WIRE_DTYPE)
        part = centred.sum(dims).to(WIRE_DTYPE)
        sums = part + size * centre
        squares = centred.square().sum(dims).to(WIRE_DTYPE) + centre * (2 * part + size * centre)
    else:
        sums = x.to(WIRE_DTYPE)
        squares = sums.square()
    count = sums.new_full((n, 1), size)
    return merge_samples(torch.cat((count, sums, squares), 1), groups, num_groups)


def moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance from (reduced) :func:`group_sums`.

    Args:
        sums: (G, 2C + 1) float64.

    Returns:
        count (G, 1), mean (G, C), var (G, C), float64. An empty group has count, mean and variance 0.
    """
    c = (sums.shape[1] - 1) // 2
    count, total, squares = sums.split((1, c, c), 1)
    count = count.clone()  # what is kept for a backward pass must not keep the sums alive
    n = count.clamp(min=1)
    mean = total / n
    var = (squares / n - mean.square()).clamp(min=0)
    return count, mean, var
