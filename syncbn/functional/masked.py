"""Masked input: only some elements are valid. Shapes as in :mod:`syncbn.functional.statistics`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncbn.functional.statistics import ONE_GROUP, WIRE_DTYPE, Groups, compute_dtype, merge_samples, per_sample


def fill(x: Tensor, mask: Tensor, groups: Groups = ONE_GROUP) -> tuple[Tensor, Tensor]:
    """Fill the invalid places of ``x`` by values whose part in :func:`group_sums` is known.

    The sums of the valid elements are those of the filled input minus those of the filling. So no step after this one
    needs the mask, and no shape depends on its values. An invalid place gets the mean of the valid elements of its
    sample and channel, or 0 if there are none. A value far from these would take digits from the sum of squares.

    Args:
        x: (N, C, *). What is at invalid places does not matter, and gets no gradient.
        mask: (N, 1, *) bool, True where the element is valid in all channels.
        groups: which samples share statistics.

    Returns:
        The filled ``x``, and the :func:`group_sums` of the filling, (G, 2C + 1) float64, which are constants.
    """
    n, c = x.shape[0], x.shape[1]
    dims = per_sample(x)
    if dims:
        count = mask.sum(dims, keepdim=True)
        total = zero_invalid(x.detach(), mask).sum(dims, keepdim=True, dtype=compute_dtype(x))
        filling = (total / count.clamp(min=1)).to(x.dtype)
        places = math.prod(x.shape[2:]) - count
    else:
        filling, places = torch.zeros_like(x), ~mask
    number, value = places.reshape(n, 1).to(WIRE_DTYPE), filling.reshape(n, c).to(WIRE_DTYPE)
    sums = torch.cat((number, number * value, number * value.square()), 1)
    return torch.where(mask, x, filling), merge_samples(sums, groups)


def zero_invalid(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` (N, C, *) with 0 where ``mask`` (N, 1, *) is False. Gradients are 0 there too, even of NaN."""
    return torch.where(mask, x, 0.0)
