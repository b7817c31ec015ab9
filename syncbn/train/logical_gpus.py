"""Logical GPUs: what a process holds of a global batch, and which of its samples share statistics with whose.

An experiment names R logical GPUs of b samples each; W processes, W dividing R, execute it, each hosting R/W
consecutive ones. Sample j of a global batch belongs to logical GPU j // b, so a smaller last batch fills the first GPUs
and leaves the last ones empty, for every W alike. Statistics are kept in *rows*, one for each set of samples that share
them; the rows are numbered over all logical GPUs, and each process is given those it takes part in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from syncbn.layers import SampleGroups
from syncbn.train.config import RunConfig


@dataclass(frozen=True)
class Placement:
    """Which process of how many this is."""

    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Layout:
    """How the samples of a global batch lie on the processes, and in which rows their statistics are."""

    gpus: int
    per_gpu_batch_size: int
    sync_group_size: int
    """Logical GPUs that share statistics; 1 for a local layer."""
    ghost_batch_size: int
    """Samples of one GPU that share statistics."""
    placement: Placement

    @classmethod
    def of(cls, config: RunConfig, placement: Placement) -> Layout:
        """The layout that a configuration asks for. Raises ConfigError if the processes do not divide the GPUs."""
        config.check_processes(placement.processes)
        synchronized = config.norm.synchronized
        return cls(
            gpus=config.gpus,
            per_gpu_batch_size=config.per_gpu_batch_size,
            sync_group_size=(config.sync_group_size or config.gpus) if synchronized else 1,
            ghost_batch_size=config.norm.ghost_batch_size or config.per_gpu_batch_size,
            placement=placement,
        )

    @property
    def hosted(self) -> int:
        """Logical GPUs on each process."""
        return self.gpus // self.placement.processes

    @property
    def rows_per_sync_group(self) -> int:
        return self.per_gpu_batch_size // self.ghost_batch_size

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Processes that this one shares rows with, itself included."""
        rank, processes = self.placement.rank, self.placement.processes
        if self.hosted % self.sync_group_size == 0:
            return (rank,)
        if self.sync_group_size % self.hosted == 0:
            together = self.sync_group_size // self.hosted
            first = rank // together * together
            return tuple(range(first, first + together))
        # Sync groups that begin and end within processes: all share one table, in which most rows have few writers.
        return tuple(range(processes))

    @cached_property
    def row_range(self) -> range:
        """The rows that the processes of :attr:`ranks` hold between them."""
        first_gpu, last_gpu = self.ranks[0] * self.hosted, (self.ranks[-1] + 1) * self.hosted
        first, last = first_gpu // self.sync_group_size, -(-last_gpu // self.sync_group_size)
        return range(first * self.rows_per_sync_group, last * self.rows_per_sync_group)

    def local_range(self, samples: int) -> range:
        """Positions, in a global batch of ``samples``, of those that this process holds."""
        share = self.hosted * self.per_gpu_batch_size
        return range(min(self.placement.rank * share, samples), min((self.placement.rank + 1) * share, samples))

    def rows(self, positions: range) -> Tensor:
        """The row of each position in a global batch: int64 (len(positions),)."""
        position = torch.arange(positions.start, positions.stop)
        gpu, within = position // self.per_gpu_batch_size, position % self.per_gpu_batch_size
        return gpu // self.sync_group_size * self.rows_per_sync_group + within // self.ghost_batch_size

    def groups(self, samples: int, device: torch.device) -> SampleGroups:
        """What a layer on this process is told about a global batch of ``samples`` (at least 1).

        The running statistics are means over all filled rows of all processes. Each process adds up its rows and
        divides by the average number of rows a process, so the mean over processes is that mean, whatever their number.
        """
        return _groups(self, samples, device)


@lru_cache(maxsize=64)
def _groups(layout: Layout, samples: int, device: torch.device) -> SampleGroups:
    assert samples > 0, "a step has samples"
    rows, local = layout.row_range, layout.rows(layout.local_range(samples)) - layout.row_range.start
    sizes = layout.rows(range(samples)).bincount()  # over all processes
    filled = sizes[sizes > 0]
    return SampleGroups(
        index=local.to(device) if len(rows) > 1 else None,
        number=len(rows),
        divisor=len(filled) * len(layout.ranks) / layout.placement.processes,
        smallest=int(filled.min()),
    )
