"""Finds and loads the compiled libraries for this machine."""

from __future__ import annotations

import functools
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


@functools.cache
def load() -> str:
    """Load the operators, ``torch.ops.syncbn``, with the kernels for the :func:`wanted` instruction set.

    If that set's library is missing or cannot be loaded, the next one in :data:`build.KINDS` is tried; with
    ``SYNCBN_CPU`` none is. The operators are compiled first if that has not been done for this torch.

    Returns:
        the instruction set in use.

    Raises:
        ImportError: no library is left, or the operators cannot be compiled.
    """
    first = wanted()
    usable = instruction_sets()
    fitting = [first] if "SYNCBN_CPU" in os.environ else usable[usable.index(first) :]
    problem: object = "they are not built"
    try:
        paths = {kind: build.library(kind) for kind in fitting}
        found = {kind: path for kind, path in paths.items() if path.exists()}
        if found:
            _load_operators()
    # The names of the libraries depend on the sources. A user may have no home folder, or one without file locks.
    except (OSError, RuntimeError) as error:
        raise ImportError(error.__cause__ or error) from error
    for kind, path in found.items():
        try:
            torch.ops.syncbn.open(str(path))
        except RuntimeError as error:
            problem = error
            continue
        if kind != first:
            logger.info("using the kernels for %s, although %s is wanted", kind, first)
        return kind
    raise ImportError(problem)


def _load_operators() -> None:
    path = build.operators()
    if not path.exists():
        logger.warning("compiling the CPU operators for torch %s (once; about half a minute)", torch.__version__)
        build.build_operators()
    torch.ops.load_library(path)
