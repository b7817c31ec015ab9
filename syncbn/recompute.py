"""Activation checkpointing: the repeated forward pass normalizes by the statistics of the first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from syncbn.functional.finish import Statistics
from syncbn.torch_internals import in_backward


class Kept(NamedTuple):
    """What a layer's first forward pass has learnt from all processes."""

    statistics: Statistics
    joins_backward: bool
    """Whether the input, which needs no gradient here, has to take part in the backward pass of other processes."""


@dataclass
class _Tape:
    """What a forward pass has met, in the order of its layers."""

    kept: list[Kept] = field(default_factory=list)
    domains: list[Any] = field(default_factory=list)
    """Of the layers that have several domains, those in use; see :func:`syncbn.domain`."""


@dataclass
class _Reader:
    """A place on a tape."""

    tape: _Tape
    place: int = 0
    domain_place: int = 0

    def is_ahead(self, place: int, entries: list[Any]) -> bool:
        """Whether ``place`` is where the first pass, which still goes on, has not come to."""
        return place == len(entries) and any(each is self.tape for each in _active.stack)


class _Active(threading.local):
    """The tapes that this thread writes or reads, the innermost last. Autograd's threads each have their own."""

    def __init__(self) -> None:
        self.stack: list[_Tape | _Reader] = []


_active = _Active()


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint`` for models with this package's layers.

    Activation checkpointing runs a part of the model a second time, in the backward pass. With these contexts the
    second time is exactly like the first: layers take the statistics that the first has found, the r and d of batch
    renormalization, and the domain in which the first was. Nothing is reduced again. The first time keeps 2C float64
    numbers for each layer (4C for :class:`BatchRenorm`).

    Without them, a layer computes and reduces its statistics again. :class:`BatchRenorm` raises an error, as its
    corrections are others by then, and so does a layer with several domains (:func:`syncbn.domains`). Either way the
    running statistics are updated once. All of this holds in eager mode: keep layers of a compiled graph out of
    activation checkpointing.

    Returns:
        A context for the first forward pass and one for its repetition.

    Example:
        >>> import syncbn, torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> block = torch.nn.Sequential(torch.nn.Linear(3, 3), syncbn.BatchRenorm(3), torch.nn.ReLU())
        >>> y = checkpoint(block, torch.randn(4, 3), use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
        >>> y.sum().backward()
    """
    tape = _Tape()
    return _writing(tape), _reading(tape)


@contextmanager
def _writing(tape: _Tape) -> Iterator[None]:
    _active.stack.append(tape)
    try:
        yield
    finally:
        _active.stack.pop()


class _reading(AbstractContextManager[None]):
    """Reads a tape from its beginning. It is entered once for each backward pass over the same part of the graph."""

    def __init__(self, tape: _Tape) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        _active.stack.append(_Reader(self._tape))

    def __exit__(self, *error: object) -> None:
        _active.stack.pop()


def is_taped() -> bool:
    """Whether statistics are to be kept, or are there from the first forward pass."""
    return not torch.compiler.is_compiling() and bool(_active.stack)


def is_repeated() -> bool:
    """Whether this forward pass is a repetition: it runs inside of a backward pass."""
    return not torch.compiler.is_compiling() and in_backward()


def recall(num_features: int) -> Kept | None:
    """What this layer's first forward pass has kept, if this is the second."""
    reader = _innermost_reader()
    if reader is None:
        return None
    kept, place = reader.tape.kept, reader.place
    if reader.is_ahead(place, kept):
        return None
    reader.place += 1
    if place == len(kept) or kept[place].statistics.mean.shape[1] != num_features:
        raise RuntimeError(_OTHER_LAYERS)
    return kept[place]


_OTHER_LAYERS = "activation checkpointing repeats a layer that the first forward pass did not have"


def _innermost_reader() -> _Reader | None:
    return next((each for each in reversed(_active.stack) if isinstance(each, _Reader)), None)


def keep(kept: Kept) -> None:
    """Keep it for the repetition, also for that of a checkpoint around this one.

    A tape below one that is read is not written: it has the layer from the first pass, which may still be going on, as
    with a derivative that is taken inside of it.
    """
    for tape in _written():
        tape.kept.append(kept)


def _written() -> Iterator[_Tape]:
    for each in reversed(_active.stack):
        if isinstance(each, _Reader):
            return
        yield each


def domain_of_pass(present: Any) -> Any:
    """The domain of a layer's first forward pass, if this is the second; else ``present``, which is kept."""
    reader = _innermost_reader()
    if reader is not None and not reader.is_ahead(reader.domain_place, reader.tape.domains):
        if reader.domain_place == len(reader.tape.domains):
            raise RuntimeError(_OTHER_LAYERS)
        present = reader.tape.domains[reader.domain_place]
        reader.domain_place += 1
    for tape in _written():
        tape.domains.append(present)
    return present
