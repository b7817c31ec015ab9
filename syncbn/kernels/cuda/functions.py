"""The steps on CUDA, by Triton kernels: one launch each, without a host synchronization.

The kernels read every layout whose dimensions after C form one run with one stride: contiguous and channels_last, also
sliced in N or C or expanded along whole dimensions. The tensors of one call may have different layouts. A gradient or
residual in another layout is copied into the layout of x. The functional twins serve an ``x`` in another layout.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncbn.functional import finish as finish_twin
from syncbn.functional import normalize as twin
from syncbn.functional import statistics as statistics_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import Statistics
from syncbn.functional.normalize import Affine
from syncbn.functional.running import Running
from syncbn.functional.statistics import ONE_GROUP, WIRE_DTYPE, Groups
from syncbn.kernels.cuda.finish import Buffers, Results, commit_kernel, finish_kernel
from syncbn.kernels.cuda.passes import backward_sums_kernel, grad_input_kernel, group_sums_kernel, normalize_kernel
from syncbn.kernels.cuda.tiles import NO_GROUPS, PER_ROW, PER_SAMPLE, Coefficients, Tensors

Strides = tuple[int, int, int]
"""Strides of a tensor (N, C, S) in elements: sample, channel, position."""

_TILE = 2048
"""Elements of a tile, 16 per thread. Small tensors use half, so that more processors have work, and 8 per thread: tiles
of few positions have many channels, whose coefficients take many registers."""
_SUMS_PER_PROCESSOR = 16
"""Programs per processor of the device: several waves, but few enough that each adds to memory rarely."""
_ELEMENTWISE_PER_PROCESSOR = 32
_FEW_POSITIONS = 64
"""If a sample has fewer positions, a tile holds several samples, possibly of different groups."""
_FINISH_TILE = 1024
_FINISH_ALONE = 16
"""Number of tiles up to which one program computes all of :func:`finish`. With more, a second launch updates the
buffers."""

if torch.cuda.is_available():
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        # For example without a C compiler. Without this check the first launch would fail.
        raise ImportError(f"Triton has no driver here: {error}") from error


# -- how the work is divided -------------------------------------------------------------------------------------------


def _strides(t: Tensor) -> Strides | None:
    """Strides of ``t`` (N, C, *) as a tensor (N, C, S), or None if the dimensions after C are not one run."""
    shape, strides = t.shape, t.stride()
    step = size = 1
    for dim in range(t.dim() - 1, 1, -1):
        if shape[dim] == 1:
            continue
        if size == 1:
            step = strides[dim]
        elif strides[dim] != step * size:
            return None
        size *= shape[dim]
    # With a single sample or a single channel, any stride is right.
    sample = strides[0] if shape[0] > 1 else step * size
    channel = strides[1] if shape[1] > 1 else 1
    return sample, channel, sample if size == 1 else step


class _Plan(NamedTuple):
    """How a pass over a tensor is divided."""

    grid: tuple[int, int]
    blocks: int
    """Items per sample."""
    items: int
    per_program: int
    rows: int
    columns: int
    warps: int


@functools.lru_cache(maxsize=4096)
def _plan(samples: int, channels: int, size: int, channels_inner: bool, programs: int, least: int) -> _Plan:
    """A plan of about ``programs`` programs for (samples, channels, size).

    Tiles are small if there are fewer than ``least`` large ones.
    """
    tile = _TILE
    while tile > _TILE // 2 and samples * channels * size < least * tile:
        tile //= 2
    all_rows, all_columns = _power_of_two(size), _power_of_two(channels)
    if channels_inner:
        rows = min(all_rows, tile // min(all_columns, 128))
    else:
        # At least 80 % of the rows of the blocks should exist.
        rows = min(all_rows, 1024)
        while rows > 256 and size < 0.8 * rows * -(-size // rows):
            rows //= 2
    columns = min(all_columns, max(1, tile // rows))
    blocks = -(-size // rows)
    items, column_blocks = samples * blocks, -(-channels // columns)
    per_program = -(-items // min(items, max(1, programs // column_blocks)))
    warps = min(4, max(1, rows * columns // 256))
    return _Plan((-(-items // per_program), column_blocks), blocks, items, per_program, rows, columns, warps)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device: int) -> int:
    """The number of streaming multiprocessors; in Triton's interpreter, without CUDA, that of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 132


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which the device of x is the current one, because Triton launches on that."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class _Pass(NamedTuple):
    """The arguments that all passes over x have in common."""

    plan: _Plan
    strides: list[Strides]
    """Strides of the tensors, in order. A missing one has those of x: Triton 3.6 takes no None beside tuples."""
    sizes: tuple[int, int, int, int, int, int]
    options: dict[str, object]


