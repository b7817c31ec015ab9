"""The cost of an all-reduce over given links: Hockney's model, and its fit to measurements.

A message of n bytes takes alpha + n / bandwidth (Hockney 1994, "The communication challenge for MPP", Parallel
Computing 20(3)); an all-reduce is a number of rounds of messages, one after another:

    t = base + rounds(ranks) * alpha + carried(ranks, n) / bandwidth

``base`` is what a call costs on any number of ranks. With W ranks, and n bytes to sum:

| algorithm | rounds | bytes that a link carries | |
|---|---|---|---|
| ring | 2 (W - 1) | 2 n (W - 1) / W | reduce-scatter, then all-gather, of a W-th at a time |
| recursive_doubling | log2 W; else floor(log2 W) + 2 | n * rounds | pairs at distance 1, 2, 4, ... exchange all of it |
| tree | 2 ceil(log2 W) | 2 n | a sum up a binary tree and its result down, piece after piece |
| chain | 2 (W - 1) | 2 n | the same along a line |
| exchange | W - 1 | n (W - 1) | all numbers travel round the ring, and each rank adds them up itself |

The first two and the last one's all-gather are as in Thakur, Rabenseifner and Gropp 2005, "Optimization of collective
communication operations in MPICH" (Int. J. High Performance Computing Applications 19(1)); their cost of the additions,
a few microseconds for some thousand numbers, is in ``base`` and ``bandwidth`` here. Between nodes and within them the
terms add up: a sum within each node, one between the nodes, and its way back, which is how NCCL's own model prices its
trees (``src/graph/tuning.cc``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import torch

Algorithm = Literal["ring", "recursive_doubling", "tree", "chain", "exchange"]


@dataclass(frozen=True)
class Link:
    """What connects the ranks, within a node and between nodes."""

    name: str
    base: float
    """Microseconds of any all-reduce."""
    alpha_node: float
    """Microseconds of a round of messages within a node."""
    alpha_between: float
    """Microseconds of a round of messages between nodes."""
    bandwidth_node: float
    """GB/s at which small messages are carried within a node."""
    bandwidth_between: float
    """GB/s between nodes."""
    ranks_per_node: int
    within: Algorithm
    between: Algorithm
    source: str
    """Which of these numbers are whose."""

    def __post_init__(self) -> None:
        for name in ("base", "alpha_node", "alpha_between"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} of a link must be a number of microseconds, got {getattr(self, name)!r}")
        for name in ("bandwidth_node", "bandwidth_between"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of a link must be a positive number of GB/s, got {getattr(self, name)!r}")
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node of a link must be at least 1, got {self.ranks_per_node!r}")
        for name in ("within", "between"):
            if getattr(self, name) not in get_args(Algorithm):
                known = ", ".join(get_args(Algorithm))
                raise ValueError(f"{name} of a link must be one of {known}, got {getattr(self, name)!r}")


_TUNING = "NCCL 2.28's own estimate for its low-latency protocol in a tree (src/graph/tuning.cc)"
_NVLINK = Link(
    name="nvlink",
    base=6.8,
    alpha_node=0.6,
    alpha_between=5.0,
    bandwidth_node=40.0,
    bandwidth_between=25.0,
    ranks_per_node=8,
    within="chain",
    between="tree",
    source=f"base and alphas: {_TUNING}, NVLink and InfiniBand; bandwidths: assumed, to have the slope between 128 and "
    "1024 bytes of the estimates that NCCL printed for 16 H100 on two nodes (25.21 and 25.33 us, NVIDIA/nccl#1453)",
)
LINKS = {
    link.name: link
    for link in (
        _NVLINK,
        replace(
            _NVLINK,
            name="pcie",
            alpha_node=1.0,
            bandwidth_node=5.0,
            source=f"base and alphas: {_TUNING}, PCIe and InfiniBand; bandwidths: assumed",
        ),
        replace(
            _NVLINK,
            name="ethernet",
            alpha_between=25.0,
            bandwidth_between=2.5,
            source=f"base and alpha within a node: {_TUNING}, NVLink; between nodes assumed: TCP, 25 us a message, "
            "25 Gbit/s",
        ),
    )
}
"""Nodes of 8 GPUs, by name."""


def parse_link(text: str) -> Link:
    """A link by its name, with other numbers where given: ``"nvlink"``, ``"nvlink:alpha_between=8,base=7"``.

    Raises:
        ValueError: no such name or field, or a value that cannot be.
    """
    name, _, changes = text.partition(":")
    if name not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}, or such a name with :field=value,..., got {text!r}")
    kinds = {field.name: field.type for field in fields(Link) if field.name not in ("name", "source")}
    values: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in kinds:
            raise ValueError(f"a link has no {key!r}; it has {', '.join(kinds)}")
        try:
            values[key] = {"float": float, "int": int}.get(str(kinds[key]), str)(value)
        except ValueError:
            raise ValueError(f"{key} of a link must be a number, got {value!r}") from None
    if not values:
        return LINKS[name]
    return replace(LINKS[name], name=text, source=f"{LINKS[name].source}; given by the user: {changes}", **values)


def message_rounds(algorithm: Algorithm, ranks: int) -> int:
    """Rounds of messages that follow one another in an all-reduce over ``ranks``; 0 for one."""
    if ranks < 2:
        return 0
    if algorithm in ("ring", "chain"):
        return 2 * (ranks - 1)
    if algorithm == "exchange":
        return ranks - 1
    if algorithm == "tree":
        return 2 * (ranks - 1).bit_length()
    whole = ranks.bit_length() - 1
    # Ranks beyond a power of two hand their numbers to a partner first, and get the result from it last.
    return whole if ranks == 2**whole else whole + 2


def carried_bytes(algorithm: Algorithm, ranks: int, num_bytes: float) -> float:
    """Bytes that the busiest link carries one after another in an all-reduce of ``num_bytes``."""
    if ranks < 2:
        return 0.0
    if algorithm == "ring":
        return 2 * num_bytes * (ranks - 1) / ranks
    if algorithm in ("tree", "chain"):
        return 2 * num_bytes
    return num_bytes * message_rounds(algorithm, ranks)


class GroupShape(NamedTuple):
    """How the ranks that share statistics lie on the nodes."""

    within: int
    """Most ranks on one node."""
    nodes: int


def group_shapes(world_size: int, sync_group_size: int | None, ranks_per_node: int) -> set[GroupShape]:
    """The shapes of all groups of ``sync_group_size`` consecutive ranks (None: one group of all).

    Ranks fill one node after another. A group size that exceeds the world is the world; groups that it does not divide
    are counted as they would begin, the last one smaller.
    """
    size = min(sync_group_size or world_size, world_size)
    shapes = set()
    for first in range(0, world_size, size):
        last = min(first + size, world_size) - 1
        nodes = range(first // ranks_per_node, last // ranks_per_node + 1)
        within = [min(last + 1, (node + 1) * ranks_per_node) - max(first, node * ranks_per_node) for node in nodes]
        shapes.add(GroupShape(max(within), len(nodes)))
    return shapes


def all_reduce_time(link: Link, num_bytes: float, shape: GroupShape) -> float:
    """Microseconds of an all-reduce of ``num_bytes`` over a group of ``shape``; 0 for a single rank."""
    within, nodes = shape
    if within * nodes < 2:
        return 0.0
    latency = message_rounds(link.within, within) * link.alpha_node
    latency += message_rounds(link.between, nodes) * link.alpha_between
    transfer = carried_bytes(link.within, within, num_bytes) / link.bandwidth_node
    transfer += carried_bytes(link.between, nodes, num_bytes) / link.bandwidth_between
    return link.base + latency + transfer / 1e3  # a GB/s is 1e3 bytes a microsecond


def network_time(link: Link, sizes: Sequence[int], world_size: int, sync_group_size: int | None = None) -> float:
    """Microseconds of all-reduces of ``sizes`` bytes, one after another, in the slowest of the world's groups."""
    shapes = group_shapes(world_size, sync_group_size, link.ranks_per_node)
    return max(sum(all_reduce_time(link, size, shape) for size in sizes) for shape in shapes)


