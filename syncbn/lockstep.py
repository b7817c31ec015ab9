"""Whether the ranks of a process group are at the same layer when they reduce.

The k-th reduction of one rank meets the k-th of the others, whatever it holds. If a rank skips a layer, or takes
another one of the same size, their sums mix, and the training goes on with wrong statistics.
"""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.torch_internals import PLAIN_TYPES, group_of

CHECK_EVERY = 17
"""One of so many reductions of a group on the CPU carries a tag of its layer, and takes about a tenth longer than the
others. A prime number, so that each layer of a model has its turn."""
DEBUG = os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")
"""Compare what the ranks are about to reduce before every reduction. This is slow: it is a second collective each."""
TAG_SIZE = 2
"""Numbers in a tag; see :func:`tag`."""


class Reduction(NamedTuple):
    """What is reduced."""

    layer: str
    direction: Literal["forward", "backward"] | None = None
    """None for what is no layer's pass, such as the counts of :func:`syncbn.uneven`."""

    def __str__(self) -> str:
        return self.layer if self.direction is None else f"{self.layer} ({self.direction})"


class Position(NamedTuple):
    """The reduction that this process waits in."""

    reduction: Reduction | None
    """None in a compiled graph, which does not know its layer."""
    number: int
    """1 for the layer's first reduction in this direction."""
    group_name: str

    def __str__(self) -> str:
        return f"{self.reduction or 'a layer of a compiled graph'}, call {self.number}"


last: Position | None = None
"""The most recent reduction that has ended."""
watching = 0
"""The number of watchdogs. Only with one are reductions on CUDA followed to their end."""
_waiting: dict[int, Position] = {}
"""By thread."""
_on_device: deque[tuple[Position, torch.cuda.Event]] = deque()
_lock = threading.Lock()
_calls: Counter[tuple[str, Reduction | None]] = Counter()
"""By process group and layer."""
_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()
"""By world, the number of reductions of each of its groups. They are the same on all ranks of the group."""


def begin(tensor: Tensor, group_name: str, reduction: Reduction | None) -> tuple[Position, bool]:
    """Note that this thread reduces ``tensor`` from now on; where it is, and whether the reduction carries a tag.

    With ``SYNCBN_DEBUG=1`` all ranks raise RuntimeError if they do not reduce the same.
    """
    if tensor.device.type == "meta" or type(tensor) not in PLAIN_TYPES:  # nothing travels, perhaps on this rank alone
        return Position(reduction, 0, group_name), False
    position = _begin(tensor, group_name, reduction)
    world = dist.group.WORLD
    assert world is not None, "a group has a name only in an initialized world"
    counts = _counts.get(world)
    if counts is None:
        counts = _counts[world] = Counter()
    number = counts[group_name]
    counts[group_name] = number + 1
    # On CUDA the tag would take as long as the reduction: four more kernels to launch.
    return position, tensor.is_cpu and tensor.dtype == torch.float64 and number % CHECK_EVERY == 0


def _begin(tensor: Tensor, group_name: str, reduction: Reduction | None) -> Position:
    _calls[group_name, reduction] += 1
    position = Position(reduction, _calls[group_name, reduction], group_name)
    _waiting[threading.get_ident()] = position
    if DEBUG:
        try:
            _compare(tensor, position)
        except BaseException:
            end(position)
            raise
    return position


@contextmanager
def watched(name: str, tensor: Tensor, group_name: str) -> Iterator[None]:
    """Note that this thread waits for the others, to reduce ``tensor`` in place, within this context.

    It is for what is no layer's pass, and carries no tag.
    """
    position = _begin(tensor, group_name, Reduction(name))
    try:
        yield
    finally:
        end(position, tensor)


def end(position: Position, result: Tensor | None = None) -> None:
    """Note that the host has come to the end of the reduction, or that it failed. On CUDA the device may not have."""
    global last
    if watching and result is not None and result.is_cuda and not torch.cuda.is_current_stream_capturing():
        with _lock:
            _on_device.append((position, torch.cuda.current_stream(result.device).record_event()))
    last = position
    _waiting.pop(threading.get_ident(), None)


def oldest() -> Position | None:
    """A reduction that has begun and not come to its end, on the device either; the first of several."""
    with _lock:
        while _on_device and _on_device[0][1].query():
            _on_device.popleft()
        if _on_device:
            return _on_device[0][0]
    return next(iter(list(_waiting.values())), None)


def tag(reduction: Reduction | None) -> tuple[float, float]:
    """What travels with the sums: a hash of the layer, and 1; zeros if the layer is unknown."""
    return (0.0, 0.0) if reduction is None else (float(_hash(reduction)), 1.0)


@lru_cache(maxsize=16384)
def _hash(reduction: Reduction) -> int:
    return zlib.crc32(str(reduction).encode())


def check_each(tags: Tensor, position: Position) -> None:
    """Raise RuntimeError unless all ranks' tags (ranks, 2) are this process's."""
    if position.reduction is None:
        return
    own, found = _hash(position.reduction), tags.tolist()
    if all(value == own or not known for value, known in found):
        return
    names = {_hash(reduction): reduction for _, reduction in list(_calls) if reduction is not None}
    ranks = dist.get_process_group_ranks(group_of(position.group_name))
    others = [
        f"rank {rank} at {names.get(int(value), 'a layer that this rank has not come to')}"
        for rank, (value, known) in zip(ranks, found, strict=True)
        if known and value != own
    ]
    raise RuntimeError(f"{_mixed(position)}, {', '.join(others)}")


def check_sum(summed: Tensor, position: Position) -> None:
    """Raise RuntimeError unless the sum (1, 2) of the ranks' tags is that of tags like this process's."""
    ((value, known),) = summed.tolist()
    if position.reduction is not None and value != _hash(position.reduction) * known:
        raise RuntimeError(f"{_mixed(position)}, others at other layers (SYNCBN_DEBUG=1 names them)")


def _mixed(position: Position) -> str:
    remedy = "every rank has to run the same layers, of the same names, in the same order"
    return f"the statistics of different layers were added; {remedy}: rank {dist.get_rank()} is at {position}"


def _compare(tensor: Tensor, position: Position) -> None:
    group = group_of(position.group_name)
    ranks = dist.get_process_group_ranks(group)
    here = f"{position}, {tuple(tensor.shape)} {tensor.dtype}"
    everywhere: list[str] = [""] * len(ranks)
    dist.all_gather_object(everywhere, here, group)
    if len(set(everywhere)) > 1:
        found = "; ".join(f"rank {rank}: {what}" for rank, what in zip(ranks, everywhere, strict=True))
        raise RuntimeError(f"the ranks do not reduce the statistics of the same layer: {found}")
