"""Inputs for the CPU's kernels, and what is done with them."""

from __future__ import annotations

import pytest
import torch

from syncbn.functional.normalize import Affine
from syncbn.functional.statistics import Groups
from syncbn.kernels import dispatch
from syncbn.kernels.cpu import build
from syncbn.kernels.dispatch import Kernels

SHAPES = {
    "mlp": (12, 5),
    "wide mlp": (64, 300),
    "sequence": (6, 3, 17),
    "images": (6, 7, 9, 11),
    "channels_last": (6, 7, 9, 11),
    "large channels_last": (4, 16, 80, 81),
    "long rows": (2, 3, 96, 100),
    "prime rows": (2, 2, 1, 12289),
    "one pixel": (12, 5, 1, 1),
    "volumes": (4, 3, 4, 5, 6),
    "volumes, channels_last": (4, 3, 4, 5, 6),
    "many blocks": (4, 64, 56, 56),
}
EPILOGUES = {
    "plain": (None, False),
    "relu": ("relu", False),
    "leaky_relu": ("leaky_relu", False),
    "silu": ("silu", False),
    "residual": (None, True),
    "residual, relu": ("relu", True),
    "residual, leaky_relu": ("leaky_relu", True),
    "residual, silu": ("silu", True),
}


def compiled() -> Kernels:
    """The compiled kernels; a test that wants them is skipped where nothing could have built them."""
    kernels = dispatch.cpu()
    if kernels is dispatch.REFERENCE:
        try:
            build.compiler()
        except build.BuildError as error:
            pytest.skip(str(error), allow_module_level=True)
        raise AssertionError("there is a compiler, and the kernels cannot be loaded")
    return kernels


def sample(shape, seed, dtype=torch.float32, loc=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + loc).to(dtype)


def tensors(name, dtype, loc=0.0):
    """x and dy of a named shape and format."""
    made = []
    for seed, centre in enumerate((loc, 0.0)):
        t = sample(SHAPES[name], seed, dtype, centre)
        if "channels_last" in name:
            t = t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
        made.append(t)
    return made


def groupings(n):
    yield "one", Groups()
    yield "equal runs", Groups(torch.arange(n) // (n // 2), 2)
    yield "a group each", Groups(torch.arange(n), n)
    yield "each its own, shuffled", Groups(torch.arange(n).flip(0), n)
    yield "any, one empty", Groups(torch.arange(n) * 7 % 3 + (torch.arange(n) * 7 % 3 > 1), 4)
    yield "runs, one empty", Groups(torch.arange(n) // (n // 2) * 2, 3)
    yield "runs, the last smaller", Groups(torch.arange(n) // (n - 2 + (n == 2)), 2)


def tolerance(dtype, wide=8):
    """A few roundings in the arithmetic's dtype, and one to the result's own."""
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = max(torch.finfo(dtype).eps, wide * arithmetic)
    return {"rtol": eps, "atol": eps}


each_shape = pytest.mark.parametrize("name", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def scale_and_shift(num_groups, c):
    generator = torch.Generator().manual_seed(9)
    scale, shift = torch.rand(2, num_groups, c, generator=generator, dtype=torch.float64)
    return scale + 0.5, shift - 0.5


def affine_of(mean, var, c):
    """The normalization by these moments, with some scale and shift."""
    return Affine(mean, torch.rsqrt(var + 1e-5), *scale_and_shift(len(mean), c))


def passes(kernels, x, dy, groups, epilogue, affine, count):
    """y, then dz (None where kernels leave the activation to the last pass), the sums and x's gradient."""
    y = kernels.normalize(x, affine, groups, epilogue)
    dz, rest, sums = kernels.backward_sums(dy, x, affine, groups, epilogue)
    means = sums * affine.scale.unsqueeze(1) / count.clamp(min=1).unsqueeze(1)
    grad = kernels.grad_input(dz, x, affine, means, groups, rest)
    return y, None if rest.activation else dz, sums, grad
