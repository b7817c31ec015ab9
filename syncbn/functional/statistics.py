"""Statistics of groups of samples: what travels between processes, and the moments computed from it.

Shapes used throughout: ``x`` is (N, C, *) with any number of further dimensions, and G is the number of ghost groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

WIRE_DTYPE = torch.float64
"""The dtype of everything that is reduced, whatever the input's. Ranks whose inputs differ in dtype (autocast, an empty
batch) still send the same bytes, counts are exact up to 2^53, and E[x^2] - E[x]^2 loses only (mean/std)^2 * 1e-16."""


class Groups(NamedTuple):
    """Which samples of a batch share statistics."""

    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    """Ghost group of each sample, (N,) int64 with ``0 <= index[i] < number``; None if all samples are in group 0."""
    number: int = 1
    """G, including groups that have no sample on this process."""


ONE_GROUP = Groups()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of elementwise arithmetic on ``x``: float32 for half precision, else the dtype of ``x``."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def per_sample(x: Tensor) -> tuple[int, ...]:
    """The dimensions of ``x`` (N, C, *) after the channels."""
    return tuple(range(2, x.dim()))


def spread(values: Tensor, groups: Groups, x: Tensor) -> Tensor:
    """Values per group (G, C) shaped to broadcast over ``x`` (N, C, *) in its compute dtype: (N or 1, C, 1, ...)."""
    if groups.index is not None:
        values = values.index_select(0, groups.index)
    return values.to(compute_dtype(x)).reshape(values.shape + (1,) * (x.dim() - 2))


def merge_samples(values: Tensor, groups: Groups) -> Tensor:
    """The sum of values per sample (N, K) within each group: (G, K). A group without samples has zeros."""
    if groups.index is None:
        assert groups.number == 1, "several groups need an index"
        return values.sum(0, keepdim=True)
    return values.new_zeros(groups.number, values.shape[1]).index_add(0, groups.index, values)


def group_sums(x: Tensor, groups: Groups = ONE_GROUP) -> Tensor:
    """Count, sum and sum of squares of each channel in each group.

    The elements are centred on their own sample's mean before they are squared, and the centre is put back in float64
    (Chan, Golub, LeVeque 1983, eq. 2.1), so that float32 input with |mean| >> std loses no precision.

    Args:
        x: (N, C, *), any floating dtype; N may be 0.
        groups: which samples share statistics.

    Returns:
        (G, 2C + 1) float64: the count (elements per channel), C sums, C sums of squares. They are additive: the sums of
        a batch are the sums over its parts.
    """
    n, c = x.shape[0], x.shape[1]
    dims = per_sample(x)
    size = math.prod(x.shape[2:])
    if dims:
        wide = x.to(compute_dtype(x))
        # Any centre near the values gives the same sums, so no gradient has to flow through it.
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
    return merge_samples(torch.cat((count, sums, squares), 1), groups)


def group_counts(x: Tensor, groups: Groups = ONE_GROUP) -> Tensor:
    """The count of :func:`group_sums` alone, (G, 1) float64."""
    size = math.prod(x.shape[2:])
    return merge_samples(torch.full((x.shape[0], 1), size, dtype=WIRE_DTYPE, device=x.device), groups)


def moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance from (reduced) :func:`group_sums`.

    Args:
        sums: (G, 2C + 1) float64.

    Returns:
        count (G, 1), mean (G, C), var (G, C), float64. An empty group has count, mean and variance 0.
    """
    c = (sums.shape[1] - 1) // 2
    count, total, squares = sums.split((1, c, c), 1)
    count = count.clone()  # a view, saved for the backward pass, would keep all sums alive
    n = count.clamp(min=1)
    mean = total / n
    var = (squares / n - mean.square()).clamp(min=0)
    return count, mean, var