# ---- the fit


class Measured(NamedTuple):
    """An all-reduce that was timed."""

    world_size: int
    num_bytes: int
    microseconds: float


@dataclass(frozen=True)
class Fit:
    """What one algorithm's model makes of measured all-reduces, all within one node."""

    algorithm: Algorithm
    base: float
    """Microseconds."""
    alpha: float
    """Microseconds a round."""
    wait: float
    """Microseconds more a round for each process that a core has beyond the first: 2 cores and 4 processes are 1."""
    bandwidth: float
    """GB/s; infinite where the sizes measured made no difference."""
    rms: float
    """Root mean square of the residuals, each relative to its measurement."""
    worst: float
    """The largest of them, in size."""
    points: int
    cores: int

    def link(self, ranks: int) -> Link:
        """The fit as a link of one node of ``ranks`` processes on the cores that it was measured on."""
        return Link(
            name=f"fitted ({self.algorithm})",
            base=self.base,
            alpha_node=self.alpha + self.wait * _beyond(ranks, self.cores),
            alpha_between=0.0,
            bandwidth_node=self.bandwidth,
            bandwidth_between=math.inf,
            ranks_per_node=ranks,
            within=self.algorithm,
            between="tree",
            source=f"fitted to {self.points} measurements",
        )

    def json(self) -> dict[str, Any]:
        """Plain data; an infinite bandwidth, for which JSON has no word, is None."""
        return {**asdict(self), "bandwidth": self.bandwidth if math.isfinite(self.bandwidth) else None}


