"""The argument of the compiled functions (``call.h``), and which tensors they can read.

The functions receive addresses, so every property of a tensor that they rely on is checked here.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from syncbn.functional.epilogue import Epilogue
from syncbn.functional.normalize import Affine
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running
from syncbn.functional.statistics import WIRE_DTYPE, Groups
from syncbn.kernels.cpu.library import load
from syncbn.torch_internals import has_values

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_BUFFER_TYPES = (torch.float32, torch.float64)
_ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3}


class _Values(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("group_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
    ]


class _Running(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mean", "var", "num_batches_tracked", "num_nonfinite_batches")),
        *((name, ctypes.c_int64) for name in ("type", "update", "cumulative", "has_divisor")),
        ("momentum", ctypes.c_double),
        ("divisor", ctypes.c_double),
    ]


class _Limits(ctypes.Structure):
    _fields_ = [("given", ctypes.c_int64), *((name, ctypes.c_double) for name in Limits._fields)]


class Call(ctypes.Structure):
    """``Call`` of ``call.h``, field by field. What is not given is 0 or null."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad_output", "residual", "dz", "out", "groups", "sums")),
        *((name, ctypes.c_void_p) for name in ("count", "mean", "var", "invstd", "r", "d", "means")),
        *((name, ctypes.c_void_p) for name in ("grad_weight", "grad_bias")),
        *((name, ctypes.c_int64) for name in ("grad_weight_type", "grad_bias_type")),
        ("scale", _Values),
        ("shift", _Values),
        *((name, ctypes.c_int64) for name in ("samples", "channels", "size", "num_groups")),
        *((name, ctypes.c_int64) for name in ("type", "planes", "threads", "activation")),
        ("negative_slope", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("running", _Running),
        ("limits", _Limits),
    ]
    kept: tuple[Tensor, ...] = ()
    """Copies that must live as long as the call."""

    def keep(self, t: Tensor) -> int:
        """The address of ``t``, which stays valid as long as the call lives."""
        self.kept = (*self.kept, t)
        return t.data_ptr()


def _check(result: int, function: Any, arguments: tuple[Any, ...]) -> None:
    if result:
        raise ValueError("the ghost group of a sample is not among 0, 1, ... number - 1")


library = load()
assert library.syncbn_size_of_call() == ctypes.sizeof(Call), "call.h and Call differ"
for _name in ("group_sums", "normalize", "backward_sums", "grad_input", "finish", "forward", "backward"):
    _function = getattr(library, f"syncbn_{_name}")
    _function.argtypes, _function.restype, _function.errcheck = [ctypes.POINTER(Call)], ctypes.c_int64, _check


# -- checks ------------------------------------------------------------------------------------------------------------


def is_plain(t: Tensor) -> bool:
    """Whether a contiguous run of values at the tensor's address can be read as it is."""
    return t.is_contiguous() and has_values(t) and not t.is_neg()


