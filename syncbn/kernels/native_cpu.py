"""The passes on the CPU where the compiled kernels are missing, put together from torch's native ones.

Two of them do most of the work: batch normalization with given statistics, which is ``slope * x + constant``, and the
backward pass of that, which without its input gradient is ``sum(dy)`` and ``sum(dy * (x - mean))`` in one pass. Both
take planes or channels_last and any floating dtype. What needs several operations is done block by block, in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.functional import normalize as reference
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.stats import WIRE_DTYPE, compute_dtype
from syncbn.kernels.layout import BLOCK, WHOLE, Block, Layout, layout_of
from syncbn.kernels.native_cpu_stats import native_affine, native_sums

_aten = torch.ops.aten

FAR = 8.0
"""``slope * x + constant`` loses |mean|/std roundings against ``slope * (x - mean) + shift``; beyond this many, which
are 5e-7 in float32, the slower form is taken."""


# -- the elementwise step ----------------------------------------------------------------------------------------------


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.normalize`."""
    layout = layout_of(x, groups, len(mean))
    if layout is None:
        return reference.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    line = _normalizing_line(x, layout, mean, invstd, scale, shift, groups)
    y = torch.empty_like(x)
    source, target = layout.matrix(x), layout.matrix(y)
    one_operation = line.centre is None and (layout.planes or layout.units == 1)
    if not epilogue and (one_operation or x.dtype == line.slope.dtype):
        for block in layout.blocks(WHOLE if line.centre is None else BLOCK):
            _affine(block, block.of(source), line, block.of(target))
        return y
    residual = None if epilogue.residual is None else layout.matrix(epilogue.residual)
    scratch = None
    for block in layout.blocks():
        scratch = block.scratch(scratch, line.slope.dtype)
        z = _preactivation(block, block.of(source), line, residual, block.form(scratch))
        block.of(target).copy_(_activate(z, epilogue))
    return y


class _Line(NamedTuple):
    """``slope * (x - centre) + constant`` of each unit, in the compute dtype."""

    centre: Tensor | None
    """None where all means are near, and are in the constant."""
    slope: Tensor
    constant: Tensor


