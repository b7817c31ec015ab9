"""The passes on the CPU, by the package's own compiled kernels (``compiled/``): one call each for any groups.

They read tensors that are contiguous, or whose channels are innermost (channels_last, (N, C)), of any floating dtype.
An ``x`` in another layout goes to the functional twins; a gradient or residual in another is copied into x's. So does
whatever the kernels cannot read: the twins say what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncbn.functional import finish as finish_twin
from syncbn.functional import normalize as twin
from syncbn.functional import stats as stats_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import Limits, Running, Statistics
from syncbn.functional.stats import WIRE_DTYPE
from syncbn.kernels.cpu_call import (
    TYPES,
    Call,
    as_x,
    fits,
    is_like,
    is_readable,
    library,
    make_call,
    put_finish,
    put_moments,
    wide,
)

__all__ = ["backward_alone", "backward_sums", "finish", "forward_alone", "grad_input", "group_sums", "normalize"]


# -- forward -----------------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """As :func:`syncbn.functional.stats.group_sums`."""
    call = make_call(x, (None, None), groups, num_groups, NO_EPILOGUE)
    if call is None:
        return stats_twin.group_sums(x, groups, num_groups)
    sums = wide(num_groups, 2 * x.shape[1] + 1)
    call.sums = sums.data_ptr()
    library.syncbn_group_sums(call)
    return sums


def finish(
    sums: Tensor, eps: float, running: Running | None = None, limits: Limits | None = None, update: bool = True
) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`."""
    g, c = len(sums), (sums.shape[1] - 1) // 2
    if not (is_like(sums, WIRE_DTYPE, g, 2 * c + 1) and is_readable(running, c, update)):
        return finish_twin.finish(sums, eps, running, limits, update)
    call = Call(sums=sums.data_ptr(), channels=c, num_groups=g, eps=eps)
    found = put_finish(call, running, limits, update)
    library.syncbn_finish(call)
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
    call = make_call(x, (scale, shift), groups, mean.shape[0], epilogue)
    mean, invstd = mean.contiguous(), invstd.contiguous()
    if call is None or not put_moments(call, mean, invstd):
        return twin.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    y = torch.empty_like(x)
    call.out = y.data_ptr()
    library.syncbn_normalize(call)
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
    if not is_readable(running, x.shape[1], update):
        return None
    call = make_call(x, (weight, bias), groups, num_groups, epilogue)
    if call is None:
        return None
    y = torch.empty_like(x)
    call.out, call.eps = y.data_ptr(), eps
    found = put_finish(call, running, limits, update)
    library.syncbn_forward(call)
    return y, found


# -- backward ----------------------------------------------------------------------------------------------------------


def _put_gradient(call: Call, grad_output: Tensor, x: Tensor, write: bool = True) -> Tensor:
    """The gradient, as the backward functions read it: returns dz, or what it is to be made from.

    Only a residual under an activation, whose gradient dz is, has dz written, where that gradient is wanted.
    """
    given = as_x(grad_output, x)
    call.grad_output = call.keep(given)
    if not (write and call.activation and call.residual):
        return given
    dz = torch.empty_like(x)
    call.dz = dz.data_ptr()
    return dz


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
    mean, invstd = mean.contiguous(), invstd.contiguous()
    call = make_call(x, (scale, shift), groups, num_groups, epilogue)
    if call is None or not (put_moments(call, mean, invstd) and fits(grad_output, x)):
        return twin.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
    dz = _put_gradient(call, grad_output, x)
    sums = wide(num_groups, 2, x.shape[1])
    call.sums = sums.data_ptr()
    library.syncbn_backward_sums(call)
    return dz, NO_EPILOGUE if call.dz else epilogue._replace(residual=None), sums


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
    mean, invstd, means = mean.contiguous(), invstd.contiguous(), means.contiguous()
    call = make_call(x, (scale, shift), groups, mean.shape[0], epilogue)
    readable = call is not None and put_moments(call, mean, invstd) and fits(dz, x)
    if call is None or not (readable and is_like(means, WIRE_DTYPE, mean.shape[0], 2, x.shape[1])):
        return twin.grad_input(dz, x, mean, invstd, scale, shift, means, groups, epilogue)
    _put_gradient(call, dz, x, write=False)
    grad = torch.empty_like(x)
    call.means, call.out = means.data_ptr(), grad.data_ptr()
    library.syncbn_grad_input(call)
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
    if r is not None and d is not None:
        r, d = r.to(WIRE_DTYPE), d.to(WIRE_DTYPE)
    call = make_call(x, (weight, bias), groups, mean.shape[0], epilogue)
    if (
        call is None
        or not (put_moments(call, mean, invstd) and fits(grad_output, x))
        or not (is_like(r, WIRE_DTYPE, *mean.shape) and is_like(d, WIRE_DTYPE, *mean.shape))
        or not is_like(count, WIRE_DTYPE, mean.shape[0], 1)
        or (needs[1] and dtypes[0] not in TYPES)
        or (needs[2] and dtypes[1] not in TYPES)
    ):
        return None
    dz = _put_gradient(call, grad_output, x, write=needs[3])
    call.count = count.data_ptr()
    if r is not None and d is not None:
        call.r, call.d = r.data_ptr(), d.data_ptr()
    grad = grad_weight = grad_bias = None
    if needs[0]:
        grad = torch.empty_like(x)
        call.out = grad.data_ptr()
    if needs[1]:
        grad_weight = torch.empty(x.shape[1], dtype=dtypes[0], device="cpu")
        call.grad_weight, call.grad_weight_type = grad_weight.data_ptr(), TYPES[grad_weight.dtype]
    if needs[2]:
        grad_bias = torch.empty(x.shape[1], dtype=dtypes[1], device="cpu")
        call.grad_bias, call.grad_bias_type = grad_bias.data_ptr(), TYPES[grad_bias.dtype]
    library.syncbn_backward(call)
    return grad, grad_weight, grad_bias, dz if needs[3] else None
