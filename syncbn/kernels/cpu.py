"""The passes on the CPU, put together from torch's native kernels.

Two of them do most of the work: batch normalization with given statistics, which is ``slope * x + constant``, and the
backward pass of that, which without its input gradient is ``sum(dy)`` and ``sum(dy * (x - mean))`` in one pass. Both
take planes or channels_last and any floating dtype. What needs several operations is done block by block, in the cache.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from syncbn.functional import normalize as reference
from syncbn.functional import stats
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.stats import WIRE_DTYPE, compute_dtype
from syncbn.kernels.layout import BLOCK, WHOLE, Block, Layout, layout_of

_PROBE = 16
"""The centre of a row's values is the mean of the first 1/16 of them, and of 16 at least: whatever the values, the
squares about it are at most 16 times those about the row's mean, and so the variance has at most 16 times the error."""
_LONGEST = 1 << 13
"""Elements that the native kernel may add up in its lanes of 8 or 16 floats; longer rows are taken in parts."""
_NEAR = 4.0
"""|mean|/std up to which statistics may rest on a mean in the input's dtype, which for interleaved values is added up
one after the other."""
SMALL = 1 << 17
"""Elements up to which torch's own statistics of planes serve, in one call: it goes over them slowly, but with care."""
FAR = 8.0
"""``slope * x + constant`` loses |mean|/std roundings against ``slope * (x - mean) + shift``; beyond this many, which
are 5e-7 in float32, the slower form is taken."""

_aten = torch.ops.aten


# -- statistics --------------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """As :func:`syncbn.functional.stats.group_sums`."""
    layout = layout_of(x, groups, num_groups)
    if layout is None:
        return stats.group_sums(x, groups, num_groups)
    if groups is None and layout.planes and x.numel() <= SMALL and x.dtype == compute_dtype(x):
        mean, var = torch.batch_norm_update_stats(layout.native(x), None, None, 0.0)
        if bool((mean.square() <= _NEAR**2 * var).all()):
            n = layout.n * layout.width
            mean, var = mean.to(WIRE_DTYPE), var.to(WIRE_DTYPE)
            return _packed(mean * n, var.addcmul_(mean, mean).mul_(n), n)
    matrix = layout.matrix(x)
    if layout.planes and groups is None:
        return _packed(*channel_sums(layout, matrix), layout.n * layout.width)
    if layout.planes:
        sums, squares = plane_sums(layout, matrix)
    else:
        found = None
        if layout.units == 1 and x.dtype == compute_dtype(x):
            found = sums_of_moments(layout, matrix)
        sums, squares = found or _sums_about_probe(layout, matrix)
    count = torch.full((len(sums), 1), float(layout.elements), dtype=WIRE_DTYPE)
    return layout.merge(torch.cat((count, sums, squares), 1), groups, num_groups)


def _packed(sums: Tensor, squares: Tensor, n: int) -> Tensor:
    """The wire's (1, 2C + 1) of one group."""
    return torch.cat((torch.full((1,), float(n), dtype=WIRE_DTYPE), sums, squares)).unsqueeze(0)


