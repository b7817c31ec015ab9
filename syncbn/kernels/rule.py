"""Which implementation runs for a tensor."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from syncbn.functional import finish, normalize, stats
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.finish import Limits, Running, Statistics

logger = logging.getLogger("syncbn")


class GroupSums(Protocol):
    """As :func:`syncbn.functional.stats.group_sums`."""

    def __call__(self, x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor: ...


class Normalize(Protocol):
    """As :func:`syncbn.functional.normalize.normalize`."""

    def __call__(
        self,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: Tensor | None = None,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> Tensor: ...


class BackwardSums(Protocol):
    """As :func:`syncbn.functional.normalize.backward_sums`."""

    def __call__(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: Tensor | None,
        num_groups: int,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> tuple[Tensor, Epilogue, Tensor]: ...


class GradInput(Protocol):
    """As :func:`syncbn.functional.normalize.grad_input`."""

    def __call__(
        self,
        dz: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        means: Tensor,
        groups: Tensor | None = None,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> Tensor: ...


class Finish(Protocol):
    """As :func:`syncbn.functional.finish.finish`."""

    def __call__(
        self,
        sums: Tensor,
        eps: float,
        running: Running | None = None,
        limits: Limits | None = None,
        update: bool = True,
    ) -> Statistics: ...


class ForwardAlone(Protocol):
    """``group_sums``, ``finish`` and ``normalize`` in one, for groups that are all here: y and statistics; or None."""

    def __call__(
        self,
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
    ) -> tuple[Tensor, Statistics] | None: ...


class BackwardAlone(Protocol):
    """A backward pass at once, for groups that are all here: the gradients of x, weight, bias and residual; or None.

    ``dtypes`` are those of the gradients of weight and bias, ``needs`` says which of the four are wanted.
    """

    def __call__(
        self,
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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None: ...


class Kernels(NamedTuple):
    """One implementation of the five functions, and of what it does at once where nothing travels in between."""

    name: str
    group_sums: GroupSums
    finish: Finish
    normalize: Normalize
    backward_sums: BackwardSums
    grad_input: GradInput
    forward_alone: ForwardAlone | None = None
    backward_alone: BackwardAlone | None = None


REFERENCE = Kernels(
    "reference", stats.group_sums, finish.finish, normalize.normalize, normalize.backward_sums, normalize.grad_input
)


def _load(name: str, *parts: str) -> Kernels:
    found: dict[str, Any] = {"finish": finish.finish}
    for part in parts:
        module = importlib.import_module(f"syncbn.kernels.{part}")
        found |= {field: getattr(module, field) for field in Kernels._fields if hasattr(module, field)}
    return Kernels(name, **found)


def pick(x: Tensor, recorded: bool | None = None) -> Kernels:
    """The implementation for ``x``.

    ``recorded`` says whether derivatives are to be had through each operation; None is whether they are being recorded.

    The twins of :mod:`syncbn.functional` serve whatever is traced, transformed, differentiated or watched operation by
    operation (``torch.compile`` makes kernels of its own from them), other devices, and CUDA under
    ``torch.use_deterministic_algorithms``, where a sum over blocks in no fixed order will not do. On the CPU the
    compiled kernels are put to use, on CUDA Triton's; where these are not there, torch's native ones.
    """
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() if recorded is None else recorded)
        or type(x) not in PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return REFERENCE
    if x.is_cpu:
        return cpu_kernels()
    if x.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return cuda_kernels()
    return REFERENCE


PLAIN = (Tensor, torch.nn.Parameter)
"""Subclasses (fake tensors, DTensor) bring rules of their own."""


@functools.cache
def cpu_kernels() -> Kernels:
    """The package's compiled kernels where they are built, torch's own put together else, with one line in the log."""
    try:
        return compiled_kernels()
    except ImportError as error:
        logger.warning(
            "the compiled CPU kernels cannot be loaded (%s): torch's native kernels serve instead. To build them: "
            "python -m syncbn.kernels.compiled.build",
            error,
        )
        return native_cpu_kernels()


def compiled_kernels() -> Kernels:
    """The package's own for the CPU, or an ImportError where they are not built."""
    return _load("compiled", "cpu_compiled")


def native_cpu_kernels() -> Kernels:
    """torch's own, put together."""
    return _load("native", "native_cpu_stats", "native_cpu")


@functools.cache
def cuda_kernels() -> Kernels:
    """Triton's kernels where it is installed, torch's own else, with one line in the log."""
    try:
        return _load("triton", "triton")
    except ImportError as error:
        logger.warning("Triton cannot be imported (%s): torch's native kernels serve instead", error)
        return _load("native", "native_cuda")
