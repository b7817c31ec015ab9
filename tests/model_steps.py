"""One training step of a model, with its own batch normalization and with this package's: what has to be the same.

All in float64 with random weights. Evaluation runs the same operator on the same numbers, so it is equal to the bit.
In training the two compute the statistics in different orders; the difference, some 1e-16 a layer, grows through up to
121 normalizations to at most 2e-11 of a tensor's largest value. The tolerance is 1e-9; a dropped activation, a wrong
variance or a wrong eps is above 1e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from syncbn import convert
from syncbn.layers import SmallBatchNorm

TOLERANCE = 1e-9


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def images(size: int, number: int = 4) -> Tensor:
    return torch.randn(number, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(2)  # dropout and drop path draw the same
    return [y for y in tree_leaves(model(x)) if isinstance(y, Tensor)]


def train_step(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = outputs(model, x)
    generator = torch.Generator().manual_seed(3)
    sum((o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in y).backward()
    return {
        "outputs": {str(i): o.detach() for i, o in enumerate(y)},
        "gradient of the input": {"input": x.grad},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.state_dict()),
    }


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Within the tolerance of each tensor's largest value, or of a thousandth of all tensors' largest.

    The latter is for what is zero but for rounding, such as the gradient of a bias before another normalization.
    """
    assert actual.keys() == expected.keys()
    largest = max(t.double().abs().max() for t in expected.values() if t.numel())
    for name, t in expected.items():
        error = (actual[name] - t).double().abs().max() / (t.double().abs().max() + 1e-3 * largest)
        assert error < TOLERANCE, f"{what}: {name} differs by {error:.1e}"


def batchnorms(model: nn.Module) -> Iterable[nn.Module]:
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def assert_same_step(actual: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """Both models take a step on ``x``: the same outputs, gradients and buffers."""
    wanted = train_step(expected.train(), x)
    for what, found in train_step(actual.train(), x).items():
        assert_near(found, wanted[what], what)


def check_converted(build: Callable[[], nn.Module], x: Tensor, evaluates: bool = True) -> nn.Module:
    """A model of somebody's library computes the same when it is converted. Returns the converted model.

    Args:
        build: makes the model, with random weights.
        x: a batch in float64, of which the model is a function.
        evaluates: whether the model takes the same input in evaluation.
    """
    plain = make(build)
    model: Any = convert(copy.deepcopy(plain), "sync")
    found = list(batchnorms(model))
    assert len(found) == len(list(batchnorms(plain))) > 0
    assert all(isinstance(layer, SmallBatchNorm) for layer in found)
    if evaluates:
        with torch.no_grad():
            for y, expected in zip(outputs(model.eval(), x), outputs(plain.eval(), x), strict=True):
                assert torch.equal(y, expected)
    assert_same_step(model, plain, x)
    return model
