"""Tests of the Triton kernels against their twins, for a device that the importing module chooses.

It defines the fixtures ``device``, and gets these tests by importing all names: in Triton's interpreter on the CPU, and
on CUDA. The truth is the twin in float64 on the CPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cpu_cases import EPILOGUES, sample

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.functional import normalize as twin
from syncbn.functional import statistics
from syncbn.functional.epilogue import Epilogue
from syncbn.functional.normalize import Affine
from syncbn.functional.statistics import Groups, moments
from syncbn.kernels.cuda import functions as kernels
from syncbn.kernels.dispatch import REFERENCE, cuda

SHAPES = {
    "mlp": (37, 5),
    "wide mlp": (6, 300),
    "one pixel": (9, 5, 1, 1),
    "sequence": (6, 3, 17),
    "long sequence": (2, 3, 1100),
    "images": (6, 7, 9, 11),
    "images, channels_last": (6, 7, 9, 11),
    "small images, channels_last": (9, 130, 2, 2),
    "large images, channels_last": (2, 33, 9, 8),
    "volumes": (4, 3, 4, 5, 6),
    "volumes, channels_last": (4, 3, 4, 5, 6),
    "six dimensions": (4, 3, 2, 3, 2, 4),
    "one channel": (4, 1, 5, 7),
    "one sample": (1, 3, 5, 7),
}
SLOPE = 0.1  # no float32
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

each_shape = pytest.mark.parametrize("name", SHAPES)
each_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated without a value is not a number, so an element that is not written shows."""

    def poison(allocate):
        def allocated(*args, **options):
            tensor = allocate(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


# -- what is compared --------------------------------------------------------------------------------------------------


def formatted(t, name):
    if "channels_last" not in name:
        return t
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


def groupings(n):
    """Label and groups: one, in order, and in any order with some empty."""
    yield "one", Groups()
    yield "runs", Groups(torch.arange(n) * 3 // n, 3)
    mixed = torch.arange(n) * 7 % 5
    yield "mixed", Groups(mixed + (mixed > 1), 32)


def scale_and_shift(num_groups, c, expanded):
    generator = torch.Generator().manual_seed(9)
    scale, shift = torch.rand(2, num_groups, c, generator=generator, dtype=torch.float64)
    if expanded:  # as from a parameter, with stride 0
        scale, shift = (t[:1].float().expand(num_groups, c) for t in (scale, shift))
    return scale + 0.5 if not expanded else scale, shift - 0.25 if not expanded else shift


def close(found, expected, dtype, label, scale=1.0):
    """A few roundings in the arithmetic's dtype, and one to the result's own."""
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = max(torch.finfo(dtype).eps, 16 * wide)
    found, expected = found.detach().cpu().double(), expected.detach().double()
    torch.testing.assert_close(found, expected, rtol=eps, atol=scale * eps, msg=lambda m: f"{label}: {m}")


def on(device, *values):
    """The same on the device: tensors, also those in tuples, with the strides that they have."""
    return [on_device(v, device) for v in values]


def on_device(value, device):
    if isinstance(value, Affine | Groups):
        return type(value)(*on(device, *value))
    return moved(value, device) if isinstance(value, torch.Tensor) and value.device != device else value


def moved(t, device):
    if not t.numel():
        return t.to(device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((extent,), (1,)).to(device).as_strided(t.shape, t.stride())


def wide(*values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check_passes(device, x, dy, residual, activation, groups, expanded=False, label=""):
    """Forward and backward of one layer, every result against the float64 twin. x, dy and residual in any format."""
    dtype = x.dtype
    # What kernels and twin both start from: the statistics, and coefficients that each can represent.
    found = kernels.group_sums(*on(device, x, groups))
    expected = statistics.group_sums(x.double(), groups)
    assert found.dtype == torch.float64
    # float32 sums of squares about a tile's mean; the wire's (mean / std)^2 * 1e-16.
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.cpu(), expected, rtol=bound, atol=bound * x.numel(), msg=lambda m: f"{label}: {m}")
    count, mean, var = moments(expected)
    invstd = torch.rsqrt(var + 1e-5)
    scale, shift = scale_and_shift(groups.number, x.shape[1], expanded)
    affine = Affine(mean, invstd, scale, shift)
    fused = Epilogue(*on(device, residual), activation, SLOPE)
    exact = Epilogue(*wide(residual), activation, SLOPE)

    x_on, dy_on, affine_on, groups_on = on(device, x, dy, affine, groups)
    y = kernels.normalize(x_on, affine_on, groups_on, fused)
    regular = kernels._strides(x_on) is not None
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(x).stride() or not regular, label
    close(y, twin.normalize(x.double(), affine, groups, exact), dtype, f"{label}, y")

    dz, rest, sums = kernels.backward_sums(dy_on, x_on, affine_on, groups_on, fused)
    dz_twin, _, sums_twin = twin.backward_sums(dy.double(), x.double(), affine, groups, exact)
    if activation is None or residual is None:
        assert dz is dy_on or kernels._strides(dy_on) is None, label
        assert (rest.activation, rest.residual) == (activation, None)
    else:
        assert not rest
        assert dz.dtype == dtype
        assert dz.stride() == y.stride() or not regular, label
        close(dz, dz_twin, dtype, f"{label}, dz")
        # The sums and the gradient are of what is handed on.
        dz_twin, _, sums_twin = twin.backward_sums(dz.cpu().double(), x.double(), affine, groups)
    assert sums.shape == (groups.number, 2, x.shape[1])
    error = (sums.cpu() - sums_twin).abs().max() if sums.numel() else 0
    assert error <= bound * max(x.numel() / x.shape[1], 10), label

    means = scale.double().unsqueeze(1) * sums_twin / count.clamp(min=1).unsqueeze(1)
    dx = kernels.grad_input(dz, x_on, affine_on, *on(device, means), groups_on, rest)
    assert (dx.dtype, dx.stride()) == (dtype, y.stride()), label
    truth = twin.grad_input(dz_twin, x.double(), affine, means, groups)
    # invstd of a group of few values can be large.
    close(dx, truth, dtype, f"{label}, dx", scale=max(1.0, invstd[count[:, 0] > 0].max().item()))


# -- values ------------------------------------------------------------------------------------------------------------


FORMATS = ["mlp", "images", "images, channels_last"]


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, d) for name in SHAPES for d in DTYPES if name in FORMATS or d == torch.float32], ids=str
)
def test_shapes(device, name, dtype):
    x, dy = (formatted(sample(SHAPES[name], seed, dtype), name) for seed in range(2))
    for label, groups in groupings(len(x)):
        check_passes(device, x, dy, None, None, groups, label=label)