def _line(
    x: Tensor, layout: Layout, mean: Tensor, invstd: Tensor, slope: Tensor, offset: Tensor | None, groups: Tensor | None
) -> _Line:
    """``slope * (x - mean) + offset``, (G, C) float64 each, rounded once."""
    centre, rest = None, mean
    if _is_far(mean, invstd):
        high, rest = reference.split_mean(mean, x)
        centre = _per_channel(high, x, layout, groups)
    constant = -rest * slope if offset is None else torch.addcmul(offset.to(WIRE_DTYPE), rest, slope, value=-1)
    return _Line(centre, _per_channel(slope, x, layout, groups), _per_channel(constant, x, layout, groups))


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether a mean is far from 0, or not finite: then the elementwise step has to subtract it from the values."""
    product = mean * invstd
    return product.numel() > 0 and not float(torch.linalg.vector_norm(product, torch.inf)) <= FAR


def _normalizing_line(
    x: Tensor,
    layout: Layout,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None,
) -> _Line:
    return _line(x, layout, mean, invstd, invstd if scale is None else invstd * scale, shift, groups)


def _per_channel(values: Tensor, x: Tensor, layout: Layout, groups: Tensor | None) -> Tensor:
    return layout.per_unit(values.to(compute_dtype(x)), groups)


def _affine(block: Block, x: Tensor, line: _Line, out: Tensor) -> Tensor:
    """``slope * (x - centre) + constant`` of a block, into ``out``, which may be ``x``."""
    if line.centre is not None:
        x = torch.sub(x, block.spread(block.coefficients(line.centre)), out=out)
    slope, constant = block.coefficients(line.slope), block.coefficients(line.constant)
    if block.together:
        torch.mul(x, slope, out=out)
        return out.add_(constant)
    return native_affine(x, slope, constant, out)


def _preactivation(block: Block, x: Tensor, line: _Line, residual: Tensor | None, out: Tensor) -> Tensor:
    """z of a block, into ``out`` of the compute dtype."""
    z = _affine(block, x if x.dtype == out.dtype else out.copy_(x), line, out)
    return z if residual is None else z.add_(block.of(residual))


def _activate(z: Tensor, epilogue: Epilogue) -> Tensor:
    """:func:`syncbn.functional.epilogue.activate` in place."""
    if epilogue.activation == "relu":
        _aten.relu_(z)
    elif epilogue.activation == "leaky_relu":
        _aten.leaky_relu_(z, epilogue.negative_slope)
    elif epilogue.activation == "silu":
        _aten.silu_(z)
    return z


def _activation_grad(dy: Tensor, z: Tensor, epilogue: Epilogue) -> Tensor:
    """:func:`syncbn.functional.epilogue.activation_grad`, into ``z``."""
    dy = dy.to(z.dtype)
    if epilogue.activation == "relu":
        _aten.threshold_backward.grad_input(dy, z, 0.0, grad_input=z)
    elif epilogue.activation == "leaky_relu":
        _aten.leaky_relu_backward.grad_input(dy, z, epilogue.negative_slope, False, grad_input=z)
    else:
        _aten.silu_backward.grad_input(dy, z, grad_input=z)
    return z


# -- its gradient ------------------------------------------------------------------------------------------------------


def backward_sums(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None,
    num_groups: int,
    epilogue: Epilogue = NO_EPILOGUE,
) -> tuple[Tensor, Epilogue, Tensor]:
    """As :func:`syncbn.functional.normalize.backward_sums`."""
    layout = layout_of(x, groups, num_groups)
    if layout is None:
        return reference.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
    dz = grad_output
    if epilogue.activation is not None:
        line = _normalizing_line(x, layout, mean, invstd, scale, shift, groups)
        dz = _through_activation(layout, grad_output, x, line, epilogue)
    high, low = reference.split_mean(mean, x)
    centre = _per_channel(high, x, layout, groups)
    gradient, source = layout.matrix(dz), layout.matrix(x)
    scratch = None
    parts: list[tuple[Tensor, Tensor]] = []
    for block in layout.blocks(WHOLE if layout.planes else 4 * BLOCK):
        dy, part, about = block.of(gradient), block.of(source), block.coefficients(centre)
        if block.together:
            scratch = block.scratch(scratch, centre.dtype)
            product = torch.sub(part, about, out=block.form(scratch)).mul_(dy).sum(1)
            parts.append((dy.sum(1, dtype=centre.dtype), product))
        else:
            parts.append(native_sums(dy, part, about))
    joined = parts[0] if len(parts) == 1 else tuple(torch.cat(t) for t in zip(*parts, strict=True))
    sums = torch.stack([t.to(WIRE_DTYPE).view(-1, layout.c) for t in joined], 1)
    if not layout.planes and len(sums) > layout.units:
        sums = sums.view(layout.units, -1, 2, layout.c).sum(1)
    sums = layout.merge(sums.flatten(1), groups, num_groups).view(-1, 2, layout.c)
    sum_dz, sum_dz_xmu = sums.unbind(1)
    return dz, NO_EPILOGUE, torch.stack((sum_dz, torch.addcmul(sum_dz_xmu, low, sum_dz, value=-1) * invstd), 1)


def _through_activation(layout: Layout, grad_output: Tensor, x: Tensor, line: _Line, epilogue: Epilogue) -> Tensor:
    """dz, of ``x``'s dtype and format."""
    dz = torch.empty_like(x)
    gradient, source, target = layout.matrix(grad_output), layout.matrix(x), layout.matrix(dz)
    residual = None if epilogue.residual is None else layout.matrix(epilogue.residual)
    scratch = None
    for block in layout.blocks():
        scratch = block.scratch(scratch, line.slope.dtype)
        z = _preactivation(block, block.of(source), line, residual, block.form(scratch))
        block.of(target).copy_(_activation_grad(block.of(gradient), z, epilogue))
    return dz


def grad_input(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    means: Tensor,
    groups: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As :func:`syncbn.functional.normalize.grad_input`."""
    layout = layout_of(x, groups, len(mean))
    if layout is None or epilogue:
        return reference.grad_input(dz, x, mean, invstd, scale, shift, means, groups, epilogue)
    mean_dz, mean_dz_xhat = means.unbind(1)
    slope = -invstd.square() * mean_dz_xhat
    line = _line(x, layout, mean, invstd, slope, -mean_dz * invstd, groups)
    slope_dz = _per_channel(invstd if scale is None else invstd * scale, x, layout, groups)
    grad = torch.empty_like(x)
    gradient, source, target = layout.matrix(dz), layout.matrix(x), layout.matrix(grad)
    wide = x.dtype == compute_dtype(x)
    scratch = None
    for block in layout.blocks(WHOLE if wide and line.centre is None else BLOCK):
        slope_of_block = block.spread(block.coefficients(slope_dz))
        part, dy, out = block.of(source), block.of(gradient), block.of(target)
        if wide:
            _affine(block, part, line, out).addcmul_(dy, slope_of_block)
        else:
            scratch = block.scratch(scratch, slope_dz.dtype)
            result = _preactivation(block, part, line, None, block.form(scratch))
            out.copy_(result.addcmul_(dy.to(result.dtype), slope_of_block))
    return grad
