"""The float64 reference, and how far a contender is from it. Nothing is timed before this."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.bench.problem import D_MAX, EPS, R_MAX, Problem

NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")
"""What a step returns, in this order; the last one where it has a residual."""

KINDS = ("batch", "local", "ghost", "renorm", "relu", "add_relu")
"""What a step may compute; ``local`` is ``batch`` with this process's own statistics, whatever the world."""


def reference(kind: str, parts: Sequence[Problem], rank: int) -> tuple[Tensor, ...]:
    """Output and gradients of a step in float64, computed on one process over the concatenated batch.

    By torch's own ``batch_norm`` and autograd, which share no code with the layers.

    Args:
        kind: one of :data:`KINDS`, ``local`` apart.
        parts: the problems of all processes that share statistics, by rank.
        rank: whose part of the results is returned; its weight and bias gradients are sums over its own samples.

    Returns:
        As :data:`NAMES`.
    """
    own = parts[rank]
    xs = [part.x.detach().double().requires_grad_() for part in parts]
    weight, bias = (t.double().requires_grad_() for t in (own.weight, own.bias))
    residual = own.residual.double().requires_grad_()
    groups = own.groups if kind == "ghost" else 1
    total = torch.zeros((), dtype=torch.float64, device=own.device)
    chunks = [F.batch_norm(part, None, None, training=True, eps=EPS) for part in _whole(xs).chunk(groups)]
    normalized = torch.cat(chunks) if groups > 1 else chunks[0]
    if kind == "renorm":
        normalized = _renormalize(normalized, xs, own)
    view = (1, -1, *(1,) * (own.x.dim() - 2))
    sizes = [part.x.shape[0] for part in parts]
    output = None
    for index, (piece, part) in enumerate(zip(normalized.split(sizes), parts, strict=True)):
        # The processes' parameters are equal, and distinct leaves: only this process's part reaches its gradients.
        scale, shift = (weight, bias) if index == rank else (part.weight.double(), part.bias.double())
        y = piece * scale.view(view) + shift.view(view)
        if kind == "add_relu":
            y = y + (residual if index == rank else part.residual.double())
        if kind in ("relu", "add_relu"):
            y = F.relu(y)
        total = total + (y * part.grad_output.double()).sum()
        output = y if index == rank else output
    assert output is not None
    wanted = (xs[rank], weight, bias, *((residual,) if kind == "add_relu" else ()))
    return output.detach(), *torch.autograd.grad(total, wanted)


def _whole(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(list(xs))


def _renormalize(normalized: Tensor, xs: Sequence[Tensor], own: Problem) -> Tensor:
    """r and d (Ioffe 2017, algorithm 1), constants for the gradient, from the running statistics before the step."""
    view = (1, -1, *(1,) * (normalized.dim() - 2))
    with torch.no_grad():
        var, mean = torch.var_mean(_whole(xs), (0, *range(2, normalized.dim())), correction=0)
        sigma = torch.sqrt(own.running_var.double() + EPS)
        r = (torch.sqrt(var + EPS) / sigma).clamp(1 / R_MAX, R_MAX)
        d = ((mean - own.running_mean.double()) / sigma).clamp(-D_MAX, D_MAX)
    return normalized * r.view(view) + d.view(view)


def avoid_kinks(parts: Sequence[Problem]) -> None:
    """Set ``grad_output`` to 0 where ReLU's argument is so near 0 that a rounding decides its derivative.

    There a right result may differ from the reference by all of the gradient. For one process's parts as for all's, and
    with and without the residual; 16 machine epsilons leave room for contenders that round between the operations.
    """
    view = (1, -1, *(1,) * (parts[0].x.dim() - 2))
    weight, bias = (t.double().view(view) for t in (parts[0].weight, parts[0].bias))
    margin = 16 * torch.finfo(parts[0].dtype).eps
    whole = F.batch_norm(_whole([part.x.double() for part in parts]), None, None, training=True, eps=EPS)
    for part, piece in zip(parts, whole.split([part.x.shape[0] for part in parts]), strict=True):
        z = piece * weight + bias
        near = (z.abs() < margin) | ((z + part.residual.double()).abs() < margin)
        part.grad_output.masked_fill_(near, 0.0)


def tolerances(dtype: torch.dtype, count: int) -> dict[str, float]:
    """The largest error allowed of each tensor of ours, as a part of the tensor's largest element.

    float32: a normalized value is a few roundings of 2^-24 of terms some five standard deviations in size; 64 machine
    epsilons (2^-17) leave room for them, and are a hundredth of what a cancelled variance costs. The gradients of
    weight and bias are sums of ``count`` terms of either sign, of size sqrt(count): added up one after the other, as
    torch's own channels_last kernels do, each addition rounds a partial sum of up to that size, and count such errors
    of half an epsilon amount to about sqrt(count) epsilons of the sum. bfloat16 and float16: the output and the input's
    gradient are rounded to them once, by half an epsilon of their own size, and what is rounded is computed in float32;
    two epsilons leave room for an intermediate that is stored (the gradient behind an activation).

    Args:
        dtype: of x.
        count: elements a channel on one process.
    """
    narrow = dtype.itemsize < 4
    limit = (2 if narrow else 64) * torch.finfo(dtype).eps
    summed = max(limit, count**0.5 * torch.finfo(torch.float32).eps)
    return {name: summed if name in ("grad_weight", "grad_bias") else limit for name in NAMES}


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to the largest element of what was expected; by name.

    What is not finite where the reference is counts as infinitely wrong.
    """
    if len(found) != len(expected):
        raise ValueError(f"a step returned {len(found)} tensors, expected {', '.join(NAMES[: len(expected)])}")
    result = {}
    for name, a, b in zip(NAMES, found, expected, strict=False):
        if a.shape != b.shape:
            result[name] = float("inf")
            continue
        scale = float(b.abs().max()) if b.numel() else 1.0
        difference = float((a.detach().double() - b).abs().max()) if b.numel() else 0.0
        error = difference / scale if scale else difference
        result[name] = error if math.isfinite(error) else float("inf")
    return result


class References:
    """The reference of each kind on one shape, computed when it is first asked for."""

    def __init__(self, parts: Sequence[Problem], rank: int) -> None:
        self._parts = parts
        self._rank = rank
        self._found: dict[str, tuple[Tensor, ...]] = {}

    def of(self, kind: str) -> tuple[Tensor, ...]:
        alone = kind == "local" and len(self._parts) > 1
        if kind == "local" and not alone:
            kind = "batch"
        if kind not in self._found:
            own = self._parts[self._rank]
            parts, rank = ([own], 0) if alone else (self._parts, self._rank)
            self._found[kind] = reference("batch" if alone else kind, parts, rank)
        return self._found[kind]