@each_shape
def test_one_program_for_several_items(device, name, monkeypatch):
    """Its sums go over from item to item, and from group to group."""
    monkeypatch.setattr(kernels, "_processors", lambda device: 0)
    x, dy, residual = (formatted(sample(SHAPES[name], seed, loc=2.0), name) for seed in range(3))
    for label, groups in groupings(len(x)):
        check_passes(device, x, dy, residual, "relu", groups, label=label)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp", torch.float64), ("images", torch.float32), ("images, channels_last", torch.bfloat16)],
    ids=str,
)
@each_epilogue
def test_epilogues(device, name, epilogue, dtype):
    activation, has_residual = EPILOGUES[epilogue]
    x, dy, residual = (formatted(sample(SHAPES[name], seed, dtype), name) for seed in range(3))
    for label, groups in groupings(len(x)):
        check_passes(device, x, dy, residual if has_residual else None, activation, groups, expanded=True, label=label)


@each_shape
def test_memory_format_is_the_twins(device, name):
    x = formatted(sample(SHAPES[name], 0), name)
    for _, groups in groupings(len(x)):
        affine = Affine(*torch.ones(4, groups.number, x.shape[1], dtype=torch.float64))
        y = kernels.normalize(*on(device, x, affine, groups))
        assert y.stride() == twin.normalize(x, affine, groups).stride()


