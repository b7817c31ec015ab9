"""Tests of Triton's ``finish`` against its twin, to be imported as those of ``triton_cases.py`` are."""

from __future__ import annotations

import pytest
import torch
from triton_cases import kernels, sample

from syncbn.functional import finish as finish_twin
from syncbn.functional import statistics
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running
from syncbn.functional.statistics import Groups


def buffers(c, device, dtype=torch.float32):
    var = sample((c,), 8, dtype).square() + 0.5
    return [t.to(device) for t in (sample((c,), 7, dtype), var, torch.tensor(6), torch.tensor(2))]


def check_finish(device, sums, rule=(0.1,), limits=None, update=True, dtype=torch.float32, eps=1e-5):
    """The results and the buffers, against the twin on the CPU; r and d are from the buffers as they were."""
    c = (sums.shape[1] - 1) // 2
    ours, theirs = buffers(c, device, dtype), buffers(c, "cpu", dtype)
    options = {"limits": limits, "update": update}
    found = kernels.finish(sums.to(device), eps, Running(*ours, *rule, **options))
    expected = finish_twin.finish(sums, eps, Running(*theirs, *rule, **options))
    for name in ("count", "mean", "var", "invstd", "r", "d"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-13, equal_nan=True, msg=lambda m, n=name: n + m)
    for a, b in zip(ours, theirs, strict=True):
        # A few float64 roundings, magnified where differences are small, and the one to the buffer's dtype.
        torch.testing.assert_close(a.cpu(), b, rtol=max(1e-12, 2 * torch.finfo(dtype).eps), atol=0)
    return [t.cpu() for t in ours]


def some_sums(sizes, c):
    """Of groups of these sizes."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return statistics.group_sums(sample((sum(sizes), c, 3), 5, torch.float64, loc=1.0), Groups(groups, len(sizes)))


RULES = {"momentum": (0.1,), "last": (1.0,), "cumulative": (None,), "divisor": (0.3, "mean", 3.5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("sizes", "c"), [([5], 3), ([3, 0, 1, 4], 70), ([2] * 33, 65), ([2] * 3, 1100)], ids=str)
def test_finish(device, sizes, c, rule, dtype, monkeypatch):
    for most in (16, 0):  # in one launch and in two
        monkeypatch.setattr(kernels, "_FINISH_ALONE", most)
        for limits in (None, Limits(3.0, 5.0, 2, 11, 9)):
            check_finish(device, some_sums(sizes, c), RULES[rule], limits, dtype=dtype)
    state = check_finish(device, some_sums(sizes, c), RULES[rule], update=False, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(state, buffers(c, "cpu", dtype), strict=True))


@pytest.mark.parametrize("start", [0, 5, 6, 7, 10])
def test_ramps(device, start):
    """At 6 steps: before, at and after the start, with ends before, at and after."""
    for r_end, d_end in ((0, 100), (6, 7), (7, 6), (12, 5)):
        check_finish(device, some_sums([5], 3), limits=Limits(1.5, 0.3, start, r_end, d_end))


@pytest.mark.parametrize("mode", ["sequential", "total"])
def test_finish_of_other_modes(device, mode):
    check_finish(device, some_sums([3, 0, 2], 4), (0.1, mode))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e60])
@pytest.mark.parametrize("column", [1, 4])
def test_finish_of_a_nonfinite_batch(device, bad, column, monkeypatch):
    for most in (16, 0):
        monkeypatch.setattr(kernels, "_FINISH_ALONE", most)
        sums = some_sums([3, 2], 3)
        sums[1, column] = bad  # 1e60 is finite until it is a float32
        state = check_finish(device, sums)
        assert [t.item() for t in state[2:]] == [6, 3]


def test_finish_without_samples(device):
    sums = torch.zeros(2, 7, dtype=torch.float64)
    assert [t.item() for t in check_finish(device, sums)[2:]] == [6, 2]
    # With a divisor the other processes have some.
    assert [t.item() for t in check_finish(device, sums, (0.1, "mean", 2.0))[2:]] == [7, 2]


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1e-12])
def test_eps_and_momentum_are_float64(device, eps):
    check_finish(device, some_sums([3], 2), (1 / 3,), dtype=torch.float64, eps=eps)
