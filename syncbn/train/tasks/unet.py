"""The U-Net, for images and for volumes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from syncbn.train.tasks.models import initialize


class UNet(nn.Module):
    """Class scores of each pixel: (N, in_channels, \\*size) -> (N, num_classes, \\*size). N may be 0.

    The network of Ronneberger et al. 2015 (arXiv 1505.04597), and of Çiçek et al. 2016 (arXiv 1606.06650) in 3-D, with
    a normalization after each 3x3 convolution, padding in place of cropping, and nearest-neighbour upsampling in place
    of the up-convolution, so that every convolution but the last is normalized. ``size`` has ``dims`` (2 or 3) sides,
    which are multiples of ``2**depth``. Each of the ``depth`` poolings doubles the ``width`` channels.
    """

    def __init__(self, dims: int, in_channels: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        self.pool: nn.Module = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)
        self.down = nn.ModuleList(
            _two_convolutions(dims, before, after)
            for before, after in zip([in_channels, *channels], channels, strict=False)
        )
        self.up = nn.ModuleList(
            _two_convolutions(dims, channels[level] + channels[level + 1], channels[level])
            for level in reversed(range(depth))
        )
        self.scores = _convolution(dims)(width, num_classes, 1)
        initialize(self)
        # No rectifier follows the scores.
        nn.init.kaiming_normal_(self.scores.weight, nonlinearity="linear")
        assert self.scores.bias is not None, "the last convolution has a bias"
        nn.init.zeros_(self.scores.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0](x)
        finer = []
        for block in list(self.down)[1:]:
            finer.append(x)
            x = block(self.pool(x))
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat((finer.pop(), x), dim=1))
        scores: Tensor = self.scores(x)
        return scores


def _two_convolutions(dims: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, before in enumerate((in_channels, channels), start=1):
        # The mean that the normalization subtracts would cancel a bias.
        layers[f"conv{number}"] = _convolution(dims)(before, channels, 3, padding=1, bias=False)
        layers[f"norm{number}"] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels)
        layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


def _convolution(dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv2d if dims == 2 else nn.Conv3d
