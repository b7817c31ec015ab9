"""The Triton kernels that finish what a pass over x has summed. All arithmetic is float64."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Buffers(NamedTuple):
    """The running statistics, contiguous; all None if there are none."""

    mean: Any
    """(C,), as ``var``."""
    var: Any
    tracked: Any
    """() int64, as ``nonfinite``."""
    nonfinite: Any


class Results(NamedTuple):
    """(G, C), contiguous; var, r and d may be None. ``candidates`` (2, C) are the new running statistics."""

    mean: Any
    var: Any
    invstd: Any
    r: Any
    d: Any
    candidates: Any


@triton.jit
def clip(value, least, greatest):
    """NaN stays NaN, because no comparison with it is true."""
    return tl.where(value < least, least, tl.where(value > greatest, greatest, value))


@triton.jit
def ramp(steps, start, end):
    """As ``syncbn.functional.renorm.ramp``."""
    length = tl.maximum(end - start, 1).to(tl.float64)
    position = clip((steps - start).to(tl.float64) / length, 0.0, 1.0)
    return tl.where(steps >= end, 1.0, position)


@triton.jit
def write_corrections(results, buffers, at, cols, known, mask, mean, var, eps, r_max, d_max, warmup, r_end, d_end):
    steps = tl.load(buffers.tracked)
    r_limit = 1.0 + (r_max - 1.0) * ramp(steps, warmup, r_end)
    d_limit = d_max * ramp(steps, warmup, d_end)
    running_mean = tl.load(buffers.mean + cols, known, other=0.0).to(tl.float64)
    sigma = tl.sqrt(tl.load(buffers.var + cols, known, other=1.0).to(tl.float64) + eps)
    r = tl.sqrt(var + eps) / sigma
    d = (mean - running_mean) / sigma
    tl.store(results.r + at, clip(r, 1.0 / r_limit, r_limit), mask)
    tl.store(results.d + at, clip(d, -d_limit, d_limit), mask)


@triton.jit
def write_candidates(results, buffers, cols, known, channels, mean, var, momentum, CUMULATIVE: tl.constexpr):
    """New values of the buffers from the step's mean and unbiased variance, (1, BLOCK_COLS), rounded to their dtype."""
    if CUMULATIVE:
        factor = 1.0 / (tl.load(buffers.tracked).to(tl.float64) + 1.0)
    else:
        factor = momentum
    old_mean = tl.load(buffers.mean + cols, known, other=0.0).to(tl.float64)
    old_var = tl.load(buffers.var + cols, known, other=0.0).to(tl.float64)
    new_mean = (old_mean + factor * (mean - old_mean)).to(buffers.mean.dtype.element_ty)
    new_var = (old_var + factor * (var - old_var)).to(buffers.var.dtype.element_ty)
    tl.store(results.candidates + cols, new_mean.to(tl.float64), known)
    tl.store(results.candidates + channels + cols, new_var.to(tl.float64), known)


