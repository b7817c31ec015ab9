"""Norms in place of layers that do more than normalize, such as timm's ``BatchNormAct2d`` with its activation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.convert_layer import After, follows


def followed(norm: nn.Module, layer: _BatchNorm) -> nn.Module:
    """``norm``, followed by what ``layer``, which it replaces, does after normalizing."""
    after = follows(type(layer))
    return norm if after is None else FollowedNorm(norm, layer, after)


class FollowedNorm(nn.Module):
    """A normalization and what comes after it, with the attributes and submodules of the layer that it replaces."""

    def __init__(self, norm: nn.Module, layer: _BatchNorm, after: After) -> None:
        super().__init__()
        usual = nn.BatchNorm2d(1, device="meta")
        for name, value in vars(layer).items():
            if name not in vars(usual):
                setattr(self, name, value)
        for name, module in layer.named_children():
            self.add_module(name, module)
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in usual._parameters:
                self.register_parameter(name, parameter)
        for name, buffer in layer.named_buffers(recurse=False):
            if name not in usual._buffers:
                self.register_buffer(name, buffer)
        self.norm, self._after = norm, after

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> (N, C, *)."""
        y = self.norm(x)
        # What follows may work in place, as timm's activations do, and the input may have other uses.
        return self._after(self, y.clone() if y is x else y)
