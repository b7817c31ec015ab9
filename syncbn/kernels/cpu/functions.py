"""The steps on the CPU by the compiled kernels, and a whole batch normalization. The operators are in operators.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.functional import finish as finish_twin
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import Statistics
from syncbn.functional.normalize import Affine
from syncbn.functional.running import Running
from syncbn.functional.statistics import ONE_GROUP, WIRE_DTYPE, Groups, compute_dtype
from syncbn.kernels.cpu.library import load

instruction_set = load()
_ops = torch.ops.syncbn
# The overloads themselves: looking one up takes as long as the call.
_group_sums, _finish, _normalize = _ops.group_sums.default, _ops.finish.default, _ops.normalize.default
_backward_sums, _grad_input = _ops.backward_sums.default, _ops.grad_input.default
_batch_norm = _ops.batch_norm.default

# The operators take the fields of Running without its mode.
_NO_RUNNING: tuple[object, ...] = (None, None, None, None, None, None, None, False)
_BUFFER_TYPES = (torch.float32, torch.float64)


def _reads(running: Running) -> bool:
    """Whether the kernels can read these buffers and perform this update."""
    mean, var = running.mean, running.var
    return (
        (running.mode == "mean" or not running.update)
        and mean.dtype in _BUFFER_TYPES
        and mean.dtype == var.dtype
        and running.num_batches_tracked.dtype == torch.int64
        and running.num_nonfinite_batches is not None
        and mean.is_contiguous()
        and var.is_contiguous()
    )


def group_sums(x: Tensor, groups: Groups = ONE_GROUP) -> Tensor:
    """As :func:`syncbn.functional.statistics.group_sums`."""
    sums: Tensor = _group_sums(x, *groups)
    return sums


def finish(sums: Tensor, eps: float, running: Running | None = None) -> Statistics:
    """As :func:`syncbn.functional.finish.finish`."""
    if running is not None and not _reads(running):
        return finish_twin.finish(sums, eps, running)
    updates = _NO_RUNNING if running is None else running[:5] + running[6:]
    count, mean, invstd, var, corrections = _finish(sums, eps, *updates)
    r, d = (None, None) if running is None or running.limits is None else corrections
    return Statistics(count, mean, invstd, r, d, var)


def normalize(x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`."""
    y: Tensor = _normalize(x, *affine, *groups, *epilogue)
    return y


def backward_sums(
    grad_output: Tensor, x: Tensor, affine: Affine, groups: Groups = ONE_GROUP, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, Epilogue, Tensor]:
    """As :func:`syncbn.functional.normalize.backward_sums`.

    With an activation and no residual, dz is ``grad_output`` and the activation is left to :func:`grad_input`.
    """
    dz, sums = _backward_sums(grad_output, x, *affine, *groups, *epilogue)
    return dz, NO_EPILOGUE if epilogue.residual is not None else epilogue, sums


def grad_input(
    dz: Tensor,
    x: Tensor,
    affine: Affine,
    means: Tensor,
    groups: Groups = ONE_GROUP,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.grad_input`."""
    grad: Tensor = _grad_input(dz, x, *affine, means, *groups, epilogue.activation, epilogue.negative_slope)
    return grad


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    epilogue: Epilogue,
    groups: Groups,
    eps: float,
    save_output: bool,
) -> Tensor | None:
    """As :func:`syncbn.autograd.batch_norm` for groups that are all on this process: one operator, differentiable.

    Returns:
        the output, or None if the kernels cannot update these running statistics.
    """
    if running is not None and not _reads(running):
        return None
    updates = _NO_RUNNING if running is None else running[:5] + running[6:]
    y: Tensor = _batch_norm(x, weight, bias, *groups, *epilogue, eps, save_output, *updates)
    return y


def _fake_forward(x: Tensor, weight: object, bias: object, index: object, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups, *_, limits, _update = rest
    shape = (2, groups, x.shape[1])
    empty = x.new_empty((0,), dtype=WIRE_DTYPE)
    corrections = empty if limits is None else x.new_empty(shape, dtype=compute_dtype(x))
    return torch.empty_like(x), x.new_empty(shape, dtype=WIRE_DTYPE), corrections


def _fake_backward(grad_output: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    *_, bias_dtype, needs = rest
    c = x.shape[1]
    grad_weight = None if weight is None or not needs[1] else weight.new_empty(c)
    grad_bias = x.new_empty(c, dtype=bias_dtype) if needs[2] else None
    return torch.empty_like(x) if needs[0] else None, grad_weight, grad_bias, torch.empty_like(x) if needs[3] else None


torch.library.register_fake("syncbn::batch_norm_forward", _fake_forward)
torch.library.register_fake("syncbn::batch_norm_backward", _fake_backward)
