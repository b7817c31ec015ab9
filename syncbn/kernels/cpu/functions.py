"""The steps on the CPU, by the compiled kernels: one call each, for any number of groups.

The kernels read tensors of any floating dtype that are contiguous or whose channels are adjacent (channels_last,
(N, C)). A gradient or residual in another format is copied into the format of x. For tensors that the kernels cannot
read, the twins in :mod:`syncbn.functional` compute the result or raise the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncbn.functional import finish as finish_twin
from syncbn.functional import normalize as twin
from syncbn.functional import statistics as statistics_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import LocalStatistics, Statistics
from syncbn.functional.normalize import Affine
from syncbn.functional.running import Running
from syncbn.functional.statistics import ONE_GROUP, WIRE_DTYPE, Groups, compute_dtype
from syncbn.kernels.cpu.call import (
    TYPES,
    Call,
    as_x,
    fits,
    halves,
    is_like,
    is_readable,
    library,
    make_call,
    put_moments,
    put_running,
    wide,
)

# -- forward -----------------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, groups: Groups = ONE_GROUP) -> Tensor:
    """As :func:`syncbn.functional.statistics.group_sums`."""
    call = make_call(x, None, None, groups, NO_EPILOGUE)
    if call is None:
        return statistics_twin.group_sums(x, groups)
    sums = wide(groups.number, 2 * x.shape[1] + 1)
    call.sums = sums.data_ptr()
    library.syncbn_group_sums(call)
    return sums


def finish(sums: Tensor, eps: float, running: Running | None = None) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`."""
    g, c = len(sums), (sums.shape[1] - 1) // 2
    if not (is_like(sums, WIRE_DTYPE, (g, 2 * c + 1)) and is_readable(running, c)):
        return finish_twin.finish(sums, eps, running)
    call = Call(sums=sums.data_ptr(), channels=c, num_groups=g, eps=eps)
    # One tensor each: a tensor saved for the backward pass must not keep the others alive.
    count, mean, invstd, var = wide(g, 1), wide(g, c), wide(g, c), wide(g, c)
    call.count, call.mean, call.invstd, call.var = (t.data_ptr() for t in (count, mean, invstd, var))
    corrections = put_running(call, running)
    library.syncbn_finish(call)
    r, d = (None, None) if corrections is None else corrections
    return Statistics(count, mean, invstd, r, d, var)


