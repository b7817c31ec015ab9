"""The machine's limit: what a copy takes, and so what a layer must take at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from syncbn.bench.shapes import Shape
from syncbn.bench.timing import Spread, interleaved, spread

FORWARD_PASSES = 3
"""x is read for the statistics, read again and written as y."""
BACKWARD_PASSES = 5
"""x and dy are read for the sums, read again, and dx is written."""

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Of the tensor that is copied: several times any cache."""


@dataclass(frozen=True)
class Bandwidth:
    bytes_per_second: Spread
    """Read and written together, of ``out.copy_(x)``."""
    tensor_bytes: int

    def seconds(self, shape: Shape, dtype: torch.dtype, passes: int = FORWARD_PASSES + BACKWARD_PASSES) -> float:
        """The least time of a step over main memory. A tensor that fits a cache may take less."""
        return passes * shape.elements * dtype.itemsize / self.bytes_per_second.median


def measure_bandwidth(device: torch.device, *, rounds: int = 9, tensor_bytes: int | None = None) -> Bandwidth:
    """The bandwidth of a copy between two tensors well beyond the caches, on one thread on the CPU as the layers are.

    Args:
        device: where.
        rounds: samples.
        tensor_bytes: of each of the two tensors.
    """
    size = tensor_bytes or COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds=rounds, device=device)["copy"]
    return Bandwidth(spread(2 * size / seconds for seconds in timing.samples), size)
