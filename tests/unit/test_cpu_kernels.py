"""The CPU's kernels against their twins in float64, and against the promises that the twins keep."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import (
    EPILOGUES,
    affine_of,
    compiled,
    each_dtype,
    each_shape,
    groupings,
    passes,
    sample,
    tensors,
    tolerance,
)

from syncbn.functional import statistics
from syncbn.functional.epilogue import Epilogue
from syncbn.functional.statistics import Groups, moments
from syncbn.kernels import dispatch
from syncbn.kernels.cpu import build, library
from syncbn.kernels.dispatch import REFERENCE, pick

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def cpu():
    return compiled()


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loc", [0.0, 5.0, 1e4])
@each_dtype
@each_shape
def test_statistics(cpu, name, dtype, loc):
    if dtype in (torch.float16, torch.bfloat16) and loc > 100:
        pytest.skip("half precision does not resolve a standard deviation of 1 there")
    x, _ = tensors(name, dtype, loc)
    for label, groups in groupings(len(x)):
        found = moments(cpu.group_sums(x, groups))
        expected = moments(statistics.group_sums(x.double(), groups))
        assert torch.equal(found[0], expected[0]), label
        # float32 sums, one after the other, of up to 4,096 values about a centre that is not quite their mean; in units
        # of the standard deviation.
        bound = 1e-12 * max(1.0, loc) if dtype == torch.float64 else 6e-6
        close = {"rtol": 1e-12 if dtype == torch.float64 else 0, "msg": lambda m, n=label: f"{n}: {m}"}
        torch.testing.assert_close(found[1], expected[1], atol=bound, **close)
        # float64 on the wire: (mean / std)^2 times a few 1e-16, for groups of few values more
        torch.testing.assert_close(found[2], expected[2], atol=bound + loc**2 * 4e-15, **close)


@pytest.mark.parametrize("far", [slice(256), slice(None, None, 16)], ids=["the first", "each sixteenth"])
@pytest.mark.parametrize("size", [64, 8])
def test_values_that_are_worst_for_a_probe(cpu, size, far):
    """Those that a centre could be taken from are far away from the rest: the variance is largely that distance."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = sample((4, 8, size, size), 0, loc=1000.0)
        x.flatten(2)[..., far] = -500.0
        x = x.contiguous(memory_format=memory_format)
        _, mean, var = moments(cpu.group_sums(x, Groups()))
        torch.testing.assert_close(mean[0], x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(var[0], x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_values_show(cpu, bad):
    for name in ("images", "channels_last"):
        x, _ = tensors(name, torch.float32)
        x[1, 2, 3, 4] = bad
        sums = cpu.group_sums(x, Groups())
        assert not torch.isfinite(sums[0, 1 + 2])
        assert torch.isfinite(sums[0, 1])


def test_a_constant_channel_has_no_variance(cpu):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.full((4, 3, 30, 30), 3.3).contiguous(memory_format=memory_format)
        x[:, 1] = 0.0
        _, mean, var = moments(cpu.group_sums(x, Groups()))
        torch.testing.assert_close(mean[0], torch.tensor([x[0, 0, 0, 0], 0.0, x[0, 0, 0, 0]]).double())
        assert var.max() < 1e-12


# -- the elementwise step and its gradient -----------------------------------------------------------------------------


def check_passes(cpu, x, dy, epilogue):
    residual = None if epilogue.residual is None else epilogue.residual.double()
    for label, groups in groupings(len(x)):
        if x[0, 0].numel() == 1 and groups.number == len(x):
            continue  # one value has no variance, and an error of its own in the layers
        count, mean, var = moments(statistics.group_sums(x.double(), groups))
        affine = affine_of(mean, var, x.shape[1])
        found = passes(cpu, x, dy, groups, epilogue, affine, count)
        exact = epilogue._replace(residual=residual)
        expected = passes(REFERENCE, x.double(), dy.double(), groups, exact, affine, count)
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            close = tolerance(x.dtype, wide=40)
            if a is None:
                assert index == 1
                assert epilogue.residual is None
                continue
            if index == 2:  # sums over up to 25,000 terms, of dz as it was rounded
                close = {"rtol": close["rtol"], "atol": close["atol"] * max(8.0, x[:, 0].numel() ** 0.5)}
            else:
                assert a.dtype == x.dtype
            torch.testing.assert_close(a.double(), b, msg=lambda m, n=label, i=index: f"{n}, {i}: {m}", **close)
        assert found[0].stride() == found[3].stride() == x.stride()


@pytest.mark.parametrize("activation", EPILOGUES)
@each_dtype
@pytest.mark.parametrize("name", ["mlp", "images", "channels_last", "volumes, channels_last"])
def test_passes(cpu, name, dtype, activation):
    x, dy = tensors(name, dtype)
    kind, with_residual = EPILOGUES[activation]
    residual = sample(x.shape, 5, dtype) if with_residual else None  # contiguous, whatever x is
    check_passes(cpu, x, dy, Epilogue(residual, kind, 0.2))


@pytest.mark.parametrize("loc", [0.0, 3.0, 1e4])
@each_shape
def test_passes_over_other_shapes(cpu, name, loc):
    x, dy = tensors(name, torch.float32, loc)
    check_passes(cpu, x, dy, Epilogue(sample(x.shape, 5), "relu"))


def test_gradients_in_another_format(cpu):
    """What ``y.sum().backward()`` hands over is a single number, expanded; a permuted gradient is no rarity."""
    x, dy = tensors("channels_last", torch.float32)
    check_passes(cpu, x, dy.contiguous(), Epilogue())
    check_passes(cpu, x, torch.ones(()).expand(x.shape), Epilogue(None, "silu"))
    check_passes(cpu, x.contiguous(), dy, Epilogue())


def test_odd_memory(cpu):
    x = sample((6, 7, 9, 11, 2), 0)[..., 0]
    check_passes_of_values(cpu, x, sample(x.shape, 1))
    check_passes_of_values(cpu, x.transpose(2, 3), sample(x.transpose(2, 3).shape, 1))
    check_passes_of_values(cpu, sample((6, 1, 9, 1), 0).expand(6, 7, 9, 11), sample((6, 7, 9, 11), 1))


def check_passes_of_values(cpu, x, dy):
    count, mean, var = moments(cpu.group_sums(x, Groups()))
    affine = affine_of(mean, var, x.shape[1])
    found = passes(cpu, x, dy, Groups(), Epilogue(), affine, count)
    expected = passes(REFERENCE, x.contiguous().double(), dy.double(), Groups(), Epilogue(), affine, count)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4)], ids=str)
