"""The Triton kernels that read x. :mod:`syncbn.kernels.cuda.functions` launches them and describes their results.

:mod:`syncbn.kernels.cuda.tiles` describes the arguments and how the work is divided.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.kernels.cuda.tiles import (
    NO_GROUPS,
    activate,
    activation_grad,
    coefficients,
    columns,
    gradient_coefficients,
    group_range,
    item_groups,
    item_rows,
    place,
)

# Arguments that may change from launch to launch without a new compilation.
_SIZES = ["blocks", "items", "per_program", "row_size"]


# -- sums --------------------------------------------------------------------------------------------------------------


@triton.jit
def add_centred(count, total, squares, tile, members, number):
    """Add the ``number`` rows of a tile that are members, centred on their mean; the centre is put back in float64."""
    centre = tl.sum(tl.where(members, tile, 0.0), 0, keep_dims=True) / number.to(tile.dtype)
    centred = tl.where(members, tile - centre, 0.0)
    part = tl.sum(centred, 0, keep_dims=True).to(tl.float64)
    square = tl.sum(centred * centred, 0, keep_dims=True).to(tl.float64)
    centre, n = centre.to(tl.float64), number.to(tl.float64)
    return count + number, total + (part + n * centre), squares + (square + centre * (2 * part + n * centre))


@triton.jit
def add_products(total, products, dz, centred, members):
    total += tl.sum(tl.where(members, dz, 0.0), 0, keep_dims=True).to(tl.float64)
    products += tl.sum(tl.where(members, dz * centred, 0.0), 0, keep_dims=True).to(tl.float64)
    return total, products


@triton.jit
def number_of(members):
    """The number of true elements of (BLOCK_ROWS, 1)."""
    return tl.sum(tl.sum(members.to(tl.int32), 1), 0)


@triton.jit
def add_group_sums(sums, group, cols, known, channels, count, total, squares):
    row = sums + group * (2 * channels + 1)
    tl.atomic_add(row, count.to(tl.float64), mask=tl.program_id(1) == 0, sem="relaxed")
    tl.atomic_add(row + 1 + cols, total, mask=known, sem="relaxed")
    tl.atomic_add(row + 1 + channels + cols, squares, mask=known, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def group_sums_kernel(
    x,
    sums,
    groups,
    strides,
    size,
    channels,
    blocks,
    items,
    per_program,
    row_size,
    GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Adds to sums (G, 2C + 1) whenever another group begins, and at the end."""
    cols, known = columns(channels, BLOCK_COLS)
    zero = tl.full([], 0, tl.int64)
    current = zero if GROUPS == NO_GROUPS else zero - 1
    nothing = tl.full([1, BLOCK_COLS], 0.0, tl.float64)
    count, total, squares = zero, nothing, nothing
    start = tl.program_id(0) * per_program
    for item in range(start, tl.minimum(start + per_program, items)):
        sample, first, rows, inside = item_rows(item, blocks, size, BLOCK_ROWS)
        tile = tl.load(place(x, strides, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), inside & known, other=0.0).to(
            COMPUTE
        )
        if GROUPS == NO_GROUPS:
            number = number_of(inside)
            count, total, squares = add_centred(count, total, squares, tile, inside, number)
        else:
            group = item_groups(groups, sample, rows, inside, row_size, GROUPS)
            least, greatest = group_range(group, inside, GROUPS)
            for each in range(least, greatest + 1):
                members = inside & (group == each)
                number = number_of(members)
                if number > 0:
                    if each != current:
                        if current >= 0:
                            add_group_sums(sums, current, cols, known, channels, count, total, squares)
                        count, total, squares = zero, nothing, nothing
                        current = zero + each
                    count, total, squares = add_centred(count, total, squares, tile, members, number)
    if current >= 0:
        add_group_sums(sums, current, cols, known, channels, count, total, squares)


# -- sums for the gradient ---------------------------------------------------------------------------------------------


@triton.jit
def add_gradient_sums(sums, affine, group, cols, known, channels, total, products, COMPUTE: tl.constexpr):
    """``products`` are sums of dz * (x - high)."""
    at = group * channels + cols
    mean = tl.load(affine.mean + at, known, other=0.0)
    low = mean - mean.to(COMPUTE).to(tl.float64)
    products = (products - low * total) * tl.load(affine.invstd + at, known, other=0.0)
    place = sums + group * 2 * channels + cols
    tl.atomic_add(place, total, mask=known, sem="relaxed")
    tl.atomic_add(place + channels, products, mask=known, sem="relaxed")


