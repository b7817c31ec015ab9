"""The passes on the CPU, by the package's own compiled kernels (``compiled/``): one call each for any groups.

They read tensors that are contiguous, or whose channels are innermost (channels_last, (N, C)), of any floating dtype.
An ``x`` in another layout goes to the functional twins; a gradient or residual in another is copied into x's.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.functional import finish as finish_twin
from syncbn.functional import normalize as twin
from syncbn.functional import stats as stats_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import Limits, Running, Statistics
from syncbn.functional.stats import WIRE_DTYPE
from syncbn.kernels.library import load

__all__ = ["backward_alone", "backward_sums", "finish", "forward_alone", "grad_input", "group_sums", "normalize"]

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
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
        *((name, ctypes.c_int64) for name in ("given", "warmup_steps", "r_ramp_end", "d_ramp_end")),
        ("r_max", ctypes.c_double),
        ("d_max", ctypes.c_double),
    ]


class _Call(ctypes.Structure):
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


def _check(result: int, function: Any, arguments: tuple[Any, ...]) -> None:
    if result:
        raise IndexError("a sample's group is not between 0 and the number of groups")


_library = load()
assert _library.syncbn_size_of_call() == ctypes.sizeof(_Call), "call.h and _Call disagree"
for _name in ("group_sums", "normalize", "backward_sums", "grad_input", "finish", "forward", "backward"):
    _function = getattr(_library, f"syncbn_{_name}")
    _function.argtypes, _function.restype, _function.errcheck = [ctypes.POINTER(_Call)], ctypes.c_int64, _check


# -- arguments ---------------------------------------------------------------------------------------------------------


def _planes(x: Tensor) -> bool | None:
    """Whether x's innermost run is of one channel, or else of all channels; None where neither is known."""
    if x.dtype not in _TYPES:
        return None
    if x.dim() > 2 and x.is_contiguous() and math.prod(x.shape[2:]) > 1:
        return True
    if x.dim() == 2:
        return False if x.is_contiguous() else None
    if x.dim() == 4:
        return False if x.is_contiguous(memory_format=torch.channels_last) else None
    if x.dim() == 5:
        return False if x.is_contiguous(memory_format=torch.channels_last_3d) else None
    return False if x.movedim(1, -1).is_contiguous() else None


def _call(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue,
) -> _Call | None:
    """A call about ``x``, or None where the kernels do not read it. The tensors are the caller's to keep."""
    planes = _planes(x)
    if planes is None:
        return None
    call = _Call.from_buffer_copy(_about(x.shape, x.dtype, planes, num_groups, epilogue[1:]))
    call.x, call.threads = x.data_ptr(), torch.get_num_threads()
    if groups is not None:
        call.groups = groups.data_ptr()
    scale, shift = affine
    if not (scale is None or _put(call.scale, scale)) or not (shift is None or _put(call.shift, shift)):
        return None
    return call


@functools.lru_cache(maxsize=1024)
def _about(
    shape: torch.Size, dtype: torch.dtype, planes: bool, num_groups: int, activation: tuple[str | None, float]
) -> bytes:
    """What of a call does not change from step to step."""
    call = _Call(samples=shape[0], channels=shape[1], size=math.prod(shape[2:]), num_groups=num_groups)
    call.type, call.planes = _TYPES[dtype], planes
    call.activation, call.negative_slope = _ACTIVATIONS[activation[0]], activation[1]
    return bytes(call)


def _put(values: _Values, t: Tensor) -> bool:
    """(C,) or (G, C) of any strides, if the kernels read its dtype."""
    if t.dtype not in _TYPES:
        return False
    values.data, values.type = t.data_ptr(), _TYPES[t.dtype]
    values.group_stride, values.channel_stride = (0, t.stride(0)) if t.dim() == 1 else t.stride()
    return True


def _as_x(t: Tensor, x: Tensor) -> Tensor:
    """``t``, of x's shape, as x lies in memory: itself, or a copy."""
    if t.dtype == x.dtype and t.stride() == x.stride():
        return t
    return torch.empty_like(x).copy_(t)