def fit_all(measured: Sequence[Measured], cores: int) -> list[Fit]:
    """Each flat algorithm's fit, the closest first."""
    flat: tuple[Algorithm, ...] = ("ring", "recursive_doubling", "exchange")
    return sorted((fit(measured, algorithm, cores) for algorithm in flat), key=lambda found: found.rms)


def fit(measured: Sequence[Measured], algorithm: Algorithm, cores: int) -> Fit:
    """Least squares of the relative residuals over base, alpha, wait and 1 / bandwidth, none of them negative.

    Relative, as a hundred microseconds too much matter at two ranks and not at a millisecond. Any set of the unknowns
    may be zero: each is solved, and the closest one without a negative value is the minimum; a further unknown has to
    pay for itself.
    """
    if not measured:
        raise ValueError("a fit needs measurements, got none")
    times = torch.tensor([m.microseconds for m in measured], dtype=torch.float64)
    relative = torch.tensor([_terms(m, algorithm, cores) for m in measured], dtype=torch.float64) / times[:, None]
    # Columns of one length: microseconds and bytes differ by orders of magnitude.
    scale = relative.norm(dim=0).clamp(min=1e-300)
    unknowns = relative.shape[1]
    best, least = torch.zeros(unknowns, dtype=torch.float64), math.inf
    for number in range(1, unknowns + 1):
        for columns in map(list, combinations(range(unknowns), number)):
            solved = torch.linalg.lstsq(relative[:, columns] / scale[columns], torch.ones(len(times), 1).double())
            values = torch.zeros(unknowns, dtype=torch.float64)
            values[columns] = solved.solution[:, 0] / scale[columns]
            error = float((relative @ values - 1).square().sum())
            if (values >= 0).all() and error < 0.999 * least:
                best, least = values, error
    residuals = relative @ best - 1
    base, alpha, wait, per_kilobyte = best.tolist()
    return Fit(
        algorithm=algorithm,
        base=base,
        alpha=alpha,
        wait=wait,
        bandwidth=1 / per_kilobyte if per_kilobyte > 0 else math.inf,
        rms=float(residuals.square().mean().sqrt()),
        worst=float(residuals.abs().max()),
        points=len(measured),
        cores=cores,
    )


def _terms(m: Measured, algorithm: Algorithm, cores: int) -> tuple[float, float, float, float]:
    """What base, alpha, wait and 1 / bandwidth are multiplied by in the time of an all-reduce."""
    rounds = message_rounds(algorithm, m.world_size)
    kilobytes = carried_bytes(algorithm, m.world_size, m.num_bytes) / 1e3
    return 1.0, rounds, rounds * _beyond(m.world_size, cores), kilobytes


def _beyond(ranks: int, cores: int) -> float:
    return max(0.0, ranks / cores - 1)
