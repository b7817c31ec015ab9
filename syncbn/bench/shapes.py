"""The inputs that are measured: those of the normalization layers of real networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

# (channels, stride of the feature map, layers of that shape) of torchvision's ResNet-50, which strides in the 3x3
# convolution.
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
# (channels, edge of the cubic feature map, layers): two convolutions at each level, down and up, on patches of 64.
_UNET3D = ((32, 64, 4), (64, 32, 4), (128, 16, 4), (256, 8, 4), (320, 4, 2))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Shape:
    """The input of a layer on one process."""

    family: str
    size: tuple[int, ...]  # (N, C, *)
    layers: int = 1  # number of layers with this input in the network
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
    """The 12 distinct inputs of the 53 BatchNorm layers of ResNet-50 at 224 pixels."""
    return [Shape("resnet50", (n, c, 224 // stride, 224 // stride), layers) for c, stride, layers in _RESNET50]


def ends_block(shape: Shape) -> bool:
    """Whether the layer is the last of a residual block, whose output is added to the shortcut. Any tiny shape is."""
    last = {(256, 4), (512, 8), (1024, 16), (2048, 32)}
    return shape.family == "tiny" or shape.size[1:3] in {(c, 224 // stride) for c, stride in last}


def _detector(n: int = 2) -> list[Shape]:
    """The same layers as the backbone of a detector: a shorter side of 800 pixels, padded to a multiple of 32."""
    return [Shape("detector", (n, c, 800 // stride, 1216 // stride), layers) for c, stride, layers in _RESNET50]


FAMILIES: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": lambda: resnet50(2),
    "detector": _detector,
    "unet3d": lambda: [Shape("unet3d", (2, c, edge, edge, edge), layers) for c, edge, layers in _UNET3D],
    "mlp": lambda: [Shape("mlp", size) for size in ((128, 512), (1024, 1024), (4096, 256))],
    # Of no network: for a quick look at whether everything runs.
    "tiny": lambda: [Shape("tiny", (32, 8, 6, 6)), Shape("tiny", (64, 8))],
}
DEFAULT_FAMILIES = ("resnet50", "detector", "unet3d", "mlp")


def layer_shapes(families: Sequence[str], batches: Sequence[int], most_elements: int | None) -> list[Shape]:
    """Inputs of the families, each in the default and, if it has spatial dimensions, the channels-last format.

    ResNet-50's have ``batches`` samples per process. Inputs of more than ``most_elements`` are left out.
    """
    found: list[Shape] = []
    for family, shapes in FAMILIES.items():
        if family in families:
            found += [s for n in batches for s in resnet50(n)] if family == "resnet50" else shapes()
    small = [shape for shape in found if most_elements is None or shape.elements <= most_elements]
    formats = (False, True)
    return [replace(s, channels_last=last) for s in small for last in formats if not last or len(s.size) > 2]
