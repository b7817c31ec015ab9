"""What synchronized statistics cost on up to 1,024 GPUs, by a model of an all-reduce. Nothing here is measured.

A network of L layers makes 2 L all-reduces per step, of 2C+1 float64 numbers in forward and 2C in backward. Each is
waited for, because the next layer needs its result. The time of a message of n bytes is alpha + n / bandwidth (Hockney
1994, "The communication challenge for MPP", Parallel Computing 20(3)). An all-reduce sums along a chain within each
node, up a binary tree between the nodes, and returns the result the same way. NCCL's own cost model prices its trees
like this (``src/graph/tuning.cc``):

    t = base + 2 (ranks per node - 1) alpha_node + 2 ceil(log2 nodes) alpha_between
             + 2 n / bandwidth_node (if there are several ranks per node) + 2 n / bandwidth_between (if several nodes)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from syncbn.bench.problem import resnet50_layers

RESNET50_CHANNELS = tuple(channels for channels, _ in resnet50_layers())
WORLD_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RANKS_PER_NODE = 8
SYNC_GROUP_SIZE = 8
SMALL_BYTES = 4096  # up to this size an all-reduce's time hardly depends on its size


class Link(NamedTuple):
    """What connects GPUs. Latencies are in microseconds, bandwidths in GB/s for small messages."""

    name: str
    base: float  # of any all-reduce
    alpha_node: float  # of a message within a node
    alpha_between: float  # of a message between nodes
    bandwidth_node: float
    bandwidth_between: float
    source: str


_TUNING = "NCCL 2.28's constants for its low-latency protocol in a tree"
LINKS = (
    # These bandwidths give the slope between 128 and 1024 bytes of the estimates that NCCL printed for 16 H100 on two
    # nodes: 25.21 and 25.33 us (NVIDIA/nccl#1453).
    Link("nvlink", 6.8, 0.6, 5.0, 40.0, 25.0, f"{_TUNING}, NVLink and InfiniBand; bandwidths assumed"),
    Link("pcie", 6.8, 1.0, 5.0, 5.0, 25.0, f"{_TUNING}, PCIe and InfiniBand; bandwidths assumed"),
    Link("ethernet", 6.8, 0.6, 25.0, 40.0, 2.5, f"{_TUNING}, NVLink; assumed 25 us, 25 Gbit/s between nodes"),
)


class GrowthRow(NamedTuple):
    """The modelled cost on one number of GPUs."""

    link: str
    ranks: int
    nodes: int
    small_us: float  # one all-reduce of 4 KB over all ranks
    step_ms: float  # all all-reduces of a ResNet-50 step over all ranks, one after another
    group_step_ms: float  # the same with ``sync_group_size=8``: over 8 consecutive ranks


def collective_bytes(channels: Sequence[int]) -> list[int]:
    """Bytes of each all-reduce of a step, for layers with these channels.

    >>> collective_bytes([64])
    [1032, 1024]
    """
    return [8 * (2 * c + 1) for c in channels] + [8 * 2 * c for c in reversed(channels)]


def all_reduce_us(link: Link, num_bytes: int, ranks: int) -> float:
    """Microseconds of an all-reduce of ``num_bytes`` over consecutive ranks that fill one node after another.

    >>> round(all_reduce_us(LINKS[0], 4000, ranks=8), 3)  # 6.8 + 2 * 7 * 0.6 + 8000 / 40e3
    15.4
    """
    within, nodes = min(ranks, RANKS_PER_NODE), -(-ranks // RANKS_PER_NODE)
    if ranks < 2:
        return 0.0
    latency = 2 * (within - 1) * link.alpha_node + 2 * (nodes - 1).bit_length() * link.alpha_between
    per_byte = 1 / link.bandwidth_node + (1 / link.bandwidth_between if nodes > 1 else 0.0)
    return link.base + latency + 2 * num_bytes * per_byte / 1e3  # a GB/s is 1e3 bytes per microsecond


def step_ms(link: Link, ranks: int, channels: Sequence[int] = RESNET50_CHANNELS) -> float:
    """Milliseconds of all all-reduces of a step over so many ranks, for layers with these channels."""
    return sum(all_reduce_us(link, size, ranks) for size in collective_bytes(channels)) / 1e3


def growth_rows() -> list[GrowthRow]:
    """The table, for each of :data:`LINKS` and :data:`WORLD_SIZES`."""
    return [
        GrowthRow(
            link.name,
            ranks,
            -(-ranks // RANKS_PER_NODE),
            all_reduce_us(link, SMALL_BYTES, ranks),
            step_ms(link, ranks),
            step_ms(link, min(ranks, SYNC_GROUP_SIZE)),
        )
        for link in LINKS
        for ranks in WORLD_SIZES
    ]


def growth_lines(rows: Sequence[GrowthRow]) -> list[str]:
    """The table as text."""
    if not rows:
        return []
    text = [
        f"Modelled cost of synchronization: {2 * len(RESNET50_CHANNELS)} all-reduces per ResNet-50 step, in ms",
        f"(nodes of {RANKS_PER_NODE} GPUs; nothing overlaps; the network is idle otherwise; all ranks arrive together)",
    ]
    for link in LINKS:
        text += ["", f"{link.name}: {link.source}"]
        text.append(f"{'GPUs':>6} {'nodes':>6} {'all GPUs':>9} {'groups of 8':>12} {'4 KB, us':>9}")
        text += [
            f"{row.ranks:>6} {row.nodes:>6} {row.step_ms:>9.2f} {row.group_step_ms:>12.2f} {row.small_us:>9.1f}"
            for row in rows
            if row.link == link.name
        ]
    return text
