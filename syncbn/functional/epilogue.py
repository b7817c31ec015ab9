"""The operations after the normalization, in the same pass over memory: add a residual, apply an activation.

Shapes as in :mod:`syncbn.functional.statistics`. z is the normalized, scaled and shifted input plus the residual, the
output is ``activation(z)``, and the gradient with respect to z is ``dz = grad_output * activation'(z)``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ActivationName = Literal["relu", "leaky_relu", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)


class Epilogue(NamedTuple):
    """The operations after :func:`~syncbn.functional.normalize.normalize`. The default is none."""

    residual: Tensor | None = None
    """Added before the activation; it has the shape and dtype of x."""
    activation: ActivationName | None = None
    negative_slope: float = 0.01
    """Of ``leaky_relu``."""

    def __bool__(self) -> bool:
        return self.residual is not None or self.activation is not None


NO_EPILOGUE = Epilogue()


def activate(z: Tensor, epilogue: Epilogue) -> Tensor:
    """``activation(z)``, elementwise, in the dtype of ``z``."""
    if epilogue.activation == "relu":
        return F.relu(z)
    if epilogue.activation == "leaky_relu":
        return F.leaky_relu(z, epilogue.negative_slope)
    if epilogue.activation == "silu":
        return F.silu(z)
    return z


def activation_grad(grad_output: Tensor, z: Tensor, epilogue: Epilogue) -> Tensor:
    """``grad_output * activation'(z)``. At 0 and NaN, ReLU and leaky ReLU are as in torch."""
    if epilogue.activation == "relu":
        return torch.where(z <= 0, 0.0, grad_output)
    if epilogue.activation == "leaky_relu":
        return torch.where(z > 0, grad_output, grad_output * epilogue.negative_slope)
    if epilogue.activation == "silu":
        s = torch.sigmoid(z)
        return grad_output * (s * (1 + z * (1 - s)))
    return grad_output


def invert(y: Tensor, epilogue: Epilogue) -> Tensor:
    """z from the output, for an activation with an inverse: None, or ``leaky_relu`` with a positive slope."""
    if epilogue.activation is None:
        return y
    assert epilogue.activation == "leaky_relu", "no other activation is invertible"
    assert epilogue.negative_slope > 0, "with a slope of 0 there is no inverse"
    return torch.where(y > 0, y, y / epilogue.negative_slope)
