"""Which implementation runs for a tensor."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional import finish, normalize, statistics
from syncbn.functional.epilogue import Epilogue
from syncbn.functional.finish import Statistics
from syncbn.functional.normalize import Affine
from syncbn.functional.running import Running
from syncbn.functional.statistics import Groups
from syncbn.torch_internals import PLAIN_TYPES, constant_result, is_plain, is_transformed, runs_at_once

logger = logging.getLogger("syncbn")

BatchNorm = Callable[
    [Tensor, Tensor | None, Tensor | None, Running | None, Epilogue, Groups, float, bool], Tensor | None
]


class Kernels(NamedTuple):
    """One implementation of the steps of batch normalization."""

    name: str
    group_sums: Callable[[Tensor, Groups], Tensor]
    """:func:`syncbn.functional.statistics.group_sums`; reads x once."""
    finish: Callable[[Tensor, float, Running | None], Statistics]
    """:func:`syncbn.functional.finish.finish`; small."""
    normalize: Callable[[Tensor, Affine, Groups, Epilogue], Tensor]
    """:func:`syncbn.functional.normalize.normalize`; reads x and writes y."""
    backward_sums: Callable[[Tensor, Tensor, Affine, Groups, Epilogue], tuple[Tensor, Epilogue, Tensor]]
    """:func:`syncbn.functional.normalize.backward_sums`; reads dy and x."""
    grad_input: Callable[[Tensor, Tensor, Affine, Tensor, Groups, Epilogue], Tensor]
    """:func:`syncbn.functional.normalize.grad_input`; reads dy and x, and writes dx."""
    batch_norm: BatchNorm | None = None
    """See :func:`whole`."""


REFERENCE = Kernels(
    "reference",
    statistics.group_sums,
    finish.finish,
    normalize.normalize,
    normalize.backward_sums,
    normalize.grad_input,
)


def pick(x: Tensor, *, differentiable: bool) -> Kernels:
    """The implementation for ``x``.

    The twins in :mod:`syncbn.functional` are used if the operation is traced, transformed or observed
    (``torch.compile`` makes kernels of its own from them), on other devices, and on CUDA under
    ``torch.use_deterministic_algorithms``, because Triton's sums over blocks are added in no fixed order.

    Args:
        x: (N, C, *).
        differentiable: whether autograd must be able to differentiate each operation.
    """
    return REFERENCE if differentiable or not runs_at_once(x) else _compiled(x)


def _compiled(x: Tensor) -> Kernels:
    """The kernels for the device of ``x``; the twins if there are none. Tests choose others here."""
    if x.is_cpu:
        return cpu()
    if x.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return cuda()
    return REFERENCE


def whole(x: Tensor) -> BatchNorm | None:
    """All steps for ``x`` in one differentiable function, for groups that are all on this process; None without one.

    It takes (x, weight, bias, running, epilogue, groups, eps, save_output) and returns the output, or None if it cannot
    update the running statistics. On the CPU it is an operator, which a compiled graph calls too: it takes less time to
    compile than the operations that it consists of, and no more to run. An exported program consists of torch's own
    operations.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or not (x.is_cpu and type(x) in PLAIN_TYPES and _has_cpu_operator()):
            return None
        from syncbn.kernels.cpu import functions

        return None if is_transformed() else functions.batch_norm
    return _compiled(x).batch_norm if is_plain(x) else None


@constant_result
def _has_cpu_operator() -> bool:
    return cpu().batch_norm is not None


@functools.cache
def cpu() -> Kernels:
    """The compiled C++ kernels, or the twins and one line in the log if they cannot be loaded."""
    try:
        from syncbn.kernels.cpu import functions
    except ImportError as error:
        logger.warning(
            "the compiled CPU kernels cannot be loaded (%s): slower torch operations are used. To build the kernels: "
            "python -m syncbn.kernels.cpu.build",
            error,
        )
        return REFERENCE
    return Kernels(
        "cpu",
        functions.group_sums,
        functions.finish,
        functions.normalize,
        functions.backward_sums,
        functions.grad_input,
        functions.batch_norm,
    )


@functools.cache
def cuda() -> Kernels:
    """Triton's kernels, or the twins and one line in the log if Triton cannot be imported."""
    try:
        from syncbn.kernels.cuda import functions, local
    except ImportError as error:
        logger.warning("Triton cannot be imported (%s): slower torch operations are used", error)
        return REFERENCE
    return Kernels(
        "triton",
        functions.group_sums,
        functions.finish,
        functions.normalize,
        functions.backward_sums,
        functions.grad_input,
        local.batch_norm,
    )
