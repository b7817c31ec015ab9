"""Finds the compiled library for this machine."""

from __future__ import annotations

import ctypes
import logging

import torch

from syncbn.kernels.cpu import build

logger = logging.getLogger("syncbn")


def load() -> ctypes.CDLL:
    """Load the library for the vector instructions that torch uses (``ATEN_CPU_CAPABILITY`` may choose fewer).

    If it is missing or cannot be loaded, the next one in :data:`build.KINDS` is tried; ImportError if none is left.
    """
    kinds = build.kinds()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    fitting = kinds[kinds.index(capability) :] if capability in kinds else kinds[-1:]
    problem: object = "they are not built"
    try:
        found = [path for path in map(build.library, fitting) if path.exists()]
    except OSError as error:  # the name of the library depends on the sources, which are missing
        raise ImportError(error) from error
    for path in found:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            problem = error
            continue
        if path != build.library(fitting[0]):
            logger.info("using %s, although torch uses %s", path.name, capability)
        return library
    raise ImportError(problem)