def plane_sums(layout: Layout, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of each plane, (N, C) float64."""
    least = -(-layout.width // _LONGEST)
    # Equal parts, where the length has a fitting divisor.
    parts = next((k for k in range(least, 4 * least) if layout.width % k == 0), 1)
    folded = layout._replace(width=layout.width // parts, units=layout.units * parts)
    sums, squares = _sums_about_probe(folded, matrix.view(-1, folded.width))
    shape = (layout.n, layout.c)
    if parts == 1:
        return sums.view(shape), squares.view(shape)
    return sums.view(*shape, parts).sum(2), squares.view(*shape, parts).sum(2)


def channel_sums(layout: Layout, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of each channel over all samples, (C,) float64, of planes."""
    if layout.c * layout.width > 4 * BLOCK or layout.width > _LONGEST:
        sums, squares = plane_sums(layout, matrix)
        return sums.sum(0), squares.sum(0)
    # Small planes: block by block of samples, about one centre for each channel.
    dtype = _summing_dtype(matrix)
    x = matrix.view(layout.n, layout.c, layout.width)
    probe = min(layout.width, max(_PROBE, layout.width // _PROBE))
    centre = x[:, :, :probe].mean((0, 2), dtype=dtype).view(1, -1, 1)
    step = max(1, BLOCK // (layout.c * layout.width))
    scratch = torch.empty(min(step, layout.n), layout.c, layout.width, dtype=dtype)
    found = []
    for start in range(0, layout.n, step):
        part = x[start : start + step]
        centred = torch.sub(part, centre, out=scratch[: len(part)]).unsqueeze(3)
        found.append(_native_sums(centred, centred, None))
    sums, squares = (torch.stack(t).to(WIRE_DTYPE).sum(0) for t in zip(*found, strict=True))
    middle = centre.view(-1).to(WIRE_DTYPE)
    total = torch.add(sums, middle, alpha=layout.n * layout.width)
    return total, squares.addcmul_(middle, sums.add_(total))


def _summing_dtype(x: Tensor) -> torch.dtype:
    """What squares are summed in."""
    # Half precision's values lie on a coarse grid, on which roundings have a direction: float32 sums of some thousand
    # squares are off by up to 1e-5.
    return x.dtype if x.dtype == compute_dtype(x) else WIRE_DTYPE


def _sums_about_probe(layout: Layout, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of each unit, (units,) or (units, C) float64, summed about a value near its mean."""
    dtype = _summing_dtype(matrix)
    scratch = None
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    lengths: list[int] = []
    for block in layout.blocks():
        part = block.of(matrix)
        scratch = block.scratch(scratch, dtype)
        centred = block.form(scratch)
        dim = 1 if block.together else 2
        length = part.shape[dim]
        centre = part.narrow(dim, 0, min(length, max(_PROBE, length // _PROBE))).mean(dim, keepdim=True, dtype=dtype)
        torch.sub(part, centre, out=centred)
        if block.together:
            sums = centred.sum(1)
            squares = centred.mul_(centred).sum(1)
        else:
            sums, squares = _native_sums(centred, centred, None)
        found.append((centre.view(sums.shape), sums, squares))
        lengths.append(length)
    return _from_centres(layout, found, lengths)


def sums_of_moments(layout: Layout, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same for one interleaved unit from the native kernel's own mean and variance, or None where a mean is far."""
    blocks = list(layout.blocks(4 * BLOCK))
    found = [torch.batch_norm_update_stats(block.of(matrix), None, None, 0.0) for block in blocks]
    mean, var = (torch.stack(t).to(WIRE_DTYPE) for t in zip(*found, strict=True))
    mean_square = mean.square()
    # It holds also for a channel that is 0 throughout.
    if not bool((mean_square <= _NEAR**2 * var).all()):
        return None
    length = torch.tensor([[block.stop - block.start] for block in blocks], dtype=WIRE_DTYPE)
    return (mean * length).sum(0, keepdim=True), (mean_square.add_(var) * length).sum(0, keepdim=True)


def _from_centres(
    layout: Layout, found: list[tuple[Tensor, Tensor, Tensor]], lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Sums and squares about zero, float64, from each block's centre and its sums and squares about that.

    Chan, Golub, LeVeque 1983, eq. 2.1.
    """
    joined = found[0] if len(found) == 1 else (torch.cat(t) for t in zip(*found, strict=True))
    centre, sums, squares = (t.to(WIRE_DTYPE) for t in joined)
    if lengths[0] == lengths[-1]:
        total = torch.add(sums, centre, alpha=lengths[0])
    else:  # the last block of an interleaved unit is shorter
        number = torch.tensor(lengths, dtype=WIRE_DTYPE).repeat_interleave(layout.c)
        total = torch.addcmul(sums, centre, number)
    squares = torch.addcmul(squares, centre, sums + total)
    return (total, squares) if layout.planes else (_per_unit(total, layout), _per_unit(squares, layout))


def _per_unit(values: Tensor, layout: Layout) -> Tensor:
    """(units, C) from the values of interleaved blocks, (C,) each, of which a unit may have several."""
    values = values.view(-1, layout.c)
    return values if len(values) == layout.units else values.view(layout.units, -1, layout.c).sum(1)


@functools.lru_cache(maxsize=256)
def _constants(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros and ones, which nobody writes to."""
    return torch.zeros(length, dtype=dtype), torch.ones(length, dtype=dtype)


def _native_sums(dy: Tensor, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, (channels,) in the compute dtype, of a block's form."""
    zero, one = _constants(x.shape[1], compute_dtype(x))
    zero = zero if mean is None else mean
    _, product, total = _aten.native_batch_norm_backward(
        dy, x, one, zero, one, None, None, False, 0.0, [False, True, True]
    )
    return total, product


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
    if layout is None or _is_far(mean, invstd):
        return reference.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    line = _line(x, layout, mean, invstd, scale, shift, groups)
    y = torch.empty_like(x)
    source, target = layout.matrix(x), layout.matrix(y)
    if not epilogue:
        for block in layout.blocks(WHOLE):
            _affine(block, block.of(source), line, block.of(target))
        return y
    residual = None if epilogue.residual is None else layout.matrix(epilogue.residual)
    scratch = None
    for block in layout.blocks():
        scratch = block.scratch(scratch, line[0].dtype)
        z = _preactivation(block, block.of(source), line, residual, block.form(scratch))
        block.of(target).copy_(_activate(z, epilogue))
    return y


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether a mean is far from 0, or not finite: then the elementwise step has to subtract it from the values."""
    return not bool((mean * invstd).abs().max() <= FAR)


def _line(
    x: Tensor,
    layout: Layout,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Slope and constant of each unit in the compute dtype, rounded once."""
    slope = invstd if scale is None else invstd * scale
    constant = -mean * slope if shift is None else torch.addcmul(shift.to(WIRE_DTYPE), mean, slope, value=-1)
    return _per_channel(slope, x, layout, groups), _per_channel(constant, x, layout, groups)


def _per_channel(values: Tensor, x: Tensor, layout: Layout, groups: Tensor | None) -> Tensor:
    return layout.per_unit(values.to(compute_dtype(x)), groups)


def _affine(block: Block, x: Tensor, line: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """``slope * x + constant`` of a block, into ``out``, which may be ``x``."""
    slope, constant = (block.coefficients(t) for t in line)
    if block.together:
        torch.mul(x, slope, out=out)
        return out.add_(constant)
    zero, one = _constants(len(slope), slope.dtype)
    nothing = torch.empty(0, dtype=slope.dtype)
    _aten.native_batch_norm.out(
        x, slope, constant, zero, one, False, 0.0, 0.0, out=out, save_mean=nothing, save_invstd=nothing
    )
    return out


def _preactivation(
    block: Block, x: Tensor, line: tuple[Tensor, Tensor], residual: Tensor | None, out: Tensor
) -> Tensor:
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
    if layout is None or (epilogue.activation is not None and _is_far(mean, invstd)):
        return reference.backward_sums(grad_output, x, mean, invstd, scale, shift, groups, num_groups, epilogue)
    dz = grad_output
    if epilogue.activation is not None:
        dz = _through_activation(layout, grad_output, x, _line(x, layout, mean, invstd, scale, shift, groups), epilogue)
    high, low = reference.split_mean(mean, x)
    centre = _per_channel(high, x, layout, groups)
    gradient, source = layout.matrix(dz), layout.matrix(x)
    scratch = None
    found: list[tuple[Tensor, Tensor]] = []
    for block in layout.blocks(WHOLE if layout.planes else 4 * BLOCK):
        dy, part, about = block.of(gradient), block.of(source), block.coefficients(centre)
        if block.together:
            scratch = block.scratch(scratch, centre.dtype)
            product = torch.sub(part, about, out=block.form(scratch)).mul_(dy).sum(1)
            found.append((dy.sum(1, dtype=centre.dtype), product))
        else:
            found.append(_native_sums(dy, part, about))
    joined = found[0] if len(found) == 1 else tuple(torch.cat(t) for t in zip(*found, strict=True))
    sums = torch.stack([t.to(WIRE_DTYPE).view(-1, layout.c) for t in joined], 1)
    if not layout.planes and len(sums) > layout.units:
        sums = sums.view(layout.units, -1, 2, layout.c).sum(1)
    sums = layout.merge(sums.flatten(1), groups, num_groups).view(-1, 2, layout.c)
    sum_dz, sum_dz_xmu = sums.unbind(1)
    return dz, NO_EPILOGUE, torch.stack((sum_dz, torch.addcmul(sum_dz_xmu, low, sum_dz, value=-1) * invstd), 1)


def _through_activation(
    layout: Layout, grad_output: Tensor, x: Tensor, line: tuple[Tensor, Tensor], epilogue: Epilogue
) -> Tensor:
    """dz, of ``x``'s dtype and format."""
    dz = torch.empty_like(x)
    gradient, source, target = layout.matrix(grad_output), layout.matrix(x), layout.matrix(dz)
    residual = None if epilogue.residual is None else layout.matrix(epilogue.residual)
    scratch = None
    for block in layout.blocks():
        scratch = block.scratch(scratch, line[0].dtype)
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
    if layout is None or epilogue or _is_far(mean, invstd):
        return reference.grad_input(dz, x, mean, invstd, scale, shift, means, groups, epilogue)
    mean_dz, mean_dz_xhat = means.unbind(1)
    slope = -invstd.square() * mean_dz_xhat
    constant = torch.addcmul(mean_dz * invstd, slope, mean).neg_()
    line = _per_channel(slope, x, layout, groups), _per_channel(constant, x, layout, groups)
    slope_dz = _per_channel(invstd if scale is None else invstd * scale, x, layout, groups)
    grad = torch.empty_like(x)
    gradient, source, target = layout.matrix(dz), layout.matrix(x), layout.matrix(grad)
    wide = x.dtype == compute_dtype(x)
    scratch = None
    for block in layout.blocks(WHOLE if wide else BLOCK):
        slope_of_block = block.spread(block.coefficients(slope_dz))
        part, dy, out = block.of(source), block.of(gradient), block.of(target)
        if wide:
            _affine(block, part, line, out).addcmul_(dy, slope_of_block)
        else:
            scratch = block.scratch(scratch, slope_dz.dtype)
            result = _preactivation(block, part, line, None, block.form(scratch))
            out.copy_(result.addcmul_(dy.to(result.dtype), slope_of_block))
    return grad


def backward_alone(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Both passes at once where one process holds the one group: dz, the sums (1, 2, C) and the input's gradient.

    torch's native backward pass, which needs nothing from elsewhere. None where it does not serve.
    """
    layout = layout_of(x, None, 1)
    if layout is None or _is_far(mean, invstd):
        return None
    dz = grad_output
    if epilogue.activation is not None:
        dz = _through_activation(layout, grad_output, x, _line(x, layout, mean, invstd, scale, shift, None), epilogue)
    dtype = compute_dtype(x)
    weight = torch.ones(layout.c, dtype=dtype) if scale is None else scale[0].to(dtype)
    mean_of_x, invstd_of_x = mean[0].to(dtype), invstd[0].to(dtype)
    grad, sum_dz_xhat, sum_dz = _aten.native_batch_norm_backward(
        layout.native(dz), layout.native(x), weight, None, None, mean_of_x, invstd_of_x, True, 0.0, [True, True, True]
    )
    sums = torch.stack((sum_dz, sum_dz_xhat)).to(WIRE_DTYPE).unsqueeze(0)
    return dz, sums, layout.from_native(grad)