def _dense(groups: Groups) -> Tensor | None:
    """The index as the kernels read it, one element after the other."""
    return None if groups.index is None else groups.index.contiguous()


def _pass(x: Tensor, others: tuple[Tensor | None, ...], groups: Groups, per_processor: int) -> _Pass | None:
    """A pass over ``x`` and other tensors of its shape (or None); None if the kernels cannot read one of them."""
    strides: list[Strides] = []
    size = math.prod(x.shape[2:])
    flat = True
    for t in (x, *others):
        found = _strides(x if t is None else t)
        if found is None:
            return None
        flat = flat and found[0] == size * found[2]
        strides.append(found)
    samples, channels = x.shape[0], x.shape[1]
    row_size = size
    mode = NO_GROUPS if groups.index is None else PER_ROW if flat and size < _FEW_POSITIONS else PER_SAMPLE
    if flat and mode is not PER_SAMPLE:
        samples, size = 1, samples * size
    first = strides[0]
    processors = _processors(x.get_device())
    plan = _plan(samples, channels, size, first[1] == 1 and first[2] != 1, per_processor * processors, 2 * processors)
    reach = max(plan.rows * position + plan.columns * channel for _, channel, position in strides)
    options: dict[str, object] = {
        "GROUPS": mode.value,
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "FAR": reach >= 2**31,
        "BLOCK_ROWS": plan.rows,
        "BLOCK_COLS": plan.columns,
        "num_warps": plan.warps,
    }
    return _Pass(plan, strides, (size, channels, plan.blocks, plan.items, plan.per_program, row_size), options)


def _coefficients(affine: Affine) -> Coefficients:
    strides = ((0, 0) if t is None else t.stride() for t in (affine.scale, affine.shift))
    return Coefficients(affine.mean.contiguous(), affine.invstd.contiguous(), affine.scale, affine.shift, *strides)


def _regular(t: Tensor, x: Tensor) -> Tensor:
    """``t``, or a copy in the layout of x if the kernels cannot read it."""
    return t if _strides(t) is not None else torch.empty_like(x, dtype=t.dtype).copy_(t)


# -- the five functions ------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, groups: Groups = ONE_GROUP) -> Tensor:
    """As :func:`syncbn.functional.statistics.group_sums`: (G, 2C + 1) float64.

    Each tile is centred by itself: its elements are read once, and its sums are added in float64.
    """
    assert groups.index is not None or groups.number == 1, "several groups need an index"
    todo = _pass(x, (), groups, _SUMS_PER_PROCESSOR) if x.numel() else None
    if todo is None:
        return statistics_twin.group_sums(x, groups)
    with on(x):
        sums = torch.zeros(groups.number, 2 * x.shape[1] + 1, dtype=WIRE_DTYPE, device=x.device)
        group_sums_kernel[todo.plan.grid](x, sums, _dense(groups), todo.strides[0], *todo.sizes, **todo.options)
    return sums


