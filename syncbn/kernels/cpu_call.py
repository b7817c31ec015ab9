"""What the compiled kernels (``compiled/``) are called with, and whether they can read it.

They see addresses alone: whatever they could not read, or would read beyond, has to be noticed here.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from syncbn.functional.epilogue import Epilogue
from syncbn.functional.finish import Limits, Running, Statistics
from syncbn.functional.stats import WIRE_DTYPE
from syncbn.kernels.layout import channels_innermost
from syncbn.kernels.library import load
from syncbn.kernels.rule import PLAIN

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
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
    _fields_ = [
        ("given", ctypes.c_int64),
        *((name, ctypes.c_double) for name in Limits._fields),
    ]


class Call(ctypes.Structure):
    """``Call`` of ``compiled/call.h``, field by field; what is not given is 0 or null."""

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
    """Tensors that may be copies, and are to live as long as the call."""

    def keep(self, t: Tensor) -> int:
        """The tensor's address, which stays as long as the call."""
        self.kept = (*self.kept, t)
        return t.data_ptr()


def _check(result: int, function: Any, arguments: tuple[Any, ...]) -> None:
    if result:
        raise ValueError("a sample's group is not among 0, 1, ... num_groups - 1")


library = load()
assert library.syncbn_size_of_call() == ctypes.sizeof(Call), "call.h and Call disagree"
for _name in ("group_sums", "normalize", "backward_sums", "grad_input", "finish", "forward", "backward"):
    _function = getattr(library, f"syncbn_{_name}")
    _function.argtypes, _function.restype, _function.errcheck = [ctypes.POINTER(Call)], ctypes.c_int64, _check


# -- arguments ---------------------------------------------------------------------------------------------------------


def is_there(t: Tensor) -> bool:
    """Whether there are values at the tensor's address: not on other devices, in wrappers, or where all are 0.

    Raises:
        ValueError: there were, and their memory has been freed; torch's own operations would read it.
    """
    if not (type(t) in PLAIN and t.is_cpu and torch._C._has_storage(t)):
        return False
    if t.data_ptr() > t.storage_offset() * t.itemsize or not t.numel():
        return True
    if t._is_zerotensor():
        return False
    raise ValueError(
        f"the memory of a tensor of shape {tuple(t.shape)} has been freed; a sharded parameter has to be gathered first"
    )


def is_plain(t: Tensor) -> bool:
    """Whether these are the tensor's own, and not their negatives."""
    return is_there(t) and not t.is_neg()


def is_like(t: Tensor | None, dtype: torch.dtype, *shape: int) -> bool:
    """Whether the kernels can read a contiguous tensor of so many values (it may be absent)."""
    return t is None or (t.dtype == dtype and t.shape == shape and t.is_contiguous() and is_plain(t))


def _planes(x: Tensor) -> bool | None:
    """Whether x's innermost run is of one channel, or else of all channels; None where neither is known."""
    if x.dtype not in TYPES or not is_plain(x):
        return None
    if x.dim() > 2 and x.is_contiguous() and math.prod(x.shape[2:]) > 1:
        return True
    return False if channels_innermost(x) else None


def make_call(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue,
) -> Call | None:
    """A call about ``x`` and what comes with it in forward and backward, or None where the kernels cannot read it all.

    ``x`` and ``affine`` are the caller's to keep.
    """
    assert groups is not None or num_groups == 1, "without a group of each sample there is one group"
    planes, residual = _planes(x), epilogue.residual
    if groups is not None:
        groups = groups.contiguous()
    if planes is None or not is_like(groups, torch.int64, x.shape[0]) or not fits(residual, x):
        return None
    call = Call.from_buffer_copy(_about(x.shape, x.dtype, planes, num_groups, epilogue[1:]))
    call.x, call.threads = x.data_ptr(), torch.get_num_threads()
    if groups is not None:
        call.groups = call.keep(groups)
    if residual is not None:
        call.residual = call.keep(as_x(residual, x))
    scale, shift = affine
    if (scale is None or _put(call.scale, scale, call)) and (shift is None or _put(call.shift, shift, call)):
        return call
    return None