def test_without_weight_and_bias(device):
    x, dy = (sample((4, 3, 5), seed) for seed in range(2))
    _, mean, var = moments(statistics.group_sums(x))
    affine, one = Affine(mean, torch.rsqrt(var)), Groups()
    x_on, dy_on, affine_on = on(device, x, dy, affine)
    for fused in (Epilogue(), Epilogue(None, "relu")):
        y = kernels.normalize(x_on, affine_on, one, fused)
        close(y, twin.normalize(x, affine, one, fused), x.dtype, "y")
        dz, rest, sums = kernels.backward_sums(dy_on, x_on, affine_on, one, fused)
        dx = kernels.grad_input(dz, x_on, affine_on, sums / 20, one, rest)
        dz, rest, sums = twin.backward_sums(dy, x, affine, one, fused)
        close(dx, twin.grad_input(dz, x, affine, sums / 20, one, rest), x.dtype, "dx")


@pytest.mark.parametrize("shape", [(64, 3), (1, 3, 50), (2, 3, 40, 41)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_far_from_zero(device, shape, channels_last):
    x, dy = sample(shape, 0, loc=1e4), sample(shape, 1)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    for groups in (Groups(), Groups(torch.arange(len(x)) % 2, 2)):
        count, mean, var = moments(kernels.group_sums(*on(device, x, groups)).cpu())
        truth = moments(statistics.group_sums(x.double(), groups))
        filled = count[:, 0] > 0
        torch.testing.assert_close(mean, truth[1], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(var[filled], truth[2][filled], rtol=1e-5, atol=0)
        affine = Affine(mean, torch.rsqrt(var + 1e-5), *scale_and_shift(groups.number, 3, False))
        y = kernels.normalize(*on(device, x, affine, groups))
        expected = twin.normalize(x.double(), affine, groups)
        torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-6, atol=1e-6)
        _, _, sums = kernels.backward_sums(*on(device, dy, x, affine, groups))
        _, _, expected = twin.backward_sums(dy.double(), x.double(), affine, groups)
        torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=1e-6 * count.max().item())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_values_show_where_they_are(device, bad):
    for name in ("mlp", "images", "images, channels_last"):
        x = formatted(sample(SHAPES[name], 0), name)
        x[1, 2] = bad
        for groups in (Groups(), Groups(torch.arange(len(x)) % 2, 2)):
            finite = torch.isfinite(kernels.group_sums(*on(device, x, groups))).cpu()
            c = x.shape[1]
            expected = torch.ones_like(finite)
            expected[-1, 1 + 2] = expected[-1, 1 + c + 2] = False
            assert torch.equal(finite, expected), name
    y = kernels.normalize(*on(device, x, Affine(*torch.ones(4, 1, 7).double())), Groups(), Epilogue(None, "relu"))
    assert torch.equal(torch.isnan(y.cpu()), torch.isnan(x))


# -- layouts -----------------------------------------------------------------------------------------------------------


def layouts(x):
    """The same values in other memory."""
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "channels of more", torch.cat((x, x), 1)[:, : x.shape[1]]
    yield "every other sample", torch.stack((x, x), 1)[:, 0]
    yield "sliced", torch.stack((x, x + 9), -1)[..., 0]
    yield "cropped", torch.cat((x, x), -1)[..., : x.shape[-1]]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "samples last", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


LAYOUTS = [name for name, _ in layouts(torch.zeros(2, 2, 2, 2))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(device, layout):
    base, dy, residual = (sample((4, 3, 5, 6), seed) for seed in range(3))
    x = dict(layouts(base))[layout]
    assert torch.equal(x, base)
    for label, groups in groupings(4):
        check_passes(device, x, dy, residual, "silu", groups, label=label)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "one plane"])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_layouts_of_the_others(device, name, layout):
    x, base, residual = (sample((4, 3, 5, 6), seed) for seed in range(3))
    x = formatted(x, name)
    if layout == "expanded":
        dy = residual = torch.tensor(1.5).expand(4, 3, 5, 6)
    elif layout == "one plane":
        dy = residual = sample((4, 3, 1, 1), 4).expand(4, 3, 5, 6)
    else:
        dy, residual = (dict(layouts(t))[layout] for t in (base, residual))
    check_passes(device, x, dy, None, "leaky_relu", Groups())
    check_passes(device, x, dy, residual, "leaky_relu", Groups(torch.tensor([2, 0, 2, 1]), 4))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4), (0, 0)], ids=str)