def normalize(x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`: the shape, dtype and memory format of ``x``."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    residual = None if epilogue.residual is None else _regular(epilogue.residual, x)
    todo = _pass(x, (None, residual, y), groups, _ELEMENTWISE_PER_PROCESSOR)
    if todo is None:
        return twin.normalize(x, affine, groups, epilogue)
    with on(x):
        normalize_kernel[todo.plan.grid](
            Tensors(x, None, residual, y),
            Tensors(*todo.strides),
            _coefficients(affine),
            _dense(groups),
            epilogue.negative_slope,
            *todo.sizes,
            ACTIVATION=epilogue.activation,
            **todo.options,
        )
    return y


def backward_sums(
    grad_output: Tensor, x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, Epilogue, Tensor]:
    """As :func:`syncbn.functional.normalize.backward_sums`.

    dz is written only if there is a residual under an activation (in x's memory format); the sums are then of its
    rounded values. With an activation alone dz is ``grad_output``, or its copy in x's format, and the activation is
    left to :func:`grad_input`.
    """
    writes = epilogue.activation is not None and epilogue.residual is not None
    rest = NO_EPILOGUE if writes else epilogue._replace(residual=None)
    out = torch.empty_like(x) if writes else None
    if not x.numel():
        sums = torch.zeros(groups.number, 2, x.shape[1], dtype=WIRE_DTYPE, device=x.device)
        return grad_output if out is None else out, rest, sums
    grad_output = _regular(grad_output, x)
    residual = _regular(epilogue.residual, x) if writes and epilogue.residual is not None else None
    todo = _pass(x, (grad_output, residual, out), groups, _SUMS_PER_PROCESSOR)
    if todo is None:
        return twin.backward_sums(grad_output, x, affine, groups, epilogue)
    with on(x):
        sums = torch.zeros(groups.number, 2, x.shape[1], dtype=WIRE_DTYPE, device=x.device)
        backward_sums_kernel[todo.plan.grid](
            Tensors(x, grad_output, residual, out),
            Tensors(*todo.strides),
            sums,
            _coefficients(affine),
            _dense(groups),
            epilogue.negative_slope,
            *todo.sizes,
            ACTIVATION=epilogue.activation,
            **todo.options,
        )
    return grad_output if out is None else out, rest, sums


def grad_input(
    dz: Tensor,
    x: Tensor,
    affine: Affine,
    means: Tensor,
    groups: Groups = ONE_GROUP,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.grad_input`: the shape, dtype and memory format of ``x``."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    dz = _regular(dz, x)
    todo = _pass(x, (dz, None, dx), groups, _ELEMENTWISE_PER_PROCESSOR)
    if todo is None:
        return twin.grad_input(dz, x, affine, means, groups, epilogue)
    with on(x):
        grad_input_kernel[todo.plan.grid](
            Tensors(x, dz, None, dx),
            Tensors(*todo.strides),
            _coefficients(affine),
            means,
            means.stride(),
            _dense(groups),
            epilogue.negative_slope,
            *todo.sizes,
            ACTIVATION=epilogue.activation,
            **todo.options,
        )
    return dx


def finish(sums: Tensor, eps: float, running: Running | None = None) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`, in one launch, or two if C * G is large.

    The twin serves buffers that are not contiguous and updates other than ``"mean"``.
    """
    g, c = sums.shape[0], (sums.shape[1] - 1) // 2
    if not (sums.is_contiguous() and is_finishable(g, c, running)):
        return finish_twin.finish(sums, eps, running)
    has_corrections = running is not None and running.limits is not None
    # One tensor each: a tensor saved for the backward pass must not keep the others alive. The last is scratch.
    *found, candidates = (sums.new_empty(rows, c) for rows in [g] * (5 if has_corrections else 3) + [2])
    r, d = found[3:] if has_corrections else (None, None)
    results = Results(found[0], found[1], found[2], r, d, candidates)
    launch_finish(sums, eps, running, results)
    return Statistics(sums[:, :1].clone(), results.mean, results.invstd, results.r, results.d, results.var)


def is_finishable(num_groups: int, channels: int, running: Running | None) -> bool:
    """Whether :func:`launch_finish` can compute this."""
    if running is None or not num_groups * channels:
        return num_groups * channels > 0
    contiguous = running.mean.is_contiguous() and running.var.is_contiguous()
    return contiguous and (running.mode == "mean" or not running.update)


def finish_blocks(num_groups: int, channels: int) -> tuple[int, int, int]:
    """Groups and channels of a tile of the kernels of ``finish.py``, and the number of tiles beside one another."""
    block_groups = min(_power_of_two(num_groups), 16)
    block_columns = min(_power_of_two(channels), _FINISH_TILE // block_groups)
    return block_groups, block_columns, -(-channels // block_columns)


def launch_finish(sums: Tensor, eps: float, running: Running | None, results: Results) -> None:
    """Write the results, and update the running statistics."""
    g, c = sums.shape[0], (sums.shape[1] - 1) // 2
    block_groups, block_columns, blocks = finish_blocks(g, c)
    update = running is not None and running.update
    alone = update and blocks * -(-g // block_groups) <= _FINISH_ALONE
    limits, momentum, divisor = None, None, None
    if running is not None:
        limits, momentum, divisor = running.limits, running.momentum, running.divisor
    buffers = Buffers(*(running[:4] if running is not None else (None,) * 4))
    shared = {"HAS_DIVISOR": divisor is not None, "num_warps": 4}
    with on(sums):
        finish_kernel[(1 if alone else blocks,)](
            sums,
            results,
            buffers,
            eps,
            momentum or 0.0,
            divisor or 0.0,
            *(limits or (0.0, 0.0, 0, 0, 0)),
            g,
            c,
            UPDATE=update,
            CUMULATIVE=momentum is None,
            COMMIT=alone,
            BLOCK_GROUPS=block_groups,
            BLOCK_COLS=block_columns,
            **shared,
        )
        if update and not alone:
            commit_kernel[(1,)](sums, results.candidates, buffers, g, c, BLOCK=_FINISH_TILE, **shared)
