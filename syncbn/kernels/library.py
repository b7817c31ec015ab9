"""Finds the compiled library for this machine."""

from __future__ import annotations

import ctypes

import torch

from syncbn.kernels.compiled import build


def load() -> ctypes.CDLL:
    """The library for the vector instructions that torch uses here (``ATEN_CPU_CAPABILITY`` may choose fewer).

    Raises:
        ImportError: there is none, or it cannot be loaded.
    """
    kinds = build.kinds()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    fitting = kinds[kinds.index(capability) :] if capability in kinds else kinds[-1:]
    problem = "they are not built"
    for path in map(build.library, fitting):
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                problem = str(error)
    raise ImportError(problem)
