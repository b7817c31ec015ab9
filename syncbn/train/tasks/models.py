"""Networks with any normalization.

The initial weights depend on the network and torch's global generator, not on the normalization: runs that differ in
the normalization alone start from the same weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from syncbn.train.config import ModelConfig, require
from syncbn.train.tasks.library_models import library_model

Norm = Callable[[int], nn.Module]
"""From a number of channels to the layer that normalizes them; ``nn.Identity`` for none."""


def build_model(
    config: ModelConfig,
    *,
    norm: Norm,
    adapt: Callable[[nn.Module], nn.Module],
    finish: Callable[[nn.Module], nn.Module],
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """The network of a configuration, on the CPU, in float32 and training mode.

    It draws one number from torch's global generator; the weights are a function of this number. This package's
    networks are built with layers of ``norm``, and ``finish`` is called once they have their weights; in a model of
    torchvision (for images of 1 or 3 channels) or timm, ``adapt`` replaces BatchNorm.

    Raises:
        ConfigError: an unknown name, wrong options, or a network that does not take images of this size.
        ImportError: a model of a library that is not installed.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if config.name not in _OWN:
            return adapt(library_model(config, list(_OWN), in_channels, num_classes, image_size))
        expected = f"none with model.name {config.name}, only with torchvision's and timm's"
        require(not config.options, "model.options", config.options, expected)
        model = _OWN[config.name](in_channels, num_classes, config.width, norm)
        # Making the modules has drawn numbers, and how many depends on the normalization.
        torch.default_generator.manual_seed(seed)
        initialize(model)
        return finish(model)


def initialize(model: nn.Module) -> None:
    """Initialize as He et al. 2015 (arXiv 1502.01852, section 2.2): variance 2 / fan-out; linear layers 1 / fan-in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


def convnet(in_channels: int, num_classes: int, width: int, norm: Norm) -> nn.Module:
    """Six normalized 3x3 convolutions: (N, in_channels, H, W) -> (N, num_classes), H and W at least 4.

    Channels are w, w, 2w, 2w, 4w, 4w, with max-pooling after the second and the fourth.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, factor in enumerate((1, 1, 2, 2, 4, 4), start=1):
        layers[f"layer{number}"] = _normalized_conv(channels, factor * width, norm)
        layers[f"relu{number}"] = nn.ReLU()
        channels = factor * width
        if number in (2, 4):
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers | _classifier(channels, num_classes))


def cifar_resnet(depth: int, in_channels: int, num_classes: int, width: int, norm: Norm) -> nn.Module:
    """The CIFAR ResNet of He et al. 2015 (arXiv 1512.03385, section 4.2): (N, in_channels, H, W) -> (N, num_classes).

    6n + 2 layers: a 3x3 convolution, three stages of n blocks with w, 2w and 4w channels, and a linear layer. Shortcuts
    have no parameters (option A). The paper's width w is 16.
    """
    assert depth % 6 == 2, depth
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_normalized_conv(in_channels, width, norm), relu=nn.ReLU())
    channels = width
    for stage, factor in enumerate((1, 2, 4), start=1):
        for block in range(1, depth // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            layers[f"stage{stage}_block{block}"] = BasicBlock(channels, factor * width, stride, norm)
            channels = factor * width
    return nn.Sequential(layers | _classifier(channels, num_classes))


def _normalized_conv(in_channels: int, channels: int, norm: Norm, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and its normalization; it has a bias only without normalization, whose mean would cancel it."""
    conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    layer = norm(channels)
    if isinstance(layer, nn.Identity):
        conv.bias = nn.Parameter(torch.zeros(channels))  # with bias=True, the convolution would draw random numbers
    return nn.Sequential(OrderedDict(conv=conv, norm=layer))


def _classifier(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))


class BasicBlock(nn.Module):
    """relu(x' + norm(conv(relu(norm(conv(x)))))): (N, in_channels, H, W) -> (N, channels, H / stride, W / stride).

    x' is x, or every ``stride``-th pixel of x with zeros for the new channels if the shape changes (option A).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = _normalized_conv(in_channels, channels, norm, stride)
        self.second = _normalized_conv(channels, channels, norm)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1 or self.new_channels:
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(shortcut + self.second(functional.relu(self.first(x))))


_OWN: dict[str, Callable[[int, int, int, Norm], nn.Module]] = {
    "convnet": convnet,
    "resnet20": partial(cifar_resnet, 20),
    "resnet56": partial(cifar_resnet, 56),
}
