"""Which samples, in which order: functions of labels and integers, the same on every process."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed that is a function of ``parts``, unrelated between neighbouring values.

    Python's ``hash`` is salted per process, and ``seed + epoch`` would make run 0's second epoch run 1's first.
    """
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def epoch_order(labels: Tensor, class_skew: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples: int64 [n], a permutation that is a function of the arguments.

    With ``class_skew`` k > 1 samples arrive in runs of k of one class, like the non-i.i.d. minibatches of Ioffe 2017
    (arXiv 1702.03275, section 4.3): each class is shuffled and cut into runs of k, and the runs are shuffled. The rest
    of each class is a shorter run. Shorter runs come last, so a full run starts at a multiple of k. Labels are int64
    [n], classes from 0.
    """
    if class_skew < 1:
        raise ValueError(f"class_skew: got {class_skew}, expected an integer of at least 1")
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    shuffled = torch.randperm(len(labels), generator=generator)
    if class_skew == 1 or len(labels) == 0:
        return shuffled
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # one class after the other, each in random order
    sizes = labels.bincount()
    in_full_run = position_in_class(labels[by_class]) < (sizes - sizes % class_skew)[labels[by_class]]
    full_runs = by_class[in_full_run].view(-1, class_skew)
    short_runs = by_class[~in_full_run].split((sizes % class_skew).tolist())
    return torch.cat(
        [full_runs[torch.randperm(len(full_runs), generator=generator)].flatten()]
        + [short_runs[i] for i in torch.randperm(len(short_runs), generator=generator).tolist()]
    )


def order_of(samples: int, labels: Tensor | None, class_skew: int, seed: int, epoch: int) -> list[int]:
    """:func:`epoch_order` as a list, also of ``samples`` that have no labels."""
    known = torch.zeros(samples, dtype=torch.int64) if labels is None else labels
    return epoch_order(known, class_skew, seed, epoch).tolist()


def position_in_class(labels: Tensor) -> Tensor:
    """For each sample, the number of samples of its class before it: int64 [n] of int64 [n]."""
    by_class = labels.argsort(stable=True)
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    positions = torch.empty_like(labels)
    positions[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return positions


def holdout_split(labels: Tensor, every: int = 5) -> tuple[Tensor, Tensor]:
    """(train, test) indices: each class's every ``every``-th sample is a test sample."""
    held_out = position_in_class(labels) % every == every - 1
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def fraction_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """(kept, held out) indices: ``fraction`` of each class is held out, spread evenly over it, to within one sample."""
    position = position_in_class(labels)
    held_out = ((position + 1) * fraction).floor() > (position * fraction).floor()
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def spread_subset(labels: Tensor, samples: int) -> Tensor:
    """Sorted indices of ``samples`` of the set, spread evenly over it; each class keeps its share to within one."""
    by_class = labels.argsort(stable=True)
    return by_class[torch.arange(samples) * len(labels) // max(samples, 1)].sort().values