def test_empty_input(device, shape):
    x = sample(shape, 0).to(device)
    groups = torch.zeros(shape[0], dtype=torch.int64, device=device)
    for grouping in (Groups(), Groups(groups, 3)):
        sums = kernels.group_sums(x, grouping)
        assert torch.equal(sums, statistics.group_sums(x, grouping))
        affine = Affine(*torch.ones(4, grouping.number, shape[1], dtype=torch.float64, device=device))
        for fused in (Epilogue(), Epilogue(x, "relu")):
            assert kernels.normalize(x, affine, grouping, fused).shape == shape
            dz, rest, sums = kernels.backward_sums(x, x, affine, grouping, fused)
            assert torch.equal(sums, torch.zeros_like(sums))
            assert sums.shape == (grouping.number, 2, shape[1])
            assert kernels.grad_input(dz, x, affine, sums, grouping, rest).shape == dz.shape == shape
        finished = kernels.finish(kernels.group_sums(x, grouping), 1e-5)
        assert finished.mean.shape == (grouping.number, shape[1])


# -- the layers --------------------------------------------------------------------------------------------------------

LAYERS = {
    "sync": SyncBatchNorm,
    "cumulative": lambda c, **o: SyncBatchNorm(c, momentum=None, **o),
    "ghost": lambda c, **o: GhostBatchNorm(c, 2, **o),
    "ghost, total": lambda c, **o: GhostBatchNorm(c, 3, remainder="smaller", running_update="total", **o),
    "renorm": lambda c, **o: BatchRenorm(c, warmup_steps=0, r_ramp_end=4, d_ramp_end=4, **o),
    "renorm of ghosts": lambda c, **o: BatchRenorm(c, warmup_steps=0, d_ramp_end=4, ghost_batch_size=4, **o),
}


@pytest.mark.parametrize("name", ["mlp", "images", "images, channels_last"])
@pytest.mark.parametrize("local", [True, False], ids=["one call", "steps"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(device, make, local, name, monkeypatch):
    """Two steps of training, float64, against the same layer on the twins."""
    shape = (8, *SHAPES[name][1:])
    module = make(shape[1], dtype=torch.float64, activation="leaky_relu", negative_slope=SLOPE)
    twin_module, module = copy.deepcopy(module), module.to(device)
    ours = cuda() if local else cuda()._replace(batch_norm=None)
    for seed in range(2):
        x, dy, residual = (formatted(sample(shape, 3 * seed + i, torch.float64, loc=2.0), name) for i in range(3))
        results = []
        for layer, chosen, where in ((module, ours, device), (twin_module, REFERENCE, torch.device("cpu"))):
            with monkeypatch.context() as patch:
                patch.setattr("syncbn.kernels.dispatch._compiled", lambda x, k=chosen: k)
                leaves = [t.detach().to(where).requires_grad_() for t in (x, residual)]
                y = layer(*leaves)
                gradients = torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], dy.to(where))
                results.append([y, *gradients, *layer.buffers()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-9, atol=1e-9)
