"""Whether the ranks of a process group are at the same layer when they reduce.

The k-th reduction of one rank meets the k-th of the others, whatever it holds. If a rank skips a layer, or takes
another one of the same size, their sums mix, and the training goes on with wrong statistics.
"""

from __future__ import annotations

import os
import time
import weakref
import zlib
from collections import Counter, deque
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.torch_internals import group_of

CHECK_EVERY = 17
"""One of so many reductions of a group on the CPU carries a tag of its layer. It takes about a tenth longer. A prime
number, so that the layers of a model come in turn."""
DEBUG = os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")
"""Compare what the ranks are about to reduce before every reduction. This is slow: it is a second collective each."""
TAG_SIZE = 2


class Reduction(NamedTuple):
    """What is reduced."""

    layer: str
    direction: Literal["forward", "backward"]

    def __str__(self) -> str:
        return f"{self.layer} ({self.direction})"


class Position(NamedTuple):
    """The reduction that this process waits in."""

    reduction: Reduction | None
    """None in a compiled graph, which does not know its layer."""
    number: int
    """1 for the layer's first reduction in this direction."""
    group_name: str
    since: float
    """By ``time.monotonic()``."""

    def __str__(self) -> str:
        return f"{self.reduction or 'a layer of a compiled graph'}, call {self.number}"


now: Position | None = None
last: Position | None = None
"""The position before ``now``; the last one if the process is in none."""
watching = 0
"""The number of watchdogs. Only with one are reductions on CUDA followed to their end."""
_on_device: deque[tuple[Position, torch.cuda.Event]] = deque()
_calls: Counter[Reduction | None] = Counter()
_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()
"""By world, the number of reductions of each of its groups. They are the same on all ranks of the group."""


def begin(tensor: Tensor, group_name: str, reduction: Reduction | None) -> bool:
    """Note that this process reduces ``tensor`` from now on; whether the reduction is to carry a tag.

    With ``SYNCBN_DEBUG=1`` all ranks raise RuntimeError if they do not reduce the same.
    """
    global now
    _calls[reduction] += 1
    now = Position(reduction, _calls[reduction], group_name, time.monotonic())
    if DEBUG:
        _compare(tensor, now)
    world = dist.group.WORLD
    assert world is not None, "a group has a name only in an initialized world"
    counts = _counts.get(world)
    if counts is None:
        counts = _counts[world] = Counter()
    number = counts[group_name]
    counts[group_name] = number + 1
    # On CUDA the tag would take as long as the reduction: four more kernels to launch.
    return tensor.is_cpu and tensor.dtype == torch.float64 and number % CHECK_EVERY == 0


def end(result: Tensor) -> None:
    """Note that the host has come to the end of the reduction. On CUDA the device may not have."""
    global now, last
    if watching and result.is_cuda and not torch.cuda.is_current_stream_capturing():
        event = torch.cuda.Event()
        event.record()
        assert now is not None, "begun before"
        _on_device.append((now, event))
    last, now = now, None


def oldest() -> Position | None:
    """The first reduction that has begun and not come to its end, on the device either."""
    while _on_device and _on_device[0][1].query():
        _on_device.popleft()
    return _on_device[0][0] if _on_device else now


@lru_cache(maxsize=4096)
def tag(reduction: Reduction | None) -> Tensor:
    """What travels with the sums: (2,) float64, a hash of the layer, and 1; zeros if the layer is unknown."""
    return torch.tensor([0.0, 0.0] if reduction is None else [float(_hash(reduction)), 1.0], dtype=torch.float64)


def _hash(reduction: Reduction) -> int:
    return zlib.crc32(str(reduction).encode())


def check_each(tags: Tensor, position: Position) -> None:
    """Raise RuntimeError unless all ranks' tags (ranks, 2) are this process's."""
    if position.reduction is None:
        return
    own, names = _hash(position.reduction), {_hash(known): known for known in _calls if known is not None}
    ranks = dist.get_process_group_ranks(group_of(position.group_name))
    others = [
        f"rank {rank} at {names.get(int(value), 'a layer that this rank has not come to')}"
        for rank, (value, known) in zip(ranks, tags.tolist(), strict=True)
        if known and value != own
    ]
    if others:
        raise RuntimeError(f"{_mixed(position)}, {', '.join(others)}")


def check_sum(summed: Tensor, position: Position) -> None:
    """Raise RuntimeError unless the sum (1, 2) of the ranks' tags is that of tags like this process's."""
    ((value, known),) = summed.tolist()
    if position.reduction is not None and value != _hash(position.reduction) * known:
        raise RuntimeError(f"{_mixed(position)}, others at other layers (SYNCBN_DEBUG=1 names them)")


def _mixed(position: Position) -> str:
    remedy = "every rank has to run the same layers in the same order"
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
