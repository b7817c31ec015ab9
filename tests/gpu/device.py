"""The device of these tests: CUDA, or in a rehearsal the CPU, where Triton's interpreter runs the CUDA kernels.

A rehearsal is ``TRITON_INTERPRET=1 pytest tests/gpu`` without a CUDA device. It leaves out what only CUDA has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from syncbn.kernels.dispatch import REFERENCE, Kernels, cuda

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if REHEARSAL else "cuda", None if REHEARSAL else 0)
only_on_cuda = pytest.mark.skipif(REHEARSAL, reason="only CUDA has it")

_with_twins = False


@contextlib.contextmanager
def twins() -> Iterator[None]:
    """Layers on the CPU do not use the CUDA kernels, in a rehearsal either: they are the truth."""
    global _with_twins
    _with_twins = True
    try:
        yield
    finally:
        _with_twins = False


def rehearsed(x: Tensor) -> Kernels:
    """The compiled kernels for ``x`` as if it were on CUDA."""
    return REFERENCE if _with_twins else cuda()


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """An error where the host waits for the device."""
    if REHEARSAL:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