@functools.lru_cache(maxsize=1024)
def _about(
    shape: torch.Size, dtype: torch.dtype, planes: bool, num_groups: int, activation: tuple[str | None, float]
) -> bytes:
    """What of a call does not change from step to step."""
    call = Call(samples=shape[0], channels=shape[1], size=math.prod(shape[2:]), num_groups=num_groups)
    call.type, call.planes = TYPES[dtype], planes
    call.activation, call.negative_slope = _ACTIVATIONS[activation[0]], activation[1]
    return bytes(call)


def _put(values: _Values, t: Tensor, call: Call) -> bool:
    """(C,) or (G, C) of any strides, if the kernels can read it."""
    if t.shape not in ((call.channels,), (call.num_groups, call.channels)) or t.dtype not in TYPES or not is_plain(t):
        return False
    values.data, values.type = t.data_ptr(), TYPES[t.dtype]
    values.group_stride, values.channel_stride = (0, t.stride(0)) if t.dim() == 1 else t.stride()
    return True


def fits(t: Tensor | None, x: Tensor) -> bool:
    """Whether a gradient or residual can be read, or at least copied (it may be absent)."""
    return t is None or (t.shape == x.shape and is_there(t))


def as_x(t: Tensor, x: Tensor) -> Tensor:
    """``t``, of x's shape, as x, which is dense, lies in memory: itself, or a copy."""
    if t.dtype == x.dtype and t.stride() == x.stride() and not t.is_neg():
        return t
    return torch.empty_like(x).copy_(t.detach())


def put_moments(call: Call, mean: Tensor, invstd: Tensor) -> bool:
    """(G, C) each, if the kernels can read them."""
    shape = (call.num_groups, call.channels)
    if not (is_like(mean, WIRE_DTYPE, *shape) and is_like(invstd, WIRE_DTYPE, *shape)):
        return False
    call.mean, call.invstd = mean.data_ptr(), invstd.data_ptr()
    return True


def wide(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=WIRE_DTYPE, device="cpu")


def is_readable(running: Running | None, channels: int, update: bool) -> bool:
    """Whether the kernels can do this update, or read these buffers."""
    if running is None:
        return True
    mean, var, tracked, nonfinite = running[:4]
    return (
        mean.dtype in (torch.float32, torch.float64)
        and is_like(mean, mean.dtype, channels)
        and is_like(var, mean.dtype, channels)
        and is_like(tracked, torch.int64)
        and is_like(nonfinite, torch.int64)
        and (running.mode == "mean" or not update)
    )


def put_finish(call: Call, running: Running | None, limits: Limits | None, update: bool) -> Statistics:
    """What :func:`finish` needs; its results, uninitialised."""
    g, c = call.num_groups, call.channels
    if running is not None:
        running_mean, running_var, tracked, nonfinite, momentum, _, divisor = running
        call.running = _Running(
            running_mean.data_ptr(),
            running_var.data_ptr(),
            tracked.data_ptr(),
            nonfinite.data_ptr(),
            TYPES[running_mean.dtype],
            update,
            momentum is None,
            divisor is not None,
            float(momentum or 0),
            float(divisor or 0),
        )
        if update:  # autograd is to see that they change
            torch.autograd.graph.increment_version(running[:4])
    # One tensor each: what is kept for the backward pass must not keep the rest alive.
    mean = wide(g, c)
    found = Statistics(wide(g, 1), mean, wide(g, c), wide(g, c), None, None)
    call.count, call.mean = found.count.data_ptr(), found.mean.data_ptr()
    call.var, call.invstd = found.var.data_ptr(), found.invstd.data_ptr()
    if limits is not None:
        assert running is not None, "corrections are relative to running statistics"
        call.limits = _Limits(True, *map(float, limits))
        found.r, found.d = wide(g, c), wide(g, c)
        call.r, call.d = found.r.data_ptr(), found.d.data_ptr()
    return found
