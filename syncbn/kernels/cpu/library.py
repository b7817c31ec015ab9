"""Finds the compiled library for this machine."""

from __future__ import annotations

import ctypes
import logging

import torch

from syncbn.kernels.cpu import build

logger = logging.getLogger("syncbn")


def load() -> ctypes.CDLL:
    """The library for the vector instructions that torch uses here (``ATEN_CPU_CAPABILITY`` may choose fewer).

    Raises:
        ImportError: there is none, or it cannot be loaded.
    """
    kinds = build.kinds()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    fitting = kinds[kinds.index(capability) :] if capability in kinds else kinds[-1:]
    problem: object = "they are not built"
    try:
        found = [path for path in map(build.library, fitting) if path.exists()]
    except OSError as error:  # without its sources it is not known which library would be theirs
        raise ImportError(error) from error
    for path in found:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            problem = error
            continue
        if path != build.library(fitting[0]):
            logger.info("%s serves on a machine with %s", path.name, capability)
        return library
    raise ImportError(problem)
