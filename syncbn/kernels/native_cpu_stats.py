"""Statistics on the CPU: sums and sums of squares by torch's native kernels, about a centre near the mean."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from syncbn.functional import stats
from syncbn.functional.stats import WIRE_DTYPE, compute_dtype
from syncbn.kernels.layout import BLOCK, Layout, layout_of

_aten = torch.ops.aten

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


def group_sums(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """As :func:`syncbn.functional.stats.group_sums`."""
    layout = layout_of(x, groups, num_groups)
    if layout is None:
        return stats.group_sums(x, groups, num_groups)
    if groups is None and layout.planes and x.numel() <= SMALL and x.dtype == compute_dtype(x):
        mean, var = torch.batch_norm_update_stats(layout.native(x), None, None, 0.0)
        # mean^2 <= near^2 * var, which holds also for a channel that is 0 throughout.
        if float(torch.addcmul(var, mean, mean, value=-1 / _NEAR**2).min()) >= 0:
            packed = torch.cat((constants(1, x.dtype)[1], mean, var)).to(WIRE_DTYPE)
            mean, square = packed[1 : layout.c + 1], packed[layout.c + 1 :]
            square.addcmul_(mean, mean)
            return packed.mul_(layout.n * layout.width).unsqueeze(0)
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
    count = sums.new_full((len(sums), 1), float(layout.elements))
    return layout.merge(torch.cat((count, sums, squares), 1), groups, num_groups)


def _packed(sums: Tensor, squares: Tensor, n: int) -> Tensor:
    """The wire's (1, 2C + 1) of one group."""
    return torch.cat((torch.full((1,), float(n), dtype=WIRE_DTYPE, device="cpu"), sums, squares)).unsqueeze(0)


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
    scratch = torch.empty(min(step, layout.n), layout.c, layout.width, dtype=dtype, device="cpu")
    found = []
    for start in range(0, layout.n, step):
        part = x[start : start + step]
        centred = torch.sub(part, centre, out=scratch[: len(part)]).unsqueeze(3)
        found.append(native_sums(centred, centred, None))
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
            sums, squares = native_sums(centred, centred, None)
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
    length = torch.tensor([[block.stop - block.start] for block in blocks], dtype=WIRE_DTYPE, device="cpu")
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
        number = torch.tensor(lengths, dtype=WIRE_DTYPE, device="cpu").repeat_interleave(layout.c)
        total = torch.addcmul(sums, centre, number)
    squares = torch.addcmul(squares, centre, sums + total)
    return (total, squares) if layout.planes else (_per_unit(total, layout), _per_unit(squares, layout))


def _per_unit(values: Tensor, layout: Layout) -> Tensor:
    """(units, C) from the values of interleaved blocks, (C,) each, of which a unit may have several."""
    values = values.view(-1, layout.c)
    return values if len(values) == layout.units else values.view(layout.units, -1, layout.c).sum(1)


@functools.lru_cache(maxsize=256)
def constants(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros and ones, which nobody writes to."""
    return torch.zeros(length, dtype=dtype, device="cpu"), torch.ones(length, dtype=dtype, device="cpu")


def native_affine(
    x: Tensor,
    slope: Tensor | None,
    constant: Tensor | None,
    out: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``slope * (x - mean) / sqrt(var + eps) + constant`` into ``out``, which may be ``x``; a native kernel's form."""
    zero, one = constants(x.shape[1], compute_dtype(x))
    nothing = torch.empty(0, dtype=zero.dtype, device="cpu")
    mean, var = zero if mean is None else mean, one if var is None else var
    _aten.native_batch_norm.out(
        x, slope, constant, mean, var, False, 0.0, eps, out=out, save_mean=nothing, save_invstd=nothing
    )
    return out


def native_sums(dy: Tensor, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, (channels,) in the compute dtype, of a block's form."""
    zero, one = constants(x.shape[1], compute_dtype(x))
    zero = zero if mean is None else mean
    _, product, total = _aten.native_batch_norm_backward(
        dy, x, one, zero, one, None, None, False, 0.0, [False, True, True]
    )
    return total, product
