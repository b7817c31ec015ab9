"""Finds the compiled library for this machine."""

from __future__ import annotations

import ctypes
import logging
import os

import torch

from syncbn.kernels.cpu import build
from syncbn.torch_internals import vector_instructions

logger = logging.getLogger("syncbn")


def instruction_sets() -> list[str]:
    """The names in :data:`build.KINDS` whose instructions this processor has, best first."""
    best = vector_instructions()
    kinds = build.kinds()
    return kinds[kinds.index(best) :] if best in kinds else kinds[-1:]


def wanted() -> str:
    """The instruction set to use: ``SYNCBN_CPU``, or that which torch uses (``ATEN_CPU_CAPABILITY`` may choose fewer).

    Raises:
        ValueError: ``SYNCBN_CPU`` names no instruction set of this processor.
    """
    usable = instruction_sets()
    chosen = os.environ.get("SYNCBN_CPU")
    if chosen is None:
        capability = torch.backends.cpu.get_cpu_capability().lower()
        return capability if capability in usable else usable[-1]
    if chosen not in usable:
        raise ValueError(f"SYNCBN_CPU={chosen!r}: this processor can run {', '.join(usable)}; name one of them")
    return chosen


def load() -> ctypes.CDLL:
    """Load the library for the :func:`wanted` instruction set.

    If it is missing or cannot be loaded, the next one in :data:`build.KINDS` is tried; ImportError if none is left.
    With ``SYNCBN_CPU`` no other is tried.
    """
    first = wanted()
    usable = instruction_sets()
    fitting = [first] if "SYNCBN_CPU" in os.environ else usable[usable.index(first) :]
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
        if path != build.library(first):
            logger.info("using %s, although %s is wanted", path.name, first)
        return library
    raise ImportError(problem)