@triton.jit
def commit(sums, candidates, buffers, num_groups, channels, HAS_DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    """One program copies all candidates into the buffers, or none if one of them is not finite."""
    infinite = tl.full([], 0, tl.int32)
    for start in range(0, 2 * channels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(candidates + at, at < 2 * channels, other=0.0)
        infinite += tl.sum((tl.abs(value) < float("inf")).to(tl.int32) ^ 1, 0)
    filled = tl.full([], 0, tl.int32)
    if HAS_DIVISOR:
        filled += 1
    else:
        for start in range(0, num_groups, BLOCK):
            at = (start + tl.arange(0, BLOCK)).to(tl.int64)
            count = tl.load(sums + at * (2 * channels + 1), at < num_groups, other=0.0)
            filled += tl.sum((count > 0).to(tl.int32), 0)
    if filled > 0:
        if infinite == 0:
            for start in range(0, channels, BLOCK):
                at = start + tl.arange(0, BLOCK)
                known = at < channels
                mean = tl.load(candidates + at, known, other=0.0)
                var = tl.load(candidates + channels + at, known, other=0.0)
                tl.store(buffers.mean + at, mean.to(buffers.mean.dtype.element_ty), known)
                tl.store(buffers.var + at, var.to(buffers.var.dtype.element_ty), known)
            tl.store(buffers.tracked, tl.load(buffers.tracked) + 1)
        else:
            tl.store(buffers.nonfinite, tl.load(buffers.nonfinite) + 1)


@triton.jit
def commit_kernel(sums, candidates, buffers, num_groups, channels, HAS_DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    commit(sums, candidates, buffers, num_groups, channels, HAS_DIVISOR, BLOCK)


@triton.jit(do_not_specialize=["num_groups", "warmup", "r_end", "d_end"])
def finish_kernel(
    sums,
    results,
    buffers,
    eps: tl.float64,
    momentum: tl.float64,
    divisor: tl.float64,
    r_max: tl.float64,
    d_max: tl.float64,
    warmup,
    r_end,
    d_end,
    num_groups,
    channels,
    UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    COMMIT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Each program takes blocks of channels in turn. With COMMIT there is one, which also updates the buffers."""
    # In Triton's interpreter they are Python's floats, and would be float32 once they are given another name.
    momentum, divisor = tl.full([], momentum, tl.float64), tl.full([], divisor, tl.float64)
    first = tl.program_id(0) * BLOCK_COLS
    for start in range(first, channels, tl.num_programs(0) * BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)[None, :]
        known = cols < channels
        filled = tl.full([], 0.0, tl.float64)
        step_mean = tl.full([1, BLOCK_COLS], 0.0, tl.float64)
        step_var = tl.full([1, BLOCK_COLS], 0.0, tl.float64)
        for group in range(0, num_groups, BLOCK_GROUPS):
            rows = (group + tl.arange(0, BLOCK_GROUPS)[:, None]).to(tl.int64)
            mask = (rows < num_groups) & known
            row = sums + rows * (2 * channels + 1)
            count = tl.load(row, rows < num_groups, other=0.0)
            number = tl.maximum(count, 1.0)
            mean = tl.load(row + 1 + cols, mask, other=0.0) / number
            var = tl.load(row + 1 + channels + cols, mask, other=0.0) / number - mean * mean
            var = tl.where(var < 0, 0.0, var)
            at = rows * channels + cols
            tl.store(results.mean + at, mean, mask)
            if results.var is not None:
                tl.store(results.var + at, var, mask)
            tl.store(results.invstd + at, 1.0 / tl.sqrt(var + eps), mask)
            if results.r is not None:
                write_corrections(
                    results, buffers, at, cols, known, mask, mean, var, eps, r_max, d_max, warmup, r_end, d_end
                )
            filled += tl.sum(tl.sum((count > 0).to(tl.float64), 1), 0)
            step_mean += tl.sum(mean, 0, keep_dims=True)
            step_var += tl.sum(var * (count / tl.maximum(count - 1, 1.0)), 0, keep_dims=True)
        if UPDATE:
            total = divisor if HAS_DIVISOR else tl.maximum(filled, 1.0)
            write_candidates(
                results, buffers, cols, known, channels, step_mean / total, step_var / total, momentum, CUMULATIVE
            )
    if COMMIT:
        tl.debug_barrier()
        commit(sums, results.candidates, buffers, num_groups, channels, HAS_DIVISOR, BLOCK_GROUPS * BLOCK_COLS)


@triton.jit(do_not_specialize=["num_groups"])
def gradients_kernel(
    sums,
    counts,
    count: tl.float64,
    scale,
    scale_strides,
    corrections,
    means,
    grad_weight,
    grad_bias,
    num_groups,
    channels,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """From sums (G, 2, C) of dz and dz * xhat to the means that grad_input needs, and the parameters' gradients.

    ``counts`` (G,) is None if there is one group, of ``count`` elements per channel. ``corrections`` are r and d.
    """
    count = tl.full([], count, tl.float64)
    cols = (tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]).to(tl.int64)
    known = cols < channels
    total_weight = tl.full([1, BLOCK_COLS], 0.0, tl.float64)
    total_bias = tl.full([1, BLOCK_COLS], 0.0, tl.float64)
    for group in range(0, num_groups, BLOCK_GROUPS):
        rows = (group + tl.arange(0, BLOCK_GROUPS)[:, None]).to(tl.int64)
        mask = (rows < num_groups) & known
        at = rows * 2 * channels + cols
        dz = tl.load(sums + at, mask, other=0.0)
        products = tl.load(sums + at + channels, mask, other=0.0)
        number = count
        if counts is not None:
            number = tl.load(counts + rows, rows < num_groups, other=1.0)
        factor = 1.0 / tl.maximum(number, 1.0)
        if scale is not None:
            place = scale + rows * scale_strides[0] + cols * scale_strides[1]
            factor = factor * tl.load(place, mask, other=0.0).to(tl.float64)
        tl.store(means + at, dz * factor, mask)
        tl.store(means + at + channels, products * factor, mask)
        total_bias += tl.sum(dz, 0, keep_dims=True)
        if corrections is not None:
            place = corrections + rows * channels + cols
            r = tl.load(place, mask, other=0.0).to(tl.float64)
            d = tl.load(place + num_groups * channels, mask, other=0.0).to(tl.float64)
            products = r * products + d * dz
        total_weight += tl.sum(products, 0, keep_dims=True)
    if grad_weight is not None:
        tl.store(grad_weight + cols, total_weight.to(grad_weight.dtype.element_ty), known)
    if grad_bias is not None:
        tl.store(grad_bias + cols, total_bias.to(grad_bias.dtype.element_ty), known)
