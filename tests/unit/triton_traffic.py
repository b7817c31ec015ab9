"""The launches of a layer's step on CUDA, and the bytes that each must move; as a script it prints a table.

Bytes that several programs read count once, because the caches hold what is that small. The limit is what any layer
must move: forward reads x for the statistics, reads it again and writes y; backward reads x and dy for the sums, reads
both again and writes dx.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LIMIT = {"forward": 3, "backward": 5}
"""Passes over a tensor of the input's size."""
KERNELS = {
    "forward": ("group_sums_kernel", "finish_kernel", "normalize_kernel"),
    "backward": ("backward_sums_kernel", "gradients_kernel", "grad_input_kernel"),
}


class Traffic(NamedTuple):
    """Bytes of one launch."""

    read: int
    written: int


def predicted(
    shape: tuple[int, ...], dtype: torch.dtype, groups: int = 1, activation: bool = False, residual: bool = False
) -> dict[str, Traffic]:
    """By kernel, for an input (N, C, *), float32 parameters and buffers, and ``groups`` ghost groups."""
    n, c = shape[:2]
    x = math.prod(shape) * dtype.itemsize
    index, counts = (8 * n, 8 * groups) if groups > 1 else (0, 0)
    matrix, sums = 8 * groups * c, 8 * groups * (2 * c + 1)  # float64
    parameter, buffers = 4 * c, 2 * 4 * c
    candidates, counters = 2 * 8 * c, 8
    affine = 2 * matrix + 2 * parameter
    affine_backward = 2 * matrix + parameter * (2 if activation else 1)  # dz does not depend on the bias
    both = activation and residual  # then the residual's gradient is written, and stands for that of the output
    return {
        "group_sums_kernel": Traffic(x + index, sums),
        "finish_kernel": Traffic(sums + buffers + candidates + counters, 2 * matrix + candidates + buffers + counters),
        "normalize_kernel": Traffic(x * (1 + residual) + affine + index, x),
        "backward_sums_kernel": Traffic(x * (2 + both) + affine_backward + index, 2 * matrix + x * both),
        "gradients_kernel": Traffic(2 * matrix + parameter + counts, 2 * matrix + 2 * parameter),
        "grad_input_kernel": Traffic(2 * x + affine_backward + 2 * matrix + index, x),
    }


def passes(traffic: dict[str, Traffic], direction: str, x_bytes: int) -> float:
    """All bytes of a direction as passes over a tensor of ``x_bytes``."""
    return sum(sum(traffic[kernel]) for kernel in KERNELS[direction]) / x_bytes


def main() -> None:
    print("| input | groups | epilogue | MB forward | MB backward | passes forward | passes backward |")
    print("|---|---|---|---|---|---|---|")
    for shape, dtype, groups, fused in (
        ((8, 64, 112, 112), torch.float32, 1, False),
        ((8, 64, 112, 112), torch.bfloat16, 1, False),
        ((8, 2048, 7, 7), torch.float32, 1, False),
        ((8, 256, 56, 56), torch.bfloat16, 1, True),
        ((64, 256, 56, 56), torch.bfloat16, 32, False),
        ((64, 2048, 7, 7), torch.bfloat16, 32, False),
    ):
        traffic, x = predicted(shape, dtype, groups, fused, fused), math.prod(shape) * dtype.itemsize
        counts = [passes(traffic, direction, x) for direction in LIMIT]
        label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        columns = [label, str(groups), "add, ReLU" if fused else "none"]
        columns += [f"{count * x / 1e6:.1f}" for count in counts] + [f"{count:.2f}" for count in counts]
        print("|", " | ".join(columns), "|")


if __name__ == "__main__":
    main()