def is_like(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether ``t`` is a contiguous tensor of this dtype and shape that the kernels can read."""
    return t.dtype == dtype and t.shape == shape and is_plain(t)


def fits(t: Tensor, x: Tensor) -> bool:
    """Whether ``t``, a gradient or a residual, can at least be copied into the format of ``x``."""
    return t.shape == x.shape and has_values(t)


def as_x(t: Tensor, x: Tensor) -> Tensor:
    """``t``, of the shape of ``x``, in the dtype and memory format of ``x``, which is dense: itself or a copy."""
    if t.dtype == x.dtype and t.stride() == x.stride() and not t.is_neg():
        return t
    return torch.empty_like(x).copy_(t.detach())


def is_readable(running: Running | None, channels: int) -> bool:
    """Whether the kernels can read these buffers and perform this update."""
    if running is None:
        return True
    mean, var, tracked, nonfinite, _, mode, _, _, update = running
    return (
        (mode == "mean" or not update)
        and mean.dtype == var.dtype
        and mean.dtype in _BUFFER_TYPES
        and mean.shape == var.shape == (channels,)
        and tracked.dtype == nonfinite.dtype == torch.int64
        and tracked.numel() == nonfinite.numel() == 1
        and is_plain(mean)
        and is_plain(var)
        and is_plain(tracked)
        and is_plain(nonfinite)
    )


def _planes(x: Tensor) -> bool | None:
    """True if the elements of a channel of one sample are adjacent, False if all channels are, else None."""
    if x.dtype not in TYPES or not has_values(x) or x.is_neg():
        return None
    dims = x.dim()
    if dims > 2 and x.is_contiguous() and math.prod(x.shape[2:]) > 1:
        return True
    if dims == 4:
        innermost = x.is_contiguous(memory_format=torch.channels_last)
    elif dims == 5:
        innermost = x.is_contiguous(memory_format=torch.channels_last_3d)
    else:
        innermost = x.movedim(1, -1).is_contiguous()
    return False if innermost else None


# -- filling the call --------------------------------------------------------------------------------------------------


def make_call(x: Tensor, scale: Tensor | None, shift: Tensor | None, groups: Groups, epilogue: Epilogue) -> Call | None:
    """A call about ``x`` (N, C, *), or None if the kernels cannot read one of the tensors.

    ``scale`` and ``shift`` are (C,) or (G, C). The caller keeps them and ``x`` alive.
    """
    index, residual = groups.index, epilogue.residual
    assert index is not None or groups.number == 1, "several groups need an index"
    planes = _planes(x)
    if planes is None or (residual is not None and not fits(residual, x)):
        return None
    call = Call.from_buffer_copy(_fixed_fields(x.shape, x.dtype, planes, groups.number, epilogue[1:]))
    call.x, call.threads = x.data_ptr(), torch.get_num_threads()
    if index is not None:
        index = index.contiguous()
        if not is_like(index, torch.int64, (x.shape[0],)):
            return None
        call.groups = call.keep(index)
    if residual is not None:
        call.residual = call.keep(as_x(residual, x))
    if (scale is None or _put(call.scale, scale, call)) and (shift is None or _put(call.shift, shift, call)):
        return call
    return None


@functools.lru_cache(maxsize=1024)
def _fixed_fields(
    shape: torch.Size, dtype: torch.dtype, planes: bool, num_groups: int, activation: tuple[str | None, float]
) -> bytes:
    """A call with the fields that do not change from step to step."""
    call = Call(samples=shape[0], channels=shape[1], size=math.prod(shape[2:]), num_groups=num_groups)
    call.type, call.planes = TYPES[dtype], planes
    call.activation, call.negative_slope = _ACTIVATIONS[activation[0]], activation[1]
    return bytes(call)


def _put(values: _Values, t: Tensor, call: Call) -> bool:
    """Whether the kernels can read ``t``, (C,) or (G, C) of any strides; if so it is put into the call."""
    if t.dtype not in TYPES or not has_values(t) or t.is_neg():
        return False
    if t.shape == (call.channels,):
        values.group_stride, values.channel_stride = 0, t.stride(0)
    elif t.shape == (call.num_groups, call.channels):
        values.group_stride, values.channel_stride = t.stride()
    else:
        return False
    values.data, values.type = t.data_ptr(), TYPES[t.dtype]
    return True


def put_moments(call: Call, affine: Affine) -> bool:
    """Whether the kernels can read mean and invstd; if so they are put into the call."""
    mean, invstd = affine.mean.contiguous(), affine.invstd.contiguous()
    shape = (call.num_groups, call.channels)
    if not (is_like(mean, WIRE_DTYPE, shape) and is_like(invstd, WIRE_DTYPE, shape)):
        return False
    call.mean, call.invstd = call.keep(mean), call.keep(invstd)
    return True


def wide(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=WIRE_DTYPE, device="cpu")


def halves(t: Tensor) -> tuple[int, int]:
    """The addresses of ``t[0]`` and ``t[1]`` of a contiguous (2, ...) tensor."""
    start = t.data_ptr()
    return start, start + t.nbytes // 2


def put_running(call: Call, running: Running | None) -> Tensor | None:
    """Put the running statistics and their update into the call.

    Returns:
        renorm's r and d, (2, G, C) float64, not yet computed; None if the layer has none.
    """
    if running is None:
        return None
    mean, var, tracked, nonfinite, momentum, _, divisor, limits, update = running
    target = call.running
    target.mean, target.var, target.type = mean.data_ptr(), var.data_ptr(), TYPES[mean.dtype]
    target.num_batches_tracked, target.num_nonfinite_batches = tracked.data_ptr(), nonfinite.data_ptr()
    target.update, target.cumulative, target.momentum = update, momentum is None, momentum or 0
    if divisor is not None:
        target.has_divisor, target.divisor = True, divisor
    if update:  # autograd must notice that they change
        torch.autograd.graph.increment_version((mean, var, tracked, nonfinite))
    if limits is None:
        return None
    corrections = wide(2, call.num_groups, call.channels)
    call.limits = _Limits(True, *limits)
    call.r, call.d = halves(corrections)
    return corrections
