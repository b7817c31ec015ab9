"""The CPU's kernels against their twins in float64, and against the promises that the twins keep."""

from __future__ import annotations

import pytest
import torch

from syncbn.functional import finish as reference_finish
from syncbn.functional import normalize as reference
from syncbn.functional import stats
from syncbn.functional.epilogue import Epilogue
from syncbn.functional.finish import Limits, Running
from syncbn.functional.stats import moments
from syncbn.kernels import pick
from syncbn.kernels.rule import cpu_kernels

cpu = cpu_kernels()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
    "residual, silu": ("silu", True),
}


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
    yield "one", None, 1
    yield "equal runs", torch.arange(n) // (n // 2), 2
    yield "a group each", torch.arange(n), n
    yield "each its own, shuffled", torch.arange(n).flip(0), n
    yield "any, one empty", torch.arange(n) * 7 % 3 + (torch.arange(n) * 7 % 3 > 1), 4
    yield "runs, the last smaller", torch.arange(n) // (n - 2 + (n == 2)), 2


def tolerance(dtype, wide=8):
    """A few roundings in the arithmetic's dtype, and one to the result's own."""
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = max(torch.finfo(dtype).eps, wide * arithmetic)
    return {"rtol": eps, "atol": eps}


each_shape = pytest.mark.parametrize("name", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def affine(num_groups, c):
    generator = torch.Generator().manual_seed(9)
    scale, shift = torch.rand(2, num_groups, c, generator=generator, dtype=torch.float64)
    return scale + 0.5, shift - 0.5


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loc", [0.0, 5.0, 1e4])
@each_dtype
@each_shape
def test_statistics(name, dtype, loc):
    if dtype in (torch.float16, torch.bfloat16) and loc > 100:
        pytest.skip("half precision does not resolve a standard deviation of 1 there")
    x, _ = tensors(name, dtype, loc)
    for label, groups, number in groupings(len(x)):
        found = moments(cpu.group_sums(x, groups, number))
        expected = moments(stats.group_sums(x.double(), groups, number))
        assert torch.equal(found[0], expected[0]), label
        # float32 sums, one after the other, of up to 4,096 values about a centre that is not quite their mean; in units
        # of the standard deviation.
        bound = 1e-12 * max(1.0, loc) if dtype == torch.float64 else 6e-6
        close = {"rtol": 1e-12 if dtype == torch.float64 else 0, "msg": lambda m, n=label: f"{n}: {m}"}
        torch.testing.assert_close(found[1], expected[1], atol=bound, **close)
        # float64 on the wire: (mean / std)^2 times a few 1e-16, for groups of few values more
        torch.testing.assert_close(found[2], expected[2], atol=bound + loc**2 * 4e-15, **close)


def test_values_that_are_worst_for_a_probe():
    """The first 1/16 of each row is far away from the rest: the variance is largely that distance."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = sample((4, 8, 64, 64), 0, loc=1000.0).contiguous(memory_format=memory_format)
        x[:, :, :4] = -500.0
        _, mean, var = moments(cpu.group_sums(x))
        torch.testing.assert_close(mean[0], x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(var[0], x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_values_show(bad):
    for name in ("images", "channels_last"):
        x, _ = tensors(name, torch.float32)
        x[1, 2, 3, 4] = bad
        sums = cpu.group_sums(x)
        assert not torch.isfinite(sums[0, 1 + 2])
        assert torch.isfinite(sums[0, 1])


def test_a_constant_channel_has_no_variance():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.full((4, 3, 30, 30), 3.3).contiguous(memory_format=memory_format)
        x[:, 1] = 0.0
        _, mean, var = moments(cpu.group_sums(x))
        torch.testing.assert_close(mean[0], torch.tensor([x[0, 0, 0, 0], 0.0, x[0, 0, 0, 0]]).double())
        assert var.max() < 1e-12


# -- the elementwise step and its gradient -----------------------------------------------------------------------------


def passes(kernels, x, dy, groups, number, epilogue, statistics):
    """y, then dz, the sums and the gradient with respect to x."""
    mean, invstd, scale, shift, count = statistics
    y = kernels.normalize(x, mean, invstd, scale, shift, groups, epilogue)
    dz, rest, sums = kernels.backward_sums(dy, x, mean, invstd, scale, shift, groups, number, epilogue)
    means = sums * scale.unsqueeze(1) / count.clamp(min=1).unsqueeze(1)
    return y, dz, sums, kernels.grad_input(dz, x, mean, invstd, scale, shift, means, groups, rest)


def check_passes(x, dy, epilogue):
    residual = None if epilogue.residual is None else epilogue.residual.double()
    for label, groups, number in groupings(len(x)):
        if x[0, 0].numel() == 1 and number == len(x):
            continue  # one value has no variance, and an error of its own in the layers
        count, mean, var = moments(stats.group_sums(x.double(), groups, number))
        statistics = (mean, torch.rsqrt(var + 1e-5), *affine(number, x.shape[1]), count)
        found = passes(cpu, x, dy, groups, number, epilogue, statistics)
        expected = passes(
            reference, x.double(), dy.double(), groups, number, epilogue._replace(residual=residual), statistics
        )
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            close = tolerance(x.dtype, wide=40)
            if index == 2:  # sums over up to 25,000 terms, of dz as it was rounded
                close = {"rtol": close["rtol"], "atol": close["atol"] * max(8.0, x[:, 0].numel() ** 0.5)}
            else:
                assert a.dtype == x.dtype
            torch.testing.assert_close(a.double(), b, msg=lambda m, n=label, i=index: f"{n}, {i}: {m}", **close)
        assert found[0].stride() == found[3].stride() == x.stride()


@pytest.mark.parametrize("activation", EPILOGUES)
@each_dtype
@pytest.mark.parametrize("name", ["mlp", "images", "channels_last", "volumes, channels_last"])
def test_passes(name, dtype, activation):
    x, dy = tensors(name, dtype)
    kind, with_residual = EPILOGUES[activation]
    residual = sample(x.shape, 5, dtype) if with_residual else None  # contiguous, whatever x is
    check_passes(x, dy, Epilogue(residual, kind, 0.2))


@pytest.mark.parametrize("loc", [0.0, 3.0, 1e4])
@each_shape
def test_passes_over_other_shapes(name, loc):
    x, dy = tensors(name, torch.float32, loc)
    check_passes(x, dy, Epilogue(sample(x.shape, 5), "relu"))


@pytest.mark.parametrize("name", ["mlp", "images", "channels_last", "many blocks", "volumes, channels_last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@each_dtype
def test_backward_alone(name, dtype, activation):
    x, dy = tensors(name, dtype)
    epilogue = Epilogue(None, activation)
    count, mean, var = moments(stats.group_sums(x.double()))
    statistics = (mean, torch.rsqrt(var + 1e-5), *affine(1, x.shape[1]), count)
    dz, sums, grad = cpu.backward_alone(dy, x, *statistics[:4], epilogue)
    _, *expected = passes(reference, x.double(), dy.double(), None, 1, epilogue, statistics)
    close = tolerance(dtype, wide=40)
    torch.testing.assert_close(dz.double(), expected[0], **close)
    torch.testing.assert_close(grad.double(), expected[2], **close)
    assert grad.stride() == x.stride()
    close["atol"] *= max(8.0, x[:, 0].numel() ** 0.5)
    torch.testing.assert_close(sums, expected[1], **close)


def test_gradients_in_another_format():
    """What ``y.sum().backward()`` hands over is a single number, expanded; a permuted gradient is no rarity."""
    x, dy = tensors("channels_last", torch.float32)
    check_passes(x, dy.contiguous(), Epilogue())
    check_passes(x, torch.ones(()).expand(x.shape), Epilogue(None, "silu"))
    check_passes(x.contiguous(), dy, Epilogue())


def test_odd_memory():
    x = sample((6, 7, 9, 11, 2), 0)[..., 0]
    check_passes_of_values(x, sample(x.shape, 1))
    check_passes_of_values(x.transpose(2, 3), sample(x.transpose(2, 3).shape, 1))
    check_passes_of_values(sample((6, 1, 9, 1), 0).expand(6, 7, 9, 11), sample((6, 7, 9, 11), 1))


def check_passes_of_values(x, dy):
    count, mean, var = moments(cpu.group_sums(x))
    statistics = (mean, torch.rsqrt(var + 1e-5), *affine(1, x.shape[1]), count)
    found = passes(cpu, x, dy, None, 1, Epilogue(), statistics)
    expected = passes(reference, x.contiguous().double(), dy.double(), None, 1, Epilogue(), statistics)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4)], ids=str)
def test_empty(shape):
    x = torch.empty(shape)
    c = shape[1]
    sums = cpu.group_sums(x)
    assert torch.equal(sums, stats.group_sums(x))
    statistics = (torch.zeros(1, c).double(), torch.ones(1, c).double(), *affine(1, c), sums[:, :1])
    y, _, sums, grad = passes(cpu, x, x, None, 1, Epilogue(None, "relu"), statistics)
    assert y.shape == grad.shape == shape
    assert not sums.any()


# -- the small step ----------------------------------------------------------------------------------------------------


def running(momentum, mode="mean", divisor=None, dtype=torch.float32):
    mean, var = torch.tensor([0.5, -1.0, 2.0], dtype=dtype), torch.tensor([1.0, 0.3, 4.0], dtype=dtype)
    return Running(mean, var, torch.tensor(3), torch.tensor(0), momentum, mode, divisor)


@pytest.mark.parametrize("case", ["plain", "small", "large", "infinite", "nan", "overflow", "empty"])
@pytest.mark.parametrize("limits", [None, Limits(3.0, 5.0, 0, 6, 6)], ids=["plain", "renorm"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("mode", ["mean", "sequential", "total"])
@pytest.mark.parametrize("divisor", [None, 2.5])
@pytest.mark.parametrize("number", [1, 3])
def test_finish(case, limits, momentum, mode, divisor, number):
    groups = torch.arange(6) // 2 if number == 3 else None
    x = sample((6, 3, 4), 0, torch.float64, loc=2.0)
    x *= {"small": 1e-3, "large": 1e14, "overflow": 1e25}.get(case, 1.0)
    if case in ("infinite", "nan"):
        x[0, 1, 0] = float("inf") if case == "infinite" else float("nan")
    kept = 0 if case == "empty" else len(x)
    sums = stats.group_sums(x[:kept], None if groups is None else groups[:kept], number)
    ours, theirs = running(momentum, mode, divisor), running(momentum, mode, divisor)
    found = cpu.finish(sums, 1e-5, ours, limits)
    expected = reference_finish.finish(sums, 1e-5, theirs, limits)
    for name in ("count", "mean", "var", "invstd", "r", "d"):
        # float64 throughout, in another order.
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-13, atol=1e-13, equal_nan=True
        )
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-7)  # one rounding to the buffer's float32


def test_finish_without_update():
    ours = running(0.1)
    cpu.finish(stats.group_sums(sample((6, 3, 4), 0)), 1e-5, ours, None, update=False)
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], running(0.1)[:4], strict=True))


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_the_memory_is_poisoned():
    assert torch.empty(3).isnan().all()


def test_which_kernels_run():
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert pick(x).name == "cpu"
        assert torch.func.vmap(lambda t: torch.tensor(pick(t).name == "reference"))(x).all()
        assert pick(x.to("meta")).name == "reference"
    assert pick(x).name == "reference"  # derivatives are recorded