def _dense(groups: Tensor | None) -> Tensor | None:
    return None if groups is None else groups.contiguous()


def _wide(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=WIRE_DTYPE, device="cpu")


def _is_readable(running: Running | None, update: bool) -> bool:
    """Whether the kernels can do this update, or read these buffers."""
    if running is None:
        return True
    mean, var = running.mean, running.var
    if mean.dtype != var.dtype or mean.dtype not in (torch.float32, torch.float64):
        return False
    return mean.is_contiguous() and var.is_contiguous() and (running.mode == "mean" or not update)


def _put_finish(call: _Call, running: Running | None, limits: Limits | None, update: bool) -> Statistics:
    """What :func:`finish` needs; its results, uninitialised."""
    g, c = call.num_groups, call.channels
    if running is not None:
        running_mean, running_var, tracked, nonfinite, momentum, _, divisor = running
        call.running = _Running(
            running_mean.data_ptr(),
            running_var.data_ptr(),
            tracked.data_ptr(),
            nonfinite.data_ptr(),
            _TYPES[running_mean.dtype],
            update,
            momentum is None,
            divisor is not None,
            momentum or 0.0,
            divisor or 0.0,
        )
    # One tensor each: what is kept for the backward pass must not keep the rest alive.
    mean = _wide(g, c)
    found = Statistics(_wide(g, 1), mean, torch.empty_like(mean), torch.empty_like(mean), None, None)
    call.count, call.mean = found.count.data_ptr(), found.mean.data_ptr()
    call.var, call.invstd = found.var.data_ptr(), found.invstd.data_ptr()
    if limits is not None:
        assert running is not None, "corrections are relative to running statistics"
        call.limits = _Limits(True, *limits[2:], *limits[:2])
        found.r, found.d = torch.empty_like(mean), torch.empty_like(mean)
        call.r, call.d = found.r.data_ptr(), found.d.data_ptr()
    return found


# -- forward -----------------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """As :func:`syncbn.functional.stats.group_sums`."""
    groups, sums = _dense(groups), _wide(num_groups, 2 * x.shape[1] + 1)
    call = _call(x, (None, None), groups, num_groups, NO_EPILOGUE)
    if call is None:
        return stats_twin.group_sums(x, groups, num_groups)
    call.sums = sums.data_ptr()
    _library.syncbn_group_sums(call)
    return sums


