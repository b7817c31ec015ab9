"""What is measured on: the inputs of the normalization layers of real networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

# (channels, stride of the feature map, layers of that shape), torchvision's ResNet-50 (stride in the 3x3 convolution).
_RESNET50 = (
    (64, 2, 1),
    (64, 4, 6),
    (256, 4, 4),
    (128, 4, 1),
    (128, 8, 7),
    (512, 8, 5),
    (256, 8, 1),
    (256, 16, 11),
    (1024, 16, 7),
    (512, 16, 1),
    (512, 32, 5),
    (2048, 32, 4),
)
# (channels, edge of the cubic feature map, layers): two convolutions a level on the way down and up, patches of 64.
_UNET3D = ((32, 64, 4), (64, 32, 4), (128, 16, 4), (256, 8, 4), (320, 4, 2))
_MLP = ((128, 512), (1024, 1024), (4096, 256))

DETECTOR_PIXELS = (800, 1216)
"""The shorter side of 800 that detectors are trained with, padded to multiples of 32."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Shape:
    """The input of a layer, on one process."""

    family: str
    size: tuple[int, ...]
    """(N, C, *)."""
    layers: int = 1
    """Layers of this shape in the network."""
    channels_last: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    @property
    def label(self) -> str:
        n, c, *spatial = self.size
        layout = " channels_last" if self.channels_last else ""
        return f"{self.family} N={n} {'x'.join(map(str, (c, *spatial)))}{layout}"

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in this shape's memory format."""
        if not self.channels_last:
            return x.contiguous()
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def resnet50(n: int) -> list[Shape]:
    """The 12 distinct inputs of ResNet-50's 53 BatchNorm layers at 224 pixels."""
    return [Shape("resnet50", (n, c, 224 // stride, 224 // stride), layers) for c, stride, layers in _RESNET50]


def detector(n: int = 2) -> list[Shape]:
    """The same layers as a detector's backbone."""
    height, width = DETECTOR_PIXELS
    return [Shape("detector", (n, c, height // stride, width // stride), layers) for c, stride, layers in _RESNET50]


def unet3d(n: int = 2) -> list[Shape]:
    return [Shape("unet3d", (n, c, edge, edge, edge), layers) for c, edge, layers in _UNET3D]


def mlp() -> list[Shape]:
    return [Shape("mlp", size) for size in _MLP]


def tiny() -> list[Shape]:
    """Of no network: for a quick look at whether everything runs."""
    return [Shape("tiny", (32, 8, 6, 6)), Shape("tiny", (64, 8))]


FAMILIES = ("resnet50", "detector", "unet3d", "mlp", "tiny")
DEFAULT_FAMILIES = ("resnet50", "detector", "unet3d", "mlp")


def both_formats(shapes: Iterable[Shape]) -> list[Shape]:
    """Each shape in the default and, where it has one, the channels-last format."""
    return [
        replace(shape, channels_last=last)
        for shape in shapes
        for last in (False, True)
        if not last or len(shape.size) > 2
    ]


def layer_shapes(families: Sequence[str], batches: Sequence[int], most_elements: int | None) -> list[Shape]:
    """Layers of the families in both formats.

    Args:
        families: of :data:`FAMILIES`.
        batches: samples a process for ResNet-50; the other families have one number each.
        most_elements: larger inputs are left out; None is no limit.
    """
    found: list[Shape] = []
    if "resnet50" in families:
        found += [shape for n in batches for shape in resnet50(n)]
    for family, shapes in (("detector", detector), ("unet3d", unet3d), ("mlp", mlp), ("tiny", tiny)):
        if family in families:
            found += shapes()
    return both_formats(shape for shape in found if most_elements is None or shape.elements <= most_elements)


def ghost_shapes(families: Sequence[str], groups: int, most_elements: int | None) -> list[Shape]:
    """Inputs whose batch is cut into ``groups`` ghost batches: ResNet-50's of one and two samples each, an MLP's."""
    found: list[Shape] = []
    if "resnet50" in families:
        found += [shape for n in (groups, 2 * groups) for shape in resnet50(n)]
    for family, shapes in (("mlp", mlp), ("tiny", tiny)):
        if family in families:
            found += [shape for shape in shapes() if shape.size[0] % groups == 0]
    return both_formats(shape for shape in found if most_elements is None or shape.elements <= most_elements)


def residual_shapes(families: Sequence[str], batches: Sequence[int], most_elements: int | None) -> list[Shape]:
    """Inputs of the layers before which a residual block adds: the last of each block."""
    last = {(256, 4), (512, 8), (1024, 16), (2048, 32)}
    blocks = {(c, 224 // stride) for c, stride in last}
    found = layer_shapes([f for f in families if f in ("resnet50", "tiny")], batches, most_elements)
    return [shape for shape in found if shape.family == "tiny" or shape.size[1:3] in blocks]


def large_shapes(families: Sequence[str], dtype: torch.dtype, least_bytes: int = 100_000_000) -> list[Shape]:
    """Inputs of at least ``least_bytes``, where neither a launch nor a cache matters."""
    found = layer_shapes([f for f in families if f in ("resnet50", "detector")], (32, 64), None)
    return [shape for shape in found if shape.elements * dtype.itemsize >= least_bytes]
