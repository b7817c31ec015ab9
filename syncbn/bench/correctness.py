"""The float64 reference, and how far a contender is from it. Every contender is checked before it is timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.bench.problem import D_MAX, EPS, GHOST_GROUPS, R_MAX, Problem

NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")
"""What a step returns, in this order; the last one only if it has a residual."""
PIECE = 1 << 16  # numbers of a large tensor that are compared at a time


def reference(kind: str, parts: Sequence[Problem], rank: int) -> tuple[Tensor, ...]:
    """Output and gradients of a step, in the order of :data:`NAMES`, in float64 over the concatenated batch.

    Computed on one process. It uses torch's own ``batch_norm`` and autograd, and shares no code with the layers.

    Args:
        kind: ``"batch"`` (statistics of the whole batch), ``"local"`` (of this process's part), ``"ghost"`` (of each of
            32 parts of the batch), ``"halves"`` (of two), ``"renorm"``, ``"relu"`` or ``"add_relu"``.
        parts: the problems of all processes that share statistics, by rank.
        rank: whose part of the results is returned; its weight and bias gradients are sums over its own samples.
    """
    if kind == "local":
        parts, rank = [parts[rank]], 0
    # Each process has its own row of x (R, N, C, *) and of the parameters (R, C), and so its own gradients.
    names = ("x", "weight", "bias", *(("residual",) if kind == "add_relu" else ()))
    leaves = [torch.stack([getattr(part, name) for part in parts]).double().requires_grad_() for name in names]
    x, weight, bias, *residual = leaves
    scale, shift, groups = weight, bias, GHOST_GROUPS.get(kind, 1)
    if kind == "renorm":
        r, d = _corrections(x, parts[0])
        scale, shift = weight * r, weight * d + bias
    if len(parts) == 1:  # in fewer passes
        y = _normalize(x, groups, scale[0], shift[0])
    else:
        view = (*weight.shape[:1], 1, -1, *(1,) * (x.dim() - 3))
        y = _normalize(x, groups) * scale.view(view) + shift.view(view)
    if residual:
        y = y + residual[0]
    if kind in ("relu", "add_relu"):
        y = F.relu(y)
    grad_output = torch.stack([part.grad_output for part in parts]).double()
    return tuple(tensor[rank] for tensor in (y.detach(), *torch.autograd.grad(y, leaves, grad_output)))


def references(parts: Sequence[Problem], rank: int) -> Callable[[str], tuple[Tensor, ...]]:
    """:func:`reference` of these parts as a function of ``kind``; each kind is computed once."""
    cached = functools.cache(lambda kind: reference(kind, parts, rank))
    return lambda kind: cached("batch" if kind == "local" and len(parts) == 1 else kind)


def _normalize(x: Tensor, groups: int = 1, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (R, N, C, *), normalized by the statistics of each of ``groups`` parts of the whole batch."""
    chunks = x.flatten(0, 1).chunk(groups)
    normalized = [F.batch_norm(chunk, None, None, weight, bias, training=True, eps=EPS) for chunk in chunks]
    return (torch.cat(normalized) if groups > 1 else normalized[0]).view_as(x)


def _corrections(x: Tensor, part: Problem) -> tuple[Tensor, Tensor]:
    """r and d (C,) (Ioffe 2017, algorithm 1), from the running statistics before the step; no gradient passes them."""
    with torch.no_grad():
        var, mean = torch.var_mean(x, (0, 1, *range(3, x.dim())), correction=0)
        sigma = torch.sqrt(part.running_var.double() + EPS)
        r = (torch.sqrt(var + EPS) / sigma).clamp(1 / R_MAX, R_MAX)
        d = ((mean - part.running_mean.double()) / sigma).clamp(-D_MAX, D_MAX)
        return r, d


def avoid_kinks(parts: Sequence[Problem]) -> None:
    """Zero ``grad_output`` where the input of a ReLU, with or without the residual, is too close to 0.

    There rounding decides whether the gradient passes, so contenders that differ by one rounding would differ by the
    whole gradient.
    """
    view = (-1, *(1,) * (parts[0].x.dim() - 2))
    weight, bias = (t.double().view(view) for t in (parts[0].weight, parts[0].bias))
    margin = 16 * torch.finfo(parts[0].x.dtype).eps
    normalized = _normalize(torch.stack([part.x for part in parts]).double())
    for part, piece in zip(parts, normalized, strict=True):
        z = piece * weight + bias
        near = (z.abs() < margin) | ((z + part.residual.double()).abs() < margin)
        part.grad_output.masked_fill_(near, 0.0)


def tolerances(dtype: torch.dtype, count: int) -> dict[str, float]:
    """The largest allowed error of each tensor of our layers, relative to the tensor's largest element.

    - float32: a normalized value is a few roundings (2^-24 each) of terms of about five standard deviations. 64 machine
      epsilons (2^-17) leave room for them; a cancelled variance costs a hundred times as much.
    - Gradients of weight and bias are sums of ``count`` terms of either sign, as many as a channel has elements. Added
      one after the other, as torch's own channels_last kernels do, the roundings amount to sqrt(count) epsilons or so.
    - bfloat16, float16: output and input gradient are computed in float32 and rounded once, by half an epsilon. Two
      epsilons leave room for one stored intermediate (the gradient behind an activation).
    """
    narrow = dtype.itemsize < 4
    limit = (2 if narrow else 64) * torch.finfo(dtype).eps
    summed = max(limit, count**0.5 * torch.finfo(torch.float32).eps)
    return {name: summed if name in ("grad_weight", "grad_bias") else limit for name in NAMES}


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, relative to the largest element of the expected one; by name.

    A wrong shape, or a value that is not finite, is an infinite error.
    """
    if len(found) != len(expected):
        raise ValueError(f"a step returned {len(found)} tensors, expected {', '.join(NAMES[: len(expected)])}")
    result = {}
    for name, tensor, right in zip(NAMES, found, expected, strict=False):
        error = math.inf
        if tensor.shape == right.shape:
            # In pieces that stay in the cache.
            size = max(1, len(right) * PIECE // right.numel())
            pieces = right.split(size)
            pairs = zip(tensor.detach().split(size), pieces, strict=True)
            differences = (p.double().sub_(q) for p, q in pairs)
            error = _largest(differences) / (_largest(pieces) or 1.0)
        result[name] = error if math.isfinite(error) else math.inf
    return result


def _largest(pieces: Iterable[Tensor]) -> float:
    """The largest magnitude; NaN if there is one."""
    # In memory order, because max() copies what is not contiguous.
    ordered = (piece if piece.is_contiguous() else piece.movedim(1, -1) for piece in pieces)
    return float(torch.stack([piece.abs().max() for piece in ordered]).max())
