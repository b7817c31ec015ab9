"""The inputs that are measured, which are those of real networks' layers, and the tensors of a layer's step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.1
R_MAX, D_MAX = 3.0, 5.0
GROUPS = 32  # ghost groups of the contenders that have many
GHOST_GROUPS = {"ghost": GROUPS, "halves": 2}
"""The ghost groups of each kind of contender that has several; see :func:`syncbn.bench.correctness.reference`."""

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

    @property
    def memory_format(self) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if len(self.size) == 4 else torch.channels_last_3d


def resnet50_layers() -> list[tuple[int, int]]:
    """Channels and stride of the map of the 53 BatchNorm layers of torchvision's ``resnet50``, in forward order.

    Each block has two narrow layers and a wide one; the first block of a stage also has that of the shortcut, and
    strides in its 3x3 convolution, after the first layer.
    """
    layers = [(64, 2)]
    for width, stride, blocks in ((64, 4, 3), (128, 8, 4), (256, 16, 6), (512, 32, 3)):
        layers += [(width, max(4, stride // 2)), (width, stride), (4 * width, stride), (4 * width, stride)]
        layers += [(width, stride), (width, stride), (4 * width, stride)] * (blocks - 1)
    return layers


def resnet50(n: int, height: int = 224, width: int = 224, family: str = "resnet50") -> list[Shape]:
    """The 12 distinct inputs of ResNet-50's layers for ``n`` images of this size."""
    counts = Counter(resnet50_layers())
    return [Shape(family, (n, c, height // stride, width // stride), k) for (c, stride), k in counts.items()]


def ends_block(shape: Shape) -> bool:
    """Whether the layer is the last of a residual block, whose output is added to the shortcut. Any tiny shape is."""
    return shape.family == "tiny" or shape.size[1:3] in {(256, 56), (512, 28), (1024, 14), (2048, 7)}


FAMILIES = {
    "resnet50": resnet50(2),
    # The same layers as the backbone of a detector: a shorter side of 800 pixels, padded to a multiple of 32.
    "detector": resnet50(2, 800, 1216, "detector"),
    "unet3d": [Shape("unet3d", (2, c, edge, edge, edge), layers) for c, edge, layers in _UNET3D],
    "mlp": [Shape("mlp", size) for size in ((128, 512), (1024, 1024), (4096, 256))],
    # Of small images and late stages, where the cost of a call counts as much as that of memory.
    "small": [
        *(Shape("small", (n, c, edge, edge)) for n, c, edge in ((2, 16, 8), (2, 256, 7), (8, 64, 14), (16, 512, 7))),
        *(Shape("small", (n, c, edge, edge)) for n, c, edge in ((4, 256, 28), (8, 64, 56))),
        Shape("small", (2, 16, 16, 16, 16)),
        Shape("small", (256, 512)),
    ],
    # 1 KB, which the kernels pass in no time: what remains is the time of the host.
    "host": [Shape("host", (2, 16, 2, 4)), Shape("host", (16, 16))],
    # Of no network: for a quick look at whether everything runs.
    "tiny": [Shape("tiny", (32, 8, 6, 6)), Shape("tiny", (64, 8))],
}
DEFAULT_FAMILIES = ("resnet50", "detector", "unet3d", "mlp", "small", "host")


def layer_shapes(families: Sequence[str], batches: Sequence[int], most_elements: int | None) -> list[Shape]:
    """Inputs of the families, each in the default and, if it has spatial dimensions, the channels-last format.

    ResNet-50's have ``batches`` samples per process. Inputs of more than ``most_elements`` are left out.
    """
    found: list[Shape] = []
    for family, shapes in FAMILIES.items():
        if family in families:
            found += [s for n in batches for s in resnet50(n)] if family == "resnet50" else shapes
    small = [shape for shape in found if most_elements is None or shape.elements <= most_elements]
    return [replace(s, channels_last=last) for s in small for last in (False, True) if not last or len(s.size) > 2]


@dataclass(frozen=True)
class Problem:
    """One process's part of a layer's step."""

    shape: Shape
    x: Tensor  # of ``shape.size``, in the shape's memory format; it does not require a gradient
    grad_output: Tensor
    residual: Tensor
    weight: Tensor
    """(C,) float32, as ``bias``, ``running_mean`` and ``running_var``, whatever the dtype of ``x``. The running
    statistics are close to the batch's, so that r and d of BatchRenorm are not clipped."""
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    group: dist.ProcessGroup | None  # the processes that share statistics; None for one process alone

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def num_features(self) -> int:
        return self.shape.size[1]

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else self.group.size()


def make_problem(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    mean: float = 0.3,
    std: float = 1.5,
) -> Problem:
    """Draw normal numbers that depend only on the shape and the rank; ``mean`` and ``std`` are those of x.

    Every process can make the parts of the other ranks too.
    """
    generator = torch.Generator(device).manual_seed(1000 * shape.elements + rank)
    channels = torch.Generator(device).manual_seed(shape.size[1])

    def arranged(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).contiguous(memory_format=shape.memory_format)

    x, grad_output, residual = (torch.randn(shape.size, generator=generator, device=device) for _ in range(3))
    weight, bias, running_mean = (torch.randn(shape.size[1], generator=channels, device=device) for _ in range(3))
    return Problem(
        shape=shape,
        x=arranged(x * std + mean),
        grad_output=arranged(grad_output),
        residual=arranged(residual),
        weight=1 + 0.1 * weight,
        bias=0.1 * bias,
        running_mean=mean + 0.1 * running_mean,
        running_var=std**2 * (1 + 0.1 * torch.rand(shape.size[1], generator=channels, device=device)),
        group=group,
    )