@triton.jit
def item_dz(
    tensors,
    strides,
    sample,
    first,
    mask,
    coefficient,
    negative_slope,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A tile of dz, which is written where there is a place for it, and of x - high."""
    high, slope, constant = coefficient
    centred = (
        tl.load(place(tensors.x, strides.x, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0).to(COMPUTE)
        - high
    )
    dz = tl.load(place(tensors.dy, strides.dy, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0).to(COMPUTE)
    if ACTIVATION is not None:
        z = centred * slope + constant
        if tensors.residual is not None:
            z += tl.load(
                place(tensors.residual, strides.residual, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0
            ).to(COMPUTE)
        dz = activation_grad(dz, z, negative_slope, ACTIVATION)
    if tensors.out is not None:
        rounded = dz.to(tensors.out.dtype.element_ty)
        tl.store(place(tensors.out, strides.out, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), rounded, mask)
        dz = rounded.to(COMPUTE)
    return dz, centred


@triton.jit(do_not_specialize=_SIZES)
def backward_sums_kernel(
    tensors,
    strides,
    sums,
    affine,
    groups,
    negative_slope: tl.float64,
    size,
    channels,
    blocks,
    items,
    per_program,
    row_size,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Adds to sums (G, 2, C), as ``group_sums_kernel`` does."""
    cols, known = columns(channels, BLOCK_COLS)
    zero = tl.full([], 0, tl.int64)
    current = zero if GROUPS == NO_GROUPS else zero - 1
    nothing = tl.full([1, BLOCK_COLS], 0.0, tl.float64)
    total, products = nothing, nothing
    if GROUPS == NO_GROUPS:
        shared = coefficients(affine, zero, cols, known, channels, COMPUTE)
    start = tl.program_id(0) * per_program
    for item in range(start, tl.minimum(start + per_program, items)):
        sample, first, rows, inside = item_rows(item, blocks, size, BLOCK_ROWS)
        mask = inside & known
        if GROUPS == NO_GROUPS:
            own = shared
        else:
            group = item_groups(groups, sample, rows, inside, row_size, GROUPS)
            own = coefficients(affine, group, cols, known, channels, COMPUTE)
        dz, centred = item_dz(
            tensors, strides, sample, first, mask, own, negative_slope, ACTIVATION, COMPUTE, FAR, BLOCK_ROWS, BLOCK_COLS
        )
        if GROUPS == NO_GROUPS:
            total, products = add_products(total, products, dz, centred, inside)
        else:
            least, greatest = group_range(group, inside, GROUPS)
            for each in range(least, greatest + 1):
                members = inside & (group == each)
                if number_of(members) > 0:
                    if each != current:
                        if current >= 0:
                            add_gradient_sums(sums, affine, current, cols, known, channels, total, products, COMPUTE)
                        total, products = nothing, nothing
                        current = zero + each
                    total, products = add_products(total, products, dz, centred, members)
    if current >= 0:
        add_gradient_sums(sums, affine, current, cols, known, channels, total, products, COMPUTE)


# -- elementwise -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def normalize_kernel(
    tensors,
    strides,
    affine,
    groups,
    negative_slope: tl.float64,
    size,
    channels,
    blocks,
    items,
    per_program,
    row_size,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols, known = columns(channels, BLOCK_COLS)
    if GROUPS == NO_GROUPS:
        shared = coefficients(affine, tl.full([], 0, tl.int64), cols, known, channels, COMPUTE)
    start = tl.program_id(0) * per_program
    for item in range(start, tl.minimum(start + per_program, items)):
        sample, first, rows, inside = item_rows(item, blocks, size, BLOCK_ROWS)
        mask = inside & known
        if GROUPS == NO_GROUPS:
            high, slope, constant = shared
        else:
            group = item_groups(groups, sample, rows, inside, row_size, GROUPS)
            high, slope, constant = coefficients(affine, group, cols, known, channels, COMPUTE)
        centred = (
            tl.load(place(tensors.x, strides.x, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0).to(
                COMPUTE
            )
            - high
        )
        z = centred * slope + constant
        if tensors.residual is not None:
            z += tl.load(
                place(tensors.residual, strides.residual, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0
            ).to(COMPUTE)
        y = activate(z, negative_slope, ACTIVATION)
        tl.store(
            place(tensors.out, strides.out, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS),
            y.to(tensors.out.dtype.element_ty),
            mask,
        )


@triton.jit(do_not_specialize=_SIZES)
def grad_input_kernel(
    tensors,
    strides,
    affine,
    means,
    means_strides,
    groups,
    negative_slope: tl.float64,
    size,
    channels,
    blocks,
    items,
    per_program,
    row_size,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols, known = columns(channels, BLOCK_COLS)
    if GROUPS == NO_GROUPS:
        zero = tl.full([], 0, tl.int64)
        shared = coefficients(affine, zero, cols, known, channels, COMPUTE)
        shared_gradient = gradient_coefficients(affine, means, means_strides, zero, cols, known, channels, COMPUTE)
    start = tl.program_id(0) * per_program
    for item in range(start, tl.minimum(start + per_program, items)):
        sample, first, rows, inside = item_rows(item, blocks, size, BLOCK_ROWS)
        mask = inside & known
        if GROUPS == NO_GROUPS:
            high, slope, constant = shared
            slope_x, constant_x = shared_gradient
        else:
            group = item_groups(groups, sample, rows, inside, row_size, GROUPS)
            high, slope, constant = coefficients(affine, group, cols, known, channels, COMPUTE)
            slope_x, constant_x = gradient_coefficients(
                affine, means, means_strides, group, cols, known, channels, COMPUTE
            )
        centred = (
            tl.load(place(tensors.x, strides.x, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0).to(
                COMPUTE
            )
            - high
        )
        dz = tl.load(place(tensors.dy, strides.dy, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS), mask, other=0.0).to(
            COMPUTE
        )
        dz = activation_grad(dz, centred * slope + constant, negative_slope, ACTIVATION)
        dx = centred * slope_x + constant_x + dz * slope
        tl.store(
            place(tensors.out, strides.out, sample, first, FAR, BLOCK_ROWS, BLOCK_COLS),
            dx.to(tensors.out.dtype.element_ty),
            mask,
        )