def finish(
    sums: Tensor, eps: float, running: Running | None = None, limits: Limits | None = None, update: bool = True
) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`."""
    if not (sums.is_contiguous() and _is_readable(running, update)):
        return finish_twin.finish(sums, eps, running, limits, update)
    call = _Call(sums=sums.data_ptr(), channels=(sums.shape[1] - 1) // 2, num_groups=sums.shape[0], eps=eps)
    found = _put_finish(call, running, limits, update)
    _library.syncbn_finish(call)
    return found


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`."""
    groups = _dense(groups)
    call = _call(x, (scale, shift), groups, len(mean), epilogue)
    if call is None:
        return twin.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    mean, invstd, y = mean.contiguous(), invstd.contiguous(), torch.empty_like(x)
    call.mean, call.invstd, call.out = mean.data_ptr(), invstd.data_ptr(), y.data_ptr()
    if epilogue.residual is not None:
        residual = _as_x(epilogue.residual, x)
        call.residual = residual.data_ptr()
    _library.syncbn_normalize(call)
    return y


def forward_alone(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    limits: Limits | None,
    update: bool,
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue = NO_EPILOGUE,
) -> tuple[Tensor, Statistics] | None:
    """:func:`group_sums`, :func:`finish` and :func:`normalize` in one, for groups that are all here; or None."""
    if not _is_readable(running, update):
        return None
    groups = _dense(groups)
    call = _call(x, (weight, bias), groups, num_groups, epilogue)
    if call is None:
        return None
    y = torch.empty_like(x)
    call.out, call.eps = y.data_ptr(), eps
    if epilogue.residual is not None:
        residual = _as_x(epilogue.residual, x)
        call.residual = residual.data_ptr()
    found = _put_finish(call, running, limits, update)
    _library.syncbn_forward(call)
    return y, found


# -- backward ----------------------------------------------------------------------------------------------------------


def _put_gradient(
    call: _Call, grad_output: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue
) -> tuple[Tensor, ...]:
    """What both backward functions read, to be kept until the call is done: dz, or what it is to be made from, first.

    Only a residual, whose gradient dz is, has dz written.
    """
    given, mean, invstd = _as_x(grad_output, x), mean.contiguous(), invstd.contiguous()
    call.grad_output, call.mean, call.invstd = given.data_ptr(), mean.data_ptr(), invstd.data_ptr()
    if epilogue.activation is None or epilogue.residual is None:
        return given, mean, invstd
    residual, dz = _as_x(epilogue.residual, x), torch.empty_like(x)
    call.residual, call.dz = residual.data_ptr(), dz.data_ptr()
    return dz, given, mean, invstd, residual


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

    With an activation and no residual dz is ``grad_output``, and what is left to :func:`grad_input` is the activation,
    which it has from x.
    """
    groups = _dense(groups)
    call = _call(x, (scale, shift), groups, num_groups, epilogue)
    if call is None:
        return twin.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
    kept = _put_gradient(call, grad_output, x, mean, invstd, epilogue)
    sums = _wide(num_groups, 2, x.shape[1])
    call.sums = sums.data_ptr()
    _library.syncbn_backward_sums(call)
    return kept[0], NO_EPILOGUE if call.dz else epilogue._replace(residual=None), sums


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
    """As :func:`syncbn.functional.normalize.grad_input`."""
    groups = _dense(groups)
    call = _call(x, (scale, shift), groups, len(mean), epilogue)
    if call is None:
        return twin.grad_input(dz, x, mean, invstd, scale, shift, means, groups, epilogue)
    dz, mean, invstd, means, grad = (
        *(_as_x(dz, x), mean.contiguous(), invstd.contiguous(), means.contiguous()),
        torch.empty_like(x),
    )
    call.grad_output, call.mean, call.invstd = dz.data_ptr(), mean.data_ptr(), invstd.data_ptr()
    call.means, call.out = means.data_ptr(), grad.data_ptr()
    _library.syncbn_grad_input(call)
    return grad


def backward_alone(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    r: Tensor | None,
    d: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    groups: Tensor | None,
    epilogue: Epilogue,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:
    """All of a backward pass in one, for groups that are all here; or None.

    Args:
        grad_output, x, mean, invstd, groups, epilogue: as :func:`backward_sums`'.
        weight, bias, r, d: as :func:`syncbn.functional.normalize.scale_and_shift`'s.
        count: (G, 1) float64, contiguous.
        dtypes: of the gradients of weight and bias.
        needs: which of the gradients of x, weight, bias and residual are wanted; the others are None.
    """
    groups = _dense(groups)
    call = _call(x, (weight, bias), groups, len(mean), epilogue)
    if call is None or any(dtype not in _TYPES for dtype, need in zip(dtypes, needs[1:3], strict=True) if need):
        return None
    kept = _put_gradient(call, grad_output, x, mean, invstd, epilogue)
    call.count = count.data_ptr()
    if r is not None and d is not None:
        r, d = r.to(WIRE_DTYPE), d.to(WIRE_DTYPE)
        call.r, call.d = r.data_ptr(), d.data_ptr()
    grad = grad_weight = grad_bias = None
    if needs[0]:
        grad = torch.empty_like(x)
        call.out = grad.data_ptr()
    if needs[1]:
        grad_weight = torch.empty(x.shape[1], dtype=dtypes[0], device="cpu")
        call.grad_weight, call.grad_weight_type = grad_weight.data_ptr(), _TYPES[grad_weight.dtype]
    if needs[2]:
        grad_bias = torch.empty(x.shape[1], dtype=dtypes[1], device="cpu")
        call.grad_bias, call.grad_bias_type = grad_bias.data_ptr(), _TYPES[grad_bias.dtype]
    _library.syncbn_backward(call)
    return grad, grad_weight, grad_bias, kept[0] if needs[3] else None
