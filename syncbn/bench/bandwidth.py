"""The machine's copy bandwidth, which gives the least time that a layer can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from syncbn.bench.shapes import Shape
from syncbn.bench.timing import Spread, interleaved, spread

PASSES = 8
"""Forward reads x for the statistics, reads it again and writes y. Backward reads x and dy for the sums, reads both
again and writes dx."""

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Size of the copied tensor: several times any cache."""


@dataclass(frozen=True)
class Bandwidth:
    bytes_per_second: Spread  # bytes read plus bytes written of ``out.copy_(x)``
    tensor_bytes: int

    def seconds(self, shape: Shape, dtype: torch.dtype) -> float:
        """The memory limit of a step: its least time if all data is in main memory. Cached data can be faster."""
        return PASSES * shape.elements * dtype.itemsize / self.bytes_per_second.median


def measure_bandwidth(device: torch.device, *, rounds: int = 9, tensor_bytes: int | None = None) -> Bandwidth:
    """Time a copy between two tensors, each of ``tensor_bytes`` (default: :data:`COPY_BYTES`)."""
    size = tensor_bytes or COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds=rounds, device=device)["copy"]
    return Bandwidth(spread(2 * size / seconds for seconds in timing.samples), size)
