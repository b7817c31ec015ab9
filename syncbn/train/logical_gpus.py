"""Logical GPUs: which samples of a global batch a process holds, and which samples share statistics.

An experiment names R logical GPUs of b samples each. W processes execute it, W dividing R, and each process hosts R/W
consecutive logical GPUs. Sample j of a global batch belongs to logical GPU j // b, so a smaller last batch fills the
first GPUs and leaves the last ones empty, for every W alike. Samples that share statistics form a *row*. Rows are
numbered over all logical GPUs, and each process works on the rows that it has samples in.
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
    """Rank of this process and number of processes."""

    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Partition:
    """How a global batch is divided into the processes' shares and into rows."""

    gpus: int
    per_gpu_batch_size: int
    sync_group_size: int  # logical GPUs that share statistics; 1 for a local layer
    ghost_batch_size: int  # samples of one GPU that share statistics
    placement: Placement

    @classmethod
    def of(cls, config: RunConfig, placement: Placement) -> Partition:
        """The partition for a configuration; the processes have to divide the GPUs."""
        config.check_processes(placement.processes)
        return cls(
            gpus=config.gpus,
            per_gpu_batch_size=config.per_gpu_batch_size,
            sync_group_size=(config.sync_group_size or config.gpus) if config.norm.synchronized else 1,
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
        """The processes that share rows with this one, including itself."""
        rank, processes = self.placement.rank, self.placement.processes
        if self.hosted % self.sync_group_size == 0:
            return (rank,)
        if self.sync_group_size % self.hosted == 0:
            together = self.sync_group_size // self.hosted
            first = rank // together * together
            return tuple(range(first, first + together))
        # A sync group may begin or end within a process: all processes share one table of rows.
        return tuple(range(processes))

    @cached_property
    def row_range(self) -> range:
        """The rows of all processes in :attr:`ranks`."""
        first_gpu, last_gpu = self.ranks[0] * self.hosted, (self.ranks[-1] + 1) * self.hosted
        first, last = first_gpu // self.sync_group_size, -(-last_gpu // self.sync_group_size)
        return range(first * self.rows_per_sync_group, last * self.rows_per_sync_group)

    def local_range(self, samples: int) -> range:
        """This process's positions in a global batch of ``samples``."""
        share = self.hosted * self.per_gpu_batch_size
        return range(min(self.placement.rank * share, samples), min((self.placement.rank + 1) * share, samples))

    def local_sizes(self, samples: int) -> list[int]:
        """The samples of each of this process's logical GPUs that has any, in a global batch of ``samples``."""
        here, size = len(self.local_range(samples)), self.per_gpu_batch_size
        return [min(size, here - start) for start in range(0, here, size)]

    def rows(self, positions: range) -> Tensor:
        """The row of each position in a global batch: int64 (len(positions),)."""
        position = torch.arange(positions.start, positions.stop)
        gpu, within = position // self.per_gpu_batch_size, position % self.per_gpu_batch_size
        return gpu // self.sync_group_size * self.rows_per_sync_group + within // self.ghost_batch_size

    def groups(self, samples: int, device: torch.device) -> SampleGroups:
        """How this process's layers group their samples of a global batch of ``samples`` (at least 1)."""
        return _groups(self, samples, device)


@lru_cache(maxsize=64)
def _groups(partition: Partition, samples: int, device: torch.device) -> SampleGroups:
    assert samples > 0, "a step has samples"
    rows = partition.row_range
    local = partition.rows(partition.local_range(samples)) - rows.start
    sizes = partition.rows(range(samples)).bincount()  # over all processes
    filled = sizes[sizes > 0]
    return SampleGroups(
        index=local.to(device) if len(rows) > 1 else None,
        number=len(rows),
        # Running statistics are the mean over all filled rows of all processes: each process adds up its rows and
        # divides by the average number of rows per process, and the processes' mean is taken.
        divisor=len(filled) * len(partition.ranks) / partition.placement.processes,
        smallest=int(filled.min()),
    )
