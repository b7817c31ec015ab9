"""How a tensor lies in memory, and the blocks in which the CPU's kernels go over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional.stats import merge_samples

BLOCK = 1 << 17
"""Elements that are worked on at a time: with a scratch copy of them they stay in a core's second-level cache."""
WHOLE = 1 << 62
"""For a block that is as large as can be: one operation, which gains nothing from the cache."""
_LONGEST_RUN = 1 << 12
"""Rows of an interleaved block: torch's native kernel adds them up one after the other."""
_SMALL_UNIT = 1 << 14
"""Elements of a unit below which several are worked on together: a call costs as much as some 10,000 elements."""


class Block(NamedTuple):
    """A part of a tensor in which each coefficient is that of a channel in one group.

    A tensor's part, :meth:`of`, is (1, channels, elements, 1) for torch's native kernels, in a format that they know,
    or (units, elements, channels) where several small units are taken together.
    """

    layout: Layout
    start: int
    """In rows of the layout's matrix."""
    stop: int
    units: slice
    """Rows of the coefficients."""
    together: bool

    def of(self, matrix: Tensor) -> Tensor:
        """The block's part of a matrix of the layout."""
        return self.form(matrix[self.start : self.stop])

    def form(self, part: Tensor) -> Tensor:
        """Rows as many as the block's, in the block's form."""
        if self.together:
            return part.view(self.units.stop - self.units.start, -1, self.layout.c)
        rows, width = part.shape
        if self.layout.planes:
            return part.view(1, rows, width, 1)
        return part.as_strided((1, width, rows, 1), (part.numel(), 1, width, width))

    def coefficients(self, values: Tensor) -> Tensor:
        """Of this block, from values of all units (units, C) or (units,): 1-D, or (units, 1, C)."""
        part = values[self.units]
        if self.together:
            return part.unsqueeze(1)
        return part if self.layout.planes else part[0]

    def spread(self, values: Tensor) -> Tensor:
        """:meth:`coefficients` as they broadcast over the block's form."""
        return values if self.together else values.view(1, -1, 1, 1)

    def scratch(self, last: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows for :meth:`form`: those of ``last``, the block before, where they suffice."""
        rows = self.stop - self.start
        if last is not None and len(last) >= rows:
            return last[:rows]
        return torch.empty(rows, self.layout.width, dtype=dtype, device="cpu")


class Layout(NamedTuple):
    """A dense tensor (N, C, *) as a matrix, in one of two forms.

    * planes: ``x`` is contiguous; a row is a plane, the elements of one channel in one sample.
    * interleaved: channels are innermost; a row is one position of one sample, and a *unit* a run of consecutive rows
      that share coefficients: everything, a run of samples, or one sample.
    """

    shape: torch.Size
    planes: bool
    n: int
    c: int
    width: int
    """Columns of the matrix."""
    units: int
    """Runs of rows that share coefficients: n * c planes, or interleaved runs."""
    by_group: bool
    """Interleaved: whether a unit is a group, else it is a sample."""

    @property
    def elements(self) -> int:
        """Elements of a unit that belong to one channel."""
        return self.width if self.planes else self.n * math.prod(self.shape[2:]) // self.units

    def matrix(self, t: Tensor) -> Tensor:
        """``t``, of the same shape, as a matrix; copied where it lies in memory otherwise."""
        if not self.planes and t.dim() > 2:
            t = t.flatten(2).movedim(1, 2)
        return t.reshape(-1, self.width).contiguous()

    def native(self, t: Tensor) -> Tensor:
        """``t`` as torch's native kernels take it: (N, C, size, 1), or (1, C, N * size, 1) in channels_last."""
        memory_format = torch.contiguous_format if self.planes else torch.channels_last
        if len(self.shape) == 4 and math.prod(self.shape[2:]) > 1:
            return t.contiguous(memory_format=memory_format)
        matrix = self.matrix(t)
        if self.planes:
            return matrix.view(self.n, self.c, self.width, 1)
        return matrix.as_strided((1, self.c, len(matrix), 1), (matrix.numel(), 1, self.c, self.c))

    def per_unit(self, values: Tensor, groups: Tensor | None) -> Tensor:
        """Values per group (G, C) as coefficients of the units: (n * c,) for planes, (units, C) interleaved."""
        if self.planes:
            values = values.expand(self.n, self.c) if groups is None else values.index_select(0, groups)
            return values.reshape(-1)
        if self.by_group or groups is None:
            return values
        return values.index_select(0, groups)

    def merge(self, values: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
        """Sum values per sample (N, K), or per unit where a unit is a group, within each group: (G, K)."""
        if self.by_group:
            return values
        return merge_samples(values, groups, num_groups)

    def blocks(self, limit: int = BLOCK) -> Iterator[Block]:
        """Blocks of at most ``limit`` elements, or a row or small unit where that is more."""
        rows = math.prod(self.shape) // max(self.width, 1)
        if self.planes:
            step = max(1, limit // max(self.width, 1))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield Block(self, start, stop, slice(start, stop), False)
            return
        length = rows // max(self.units, 1)
        if self.units > 1 and length * self.width < _SMALL_UNIT:
            step = max(1, min(limit, BLOCK) // (length * self.width))
            for unit in range(0, self.units, step):
                last = min(unit + step, self.units)
                yield Block(self, unit * length, last * length, slice(unit, last), True)
            return
        step = max(1, limit // max(self.width, 1))
        if limit < WHOLE:
            step = min(step, _LONGEST_RUN)
        for unit in range(self.units):
            for start in range(unit * length, (unit + 1) * length, step):
                stop = min(start + step, (unit + 1) * length)
                yield Block(self, start, stop, slice(unit, unit + 1), False)


def layout_of(x: Tensor, groups: Tensor | None, num_groups: int) -> Layout | None:
    """The layout of ``x`` (N, C, *), or None where it is none of the two, empty, or cut into groups unfavourably."""
    n, c = x.shape[0], x.shape[1]
    size = math.prod(x.shape[2:])
    if x.numel() == 0:
        return None
    if size > 1 and x.is_contiguous():
        return Layout(x.shape, True, n, c, size, n * c, False)
    if not channels_innermost(x):
        return None
    if groups is None:
        return Layout(x.shape, False, n, c, c, 1, True)
    if is_consecutive(groups, num_groups):
        return Layout(x.shape, False, n, c, c, num_groups, True)
    return None if size == 1 else Layout(x.shape, False, n, c, c, n, False)


def channels_innermost(x: Tensor) -> bool:
    """Whether the C channels of a position of ``x`` (N, C, *) lie side by side, and nothing between the positions."""
    if x.dim() == 2:
        return x.is_contiguous()
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.movedim(1, -1).is_contiguous()


def is_consecutive(groups: Tensor, num_groups: int) -> bool:
    """Whether the groups are runs of equally many consecutive samples, in order."""
    n = groups.shape[0]
    if num_groups == 0 or n % num_groups or n == 0:
        return False
    runs = groups.reshape(num_groups, n // num_groups)
    return bool((runs == torch.arange(num_groups, device=groups.device).unsqueeze(1)).all())