def normalize(x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`."""
    call = make_call(x, affine.scale, affine.shift, groups, epilogue)
    if call is None or not put_moments(call, affine):
        return twin.normalize(x, affine, groups, epilogue)
    y = torch.empty_like(x)
    call.out = y.data_ptr()
    library.syncbn_normalize(call)
    return y


def local_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None,
    groups: Groups,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`group_sums`, :func:`finish` and :func:`normalize` in one call.

    Returns:
        the output, and the moments and corrections of :class:`~syncbn.functional.finish.LocalStatistics`.
    """
    call = make_call(x, weight, bias, groups, epilogue) if is_readable(running, x.shape[1]) else None
    if call is None:  # some of the steps may still be able to read their tensors
        _, mean, invstd, r, d, _ = finish(group_sums(x, groups), eps, running)
        affine = Affine(mean, invstd, *twin.scale_and_shift(weight, bias, r, d, groups.number))
        given = None if r is None or d is None else torch.stack((r, d)).to(compute_dtype(x))
        return normalize(x, affine, groups, epilogue), torch.stack((mean, invstd)), given
    y = torch.empty_like(x)
    moments = torch.empty(2, groups.number, x.shape[1], dtype=WIRE_DTYPE, device="cpu")
    call.out, call.eps = y.data_ptr(), eps
    call.mean, call.invstd = halves(moments)
    corrections = put_running(call, running)
    library.syncbn_forward(call)
    return y, moments, None if corrections is None else corrections.to(compute_dtype(x))


# -- backward ----------------------------------------------------------------------------------------------------------


def _put_gradient(call: Call, grad_output: Tensor, x: Tensor, write: bool) -> Tensor:
    """Put the gradient into the call; returns dz, not yet computed, or the gradient from which dz follows.

    dz is written only if ``write`` and there is a residual under an activation, whose gradient it is.
    """
    given = as_x(grad_output, x)
    call.grad_output = call.keep(given)
    if not (write and call.activation and call.residual):
        return given
    dz = torch.empty_like(x)
    call.dz = dz.data_ptr()
    return dz


def backward_sums(
    grad_output: Tensor, x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, Epilogue, Tensor]:
    """As :func:`syncbn.functional.normalize.backward_sums`.

    With an activation and no residual, dz is ``grad_output`` and the activation is left to :func:`grad_input`.
    """
    call = make_call(x, affine.scale, affine.shift, groups, epilogue)
    if call is None or not (put_moments(call, affine) and fits(grad_output, x)):
        return twin.backward_sums(grad_output, x, affine, groups, epilogue)
    dz = _put_gradient(call, grad_output, x, write=True)
    sums = wide(groups.number, 2, x.shape[1])
    call.sums = sums.data_ptr()
    library.syncbn_backward_sums(call)
    rest = NO_EPILOGUE if epilogue.residual is not None else epilogue
    return dz, rest, sums


def grad_input(
    dz: Tensor,
    x: Tensor,
    affine: Affine,
    means: Tensor,
    groups: Groups = ONE_GROUP,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.grad_input`."""
    call = make_call(x, affine.scale, affine.shift, groups, epilogue)
    means = means.contiguous()
    readable = is_like(means, WIRE_DTYPE, (groups.number, 2, x.shape[1])) and fits(dz, x)
    if call is None or not (readable and put_moments(call, affine)):
        return twin.grad_input(dz, x, affine, means, groups, epilogue)
    _put_gradient(call, dz, x, write=False)
    grad = torch.empty_like(x)
    call.means, call.out = means.data_ptr(), grad.data_ptr()
    library.syncbn_grad_input(call)
    return grad


def local_backward(
    grad_output: Tensor,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, torch.dtype | None],
    statistics: LocalStatistics,
    groups: Groups,
    epilogue: Epilogue,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:
    """The whole backward pass in one call, or None if a tensor cannot be read.

    Args:
        grad_output, x: (N, C, *).
        parameters: weight and bias, (C,) or None, and the dtype of the bias, whose values only an activation needs.
        statistics, groups, epilogue: those of the forward pass.
        needs: which gradients are wanted, of x, weight, bias and residual. The others are None.
    """
    weight, bias, bias_dtype = parameters
    moments, corrections = statistics
    call = make_call(x, weight, bias, groups, epilogue)
    shape = (2, groups.number, x.shape[1])
    if call is None or not (is_like(moments, WIRE_DTYPE, shape) and fits(grad_output, x)):
        return None
    call.mean, call.invstd = halves(moments)
    if corrections is not None:
        wide_corrections = corrections.to(WIRE_DTYPE)
        if not is_like(wide_corrections, WIRE_DTYPE, shape):
            return None
        call.kept = (*call.kept, wide_corrections)
        call.r, call.d = halves(wide_corrections)
    dz = _put_gradient(call, grad_output, x, write=needs[3])
    grad = grad_weight = grad_bias = None
    if needs[0]:
        grad = torch.empty_like(x)
        call.out = grad.data_ptr()
    if needs[1]:
        assert weight is not None, "its gradient is wanted"
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        call.grad_weight, call.grad_weight_type = grad_weight.data_ptr(), TYPES[weight.dtype]
    if needs[2]:
        grad_bias = torch.empty(x.shape[1], dtype=bias_dtype, device="cpu")
        call.grad_bias, call.grad_bias_type = grad_bias.data_ptr(), TYPES[grad_bias.dtype]
    library.syncbn_backward(call)
    return grad, grad_weight, grad_bias, dz if needs[3] else None
