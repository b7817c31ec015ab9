"""The parts that the Triton kernels over x share.

A tensor (N, C, *) is treated as (N, C, S) with three strides in elements: sample, channel, position. The work is
divided into *items* of ``BLOCK_ROWS`` positions of one sample. (If nothing depends on the sample, all samples may be
treated as one.) A program takes ``per_program`` consecutive items and ``BLOCK_COLS`` channels, so a tile is
(BLOCK_ROWS, BLOCK_COLS). The start of a tile is int64. Offsets within it are int32, which halves the registers of a
kernel, except with ``FAR``, for tensors in which they do not suffice.

``GROUPS`` says how the group of a tile is found:

* ``NO_GROUPS``: there is one.
* ``PER_SAMPLE``: ``groups[sample]``, the same for the whole tile.
* ``PER_ROW``: ``groups[row // row_size]``, as samples of ``row_size`` positions follow one another.

Elementwise arithmetic is in ``COMPUTE``: float32, or float64 for float64 input. Coefficients, and sums over more than a
tile, are float64.
"""

# ruff: noqa: RET505 (Triton compiles what follows a return; an `else` is left out if it does not apply)
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NO_GROUPS = tl.constexpr(0)
PER_SAMPLE = tl.constexpr(1)
PER_ROW = tl.constexpr(2)


# -- tiles -------------------------------------------------------------------------------------------------------------


@triton.jit
def columns(channels, BLOCK_COLS: tl.constexpr):
    """This program's channels, (1, BLOCK_COLS) int64, and which of them exist."""
    cols = tl.program_id(1).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return cols, cols < channels


@triton.jit
def item_rows(item, blocks, size, BLOCK_ROWS: tl.constexpr):
    """An item's sample and first position, int64, its positions (BLOCK_ROWS, 1), and which of them exist."""
    sample = (item // blocks).to(tl.int64)
    first = (item % blocks).to(tl.int64) * BLOCK_ROWS
    rows = first + tl.arange(0, BLOCK_ROWS)[:, None]
    return sample, first, rows, rows < size


@triton.jit
def place(tensor, strides, sample, first, FAR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Pointers to the elements of a tile."""
    corner = sample * strides[0] + first * strides[2] + tl.program_id(1).to(tl.int64) * BLOCK_COLS * strides[1]
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    if FAR:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    return tensor + corner + (rows * strides[2] + cols * strides[1])


@triton.jit
def item_groups(groups, sample, rows, inside, row_size, GROUPS: tl.constexpr):
    """The group of an item: a scalar, or (BLOCK_ROWS, 1)."""
    if GROUPS == PER_SAMPLE:
        return tl.load(groups + sample)
    else:
        return tl.load(groups + rows // row_size, inside, other=0)


@triton.jit
def group_range(group, inside, GROUPS: tl.constexpr):
    """The least and the greatest group of an item."""
    if GROUPS == PER_SAMPLE:
        return group, group
    else:
        least = tl.min(tl.min(tl.where(inside, group, 0x7FFFFFFF), 1), 0)
        return least, tl.max(tl.max(tl.where(inside, group, -1), 1), 0)


# -- coefficients ------------------------------------------------------------------------------------------------------


class Tensors(NamedTuple):
    """Pointers to the tensors that a kernel reads and writes, or None. A second one has their strides."""

    x: Any
    dy: Any
    residual: Any
    out: Any


class Coefficients(NamedTuple):
    """:class:`syncbn.functional.normalize.Affine` with its strides, as ``coefficients`` takes it."""

    mean: Any
    """(G, C) float64, contiguous, as ``invstd``."""
    invstd: Any
    scale: Any
    """(G, C) of any floating dtype, as ``shift``, or None."""
    shift: Any
    scale_strides: Any
    shift_strides: Any


@triton.jit
def coefficients(affine, group, cols, known, channels, COMPUTE: tl.constexpr):
    """``(x - high) * slope + constant`` for channels of a group: see ``split_mean`` in the twin."""
    at = group * channels + cols
    mean = tl.load(affine.mean + at, known, other=0.0)
    slope = tl.load(affine.invstd + at, known, other=0.0)
    high = mean.to(COMPUTE)
    if affine.scale is not None:
        at = group * affine.scale_strides[0] + cols * affine.scale_strides[1]
        slope *= tl.load(affine.scale + at, known, other=0.0).to(tl.float64)
    constant = (high.to(tl.float64) - mean) * slope
    if affine.shift is not None:
        at = group * affine.shift_strides[0] + cols * affine.shift_strides[1]
        constant += tl.load(affine.shift + at, known, other=0.0).to(tl.float64)
    return high, slope.to(COMPUTE), constant.to(COMPUTE)


@triton.jit
def gradient_coefficients(affine, means, means_strides, group, cols, known, channels, COMPUTE: tl.constexpr):
    """The part of grad_input that does not depend on dz is ``(x - high) * slope + constant``."""
    at = group * channels + cols
    mean = tl.load(affine.mean + at, known, other=0.0)
    invstd = tl.load(affine.invstd + at, known, other=0.0)
    place = means + group * means_strides[0] + cols * means_strides[2]
    mean_dz = tl.load(place, known, other=0.0)
    slope = -invstd * invstd * tl.load(place + means_strides[1], known, other=0.0)
    low = mean - mean.to(COMPUTE).to(tl.float64)
    return slope.to(COMPUTE), (-invstd * mean_dz - slope * low).to(COMPUTE)


# -- activations -------------------------------------------------------------------------------------------------------


@triton.jit
def activate(z, negative_slope, ACTIVATION: tl.constexpr):
    # Not a number stays so: no comparison with it holds.
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, z, z * tl.full([], negative_slope, z.dtype))
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        return z


@triton.jit
def activation_grad(dy, z, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, dy, dy * tl.full([], negative_slope, z.dtype))
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return dy * (s * (1.0 + z * (1.0 - s)))
    else:
        return dy