def test_empty(cpu, shape):
    x = torch.empty(shape)
    c = shape[1]
    sums = cpu.group_sums(x, Groups())
    assert torch.equal(sums, statistics.group_sums(x))
    affine = affine_of(torch.zeros(1, c).double(), torch.ones(1, c).double(), c)
    y, _, sums, grad = passes(cpu, x, x, Groups(), Epilogue(None, "relu"), affine, sums[:, :1])
    assert y.shape == grad.shape == shape
    assert not sums.any()


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_the_memory_is_poisoned():
    assert torch.empty(3).isnan().all()


def test_which_kernels_run():
    x = torch.ones(2, 3)
    assert pick(x, differentiable=False) is dispatch.cpu()
    assert pick(x, differentiable=True) is REFERENCE
    assert pick(x.to("meta"), differentiable=False) is REFERENCE
    transformed = torch.func.vmap(lambda t: torch.tensor(pick(t, differentiable=False) is REFERENCE))
    assert transformed(x).all()


def test_without_the_library(monkeypatch, caplog):
    """The twins serve, and one line says so and how to build the library."""
    monkeypatch.setattr(build, "library", lambda kind: Path("nowhere") / kind)
    monkeypatch.delitem(sys.modules, "syncbn.kernels.cpu.functions", raising=False)
    monkeypatch.delattr("syncbn.kernels.cpu.functions", raising=False)
    library.load.cache_clear()
    dispatch.cpu.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="syncbn"):
            assert pick(torch.ones(2, 3), differentiable=False) is REFERENCE
            assert pick(torch.ones(2, 3), differentiable=False) is REFERENCE
        assert [record.message.count("syncbn.kernels.cpu.build") for record in caplog.records] == [1]
    finally:
        library.load.cache_clear()
        dispatch.cpu.cache_clear()
