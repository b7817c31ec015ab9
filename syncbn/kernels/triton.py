"""The passes on CUDA, by Triton kernels: one launch each, no host synchronization, nothing copied that need not be.

Read without a copy: every layout in which the dimensions beyond C are one run with one stride, as the standard formats
are (contiguous and channels_last, also sliced in N or C, or expanded along whole dimensions). An ``x`` in any other
layout goes to the functional twins; a gradient or residual in another is copied into x's. Operands' layouts may differ.
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
from syncbn.functional import stats as stats_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import Limits, Running, Statistics
from syncbn.functional.stats import WIRE_DTYPE
from syncbn.kernels.triton_code import backward_sums_kernel, grad_input_kernel, group_sums_kernel, normalize_kernel
from syncbn.kernels.triton_finish import Buffers, Results, commit_kernel, finish_kernel
from syncbn.kernels.triton_tiles import NO_GROUPS, PER_ROW, PER_SAMPLE, Affine, Tensors

__all__ = ["backward_sums", "finish", "grad_input", "group_sums", "normalize"]

Strides = tuple[int, int, int]
"""Of a tensor (N, C, S), in elements: sample, channel, position."""

_TILE = 2048
"""Elements of a tile, 16 for each thread; half of it where there is too little to keep all busy."""
_SUMS_PER_PROCESSOR = 16
"""Programs for each of the device's processors: some waves, and few enough that each adds to memory rarely."""
_ELEMENTWISE_PER_PROCESSOR = 32
_FEW_POSITIONS = 64
"""With samples of fewer positions a tile holds several of them, of different groups maybe."""
_FINISH_TILE = 1024
_FINISH_ALONE = 16
"""Tiles up to which one program does all of :func:`finish`; with more, a second launch updates the buffers."""

if torch.cuda.is_available():
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        # Without a C compiler, say: better known now than at the first launch.
        raise ImportError(f"Triton has no driver here: {error}") from error


# -- how the work is cut up --------------------------------------------------------------------------------------------


def _strides(t: Tensor) -> Strides | None:
    """Strides of ``t`` (N, C, *) seen as (N, C, S), or None where the dimensions beyond C are not one run."""
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
    # Of one sample, or one channel, any stride will do.
    sample = strides[0] if shape[0] > 1 else step * size
    channel = strides[1] if shape[1] > 1 else 1
    return sample, channel, sample if size == 1 else step


class _Plan(NamedTuple):
    """How a pass over a tensor is cut up."""

    grid: tuple[int, int]
    blocks: int
    """Items of a sample."""
    items: int
    per_program: int
    rows: int
    columns: int
    warps: int


@functools.lru_cache(maxsize=4096)
def _plan(samples: int, channels: int, size: int, channels_inner: bool, programs: int, least: int) -> _Plan:
    """About ``programs`` programs for (samples, channels, size); small tiles where not ``least`` would be large."""
    tile = _TILE
    while tile > _TILE // 2 and samples * channels * size < least * tile:
        tile //= 2
    all_rows, all_columns = _power_of_two(size), _power_of_two(channels)
    if channels_inner:
        rows = min(all_rows, tile // min(all_columns, 128))
    else:
        # Some 80 % of a block's rows should exist.
        rows = min(all_rows, 1024)
        while rows > 256 and size < 0.8 * rows * -(-size // rows):
            rows //= 2
    columns = min(all_columns, max(1, tile // rows))
    blocks = -(-size // rows)
    items, column_blocks = samples * blocks, -(-channels // columns)
    per_program = -(-items // min(items, max(1, programs // column_blocks)))
    warps = min(4, max(1, rows * columns // 512))
    return _Plan((-(-items // per_program), column_blocks), blocks, items, per_program, rows, columns, warps)


def _power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device: int) -> int:
    """Streaming multiprocessors; without CUDA, in Triton's interpreter, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 132


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, so x's must be it."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class _Pass(NamedTuple):
    """The arguments that all passes over x share."""

    plan: _Plan
    strides: list[Strides | None]
    """Of the tensors, in order."""
    sizes: tuple[int, int, int, int, int, int]
    options: dict[str, object]


def _dense(groups: Tensor | None) -> Tensor | None:
    """The kernels read one index after the other."""
    return None if groups is None else groups.contiguous()


def _pass(x: Tensor, others: tuple[Tensor | None, ...], groups: Tensor | None, per_processor: int) -> _Pass | None:
    """A pass over ``x`` and others of its shape; None where one of them, not None, cannot be gone over."""
    strides: list[Strides | None] = []
    size = math.prod(x.shape[2:])
    flat = True
    for t in (x, *others):
        found = None if t is None else _strides(t)
        if t is not None:
            if found is None:
                return None
            flat = flat and found[0] == size * found[2]
        strides.append(found)
    samples, channels = x.shape[0], x.shape[1]
    row_size = size
    mode = NO_GROUPS if groups is None else PER_ROW if flat and size < _FEW_POSITIONS else PER_SAMPLE
    if flat and mode is not PER_SAMPLE:
        samples, size = 1, samples * size
    first = strides[0]
    assert first is not None
    processors = _processors(x.get_device())
    plan = _plan(samples, channels, size, first[1] == 1 and first[2] != 1, per_processor * processors, 2 * processors)
    used = [found for found in strides if found is not None]
    reach = max(plan.rows * position + plan.columns * channel for _, channel, position in used)
    options: dict[str, object] = {
        "GROUPS": mode.value,
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "FAR": reach >= 2**31,
        "BLOCK_ROWS": plan.rows,
        "BLOCK_COLS": plan.columns,
        "num_warps": plan.warps,
    }
    return _Pass(plan, strides, (size, channels, plan.blocks, plan.items, plan.per_program, row_size), options)


def _affine(mean: Tensor, invstd: Tensor, scale: Tensor | None, shift: Tensor | None) -> Affine:
    strides = (None if t is None else t.stride() for t in (scale, shift))
    return Affine(mean.contiguous(), invstd.contiguous(), scale, shift, *strides)


def _regular(t: Tensor, x: Tensor) -> Tensor:
    """``t``, or a copy in x's layout where it cannot be gone over as it is."""
    return t if _strides(t) is not None else torch.empty_like(x, dtype=t.dtype).copy_(t)


# -- the five functions ------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """As :func:`syncbn.functional.stats.group_sums`: (G, 2C + 1) float64.

    Centred tile by tile: a tile's elements are read once, and its sums leave it in float64.
    """
    assert groups is not None or num_groups == 1, "without a group of each sample there is one group"
    todo = _pass(x, (), groups, _SUMS_PER_PROCESSOR) if x.numel() else None
    if todo is None:
        if x.numel() or not x.shape[1]:
            return stats_twin.group_sums(x, groups, num_groups)
        return torch.zeros(num_groups, 2 * x.shape[1] + 1, dtype=WIRE_DTYPE, device=x.device)
    with _on(x):
        sums = torch.zeros(num_groups, 2 * x.shape[1] + 1, dtype=WIRE_DTYPE, device=x.device)
        group_sums_kernel[todo.plan.grid](x, sums, _dense(groups), todo.strides[0], *todo.sizes, **todo.options)
    return sums


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`: the shape, dtype and memory format of ``x``."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    residual = None if epilogue.residual is None else _regular(epilogue.residual, x)
    todo = _pass(x, (None, residual, y), groups, _ELEMENTWISE_PER_PROCESSOR)
    if todo is None:
        return twin.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    with _on(x):
        normalize_kernel[todo.plan.grid](
            Tensors(x, None, residual, y),
            Tensors(*todo.strides),
            _affine(mean, invstd, scale, shift),
            _dense(groups),
            epilogue.negative_slope,
            *todo.sizes,
            ACTIVATION=epilogue.activation,
            **todo.options,
        )
    return y


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
    """As :func:`syncbn.functional.normalize.backward_sums`.

    Only a residual, whose gradient dz is, has dz written (in x's memory format); the sums are of its rounded values.
    With an activation alone dz is ``grad_output`` and what is left to :func:`grad_input` is the activation, which it
    has from x. A ``grad_output`` that had to be copied is returned as the copy.
    """
    writes = epilogue.activation is not None and epilogue.residual is not None
    rest = NO_EPILOGUE if writes else epilogue._replace(residual=None)
    out = torch.empty_like(x) if writes else None
    if not x.numel():
        sums = torch.zeros(num_groups, 2, x.shape[1], dtype=WIRE_DTYPE, device=x.device)
        return grad_output if out is None else out, rest, sums
    grad_output = _regular(grad_output, x)
    residual = _regular(epilogue.residual, x) if writes and epilogue.residual is not None else None
    todo = _pass(x, (grad_output, residual, out), groups, _SUMS_PER_PROCESSOR)
    if todo is None:
        return twin.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
    with _on(x):
        sums = torch.zeros(num_groups, 2, x.shape[1], dtype=WIRE_DTYPE, device=x.device)
        backward_sums_kernel[todo.plan.grid](
            Tensors(x, grad_output, residual, out),
            Tensors(*todo.strides),
            sums,
            _affine(mean, invstd, scale, shift),
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
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    means: Tensor,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.grad_input`: the shape, dtype and memory format of ``x``."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    dz = _regular(dz, x)
    todo = _pass(x, (dz, None, dx), groups, _ELEMENTWISE_PER_PROCESSOR)
    if todo is None:
        return twin.grad_input(dz, x, mean, invstd, scale, shift, means, groups, epilogue)
    with _on(x):
        grad_input_kernel[todo.plan.grid](
            Tensors(x, dz, None, dx),
            Tensors(*todo.strides),
            _affine(mean, invstd, scale, shift),
            means,
            means.stride(),
            _dense(groups),
            epilogue.negative_slope,
            *todo.sizes,
            ACTIVATION=epilogue.activation,
            **todo.options,
        )
    return dx


def finish(
    sums: Tensor, eps: float, running: Running | None = None, limits: Limits | None = None, update: bool = True
) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`, in one launch; two where C * G is large.

    The update ``"mean"`` alone: with another, or buffers that are not contiguous, the twin does all.
    """
    g, c = sums.shape[0], (sums.shape[1] - 1) // 2
    update = update and running is not None
    if (
        not g * c
        or not sums.is_contiguous()
        or (running is not None and not (running.mean.is_contiguous() and running.var.is_contiguous()))
        or (update and running is not None and running.mode != "mean")
    ):
        return finish_twin.finish(sums, eps, running, limits, update)
    assert limits is None or running is not None, "corrections are relative to running statistics"
    block_groups = min(_power_of_two(g), 16)
    block_columns = min(_power_of_two(c), _FINISH_TILE // block_groups)
    blocks = -(-c // block_columns)
    alone = update and blocks * -(-g // block_groups) <= _FINISH_ALONE
    with _on(sums):
        matrices = 3 if limits is None else 5
        # One each: what is kept for the backward pass must not keep the rest alive. The last is scratch.
        *found, candidates = (sums.new_empty(rows, c) for rows in [g] * matrices + [2])
        r, d = (None, None) if limits is None else found[3:]
        results = Results(found[0], found[1], found[2], r, d, candidates)
        buffers = Buffers(*(running[:4] if running is not None else (None,) * 4))
        momentum = None if running is None else running.momentum
        divisor = None if running is None else running.divisor
        shared = {"HAS_DIVISOR": divisor is not None, "num_warps": 4}
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
            commit_kernel[(1,)](sums, candidates, buffers, g, c, BLOCK=_FINISH_TILE, **shared)
    return Statistics(sums[:, :1].clone(), results.mean, results.var, results.invstd, results.r, results.d)
