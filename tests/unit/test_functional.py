"""Statistics, running statistics and renorm's limits against float64 torch on the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from syncbn.functional.normalize import Affine, backward_sums, grad_input, normalize
from syncbn.functional.renorm import Limits, correction_limits, corrections, ramp
from syncbn.functional.running import Running, update_running
from syncbn.functional.statistics import Groups, group_sums, moments

# Sums of some hundred float64 terms, taken in two orders.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

SHAPES = [(64, 3), (1, 3, 50), (7, 3, 1, 1), (16, 3, 5, 7), (1, 3, 32, 32), (4, 3, 3, 4, 5), (2, 3, 2, 3, 2, 4)]


def sample(shape, loc=0.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + loc).to(dtype)


def truth(x):
    """Mean and biased variance of each channel: two passes in float64."""
    dims = [d for d in range(x.dim()) if d != 1]
    return x.double().mean(dims), x.double().var(dims, correction=0)


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loc", [0.0, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variance_of_float32_far_from_zero(shape, loc):
    x = sample(shape, loc, torch.float32)
    count, mean, var = moments(group_sums(x))
    expected_mean, expected_var = truth(x)
    assert count.item() == x.numel() / 3
    torch.testing.assert_close(mean[0], expected_mean, rtol=1e-9, atol=1e-6)
    # float32 sums of squared deviations lose some 1e-7; (mean/std)^2 * 1e-16 is the wire's part, 1e-6 at 1e5.
    torch.testing.assert_close(var[0], expected_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "loc"), [(torch.float16, 100.0), (torch.bfloat16, 10.0)], ids=str)
def test_variance_of_half_precision(dtype, loc):
    # Far more elements than float16 counts (2048) or sums (65504) without loss.
    x = sample((8, 3, 40, 40), loc, dtype)
    count, mean, var = moments(group_sums(x))
    expected_mean, expected_var = truth(x)
    assert count.item() == 8 * 1600
    torch.testing.assert_close(mean[0], expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var[0], expected_var, rtol=1e-5, atol=0)


def layouts(x):
    """The same values in other memory: what a model may hand to a layer."""
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "sliced", torch.stack((x, x + 9), -1)[..., 0]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "samples last", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.parametrize("name", ["channels_last", "sliced", "transposed", "samples last"])
def test_memory_layout_does_not_matter(name):
    x = sample((4, 3, 5, 6), 1e4, torch.float32)
    other = dict(layouts(x))[name]
    assert other.stride() != x.stride()
    assert torch.equal(other, x)
    _, mean, var = moments(group_sums(other))
    torch.testing.assert_close(mean[0], truth(x)[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(var[0], truth(x)[1], rtol=1e-5, atol=0)


def test_expanded_input():
    x = sample((4, 1, 5, 1)).expand(4, 3, 5, 6)
    _, mean, var = moments(group_sums(x))
    for ours, expected in zip((mean[0], var[0]), truth(x), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (0, 3, 0)], ids=str)
def test_empty_batch_is_zeros(shape):
    sums = group_sums(torch.empty(shape))
    assert sums.dtype == torch.float64
    assert torch.equal(sums, torch.zeros(1, 7, dtype=torch.float64))
    assert all(torch.equal(m, torch.zeros_like(m)) for m in moments(sums))


def test_no_channels():
    count, mean, _ = moments(group_sums(torch.empty(2, 0, 4)))
    assert count.item() == 8
    assert mean.shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [[0, 12], [1, 11], [5, 0, 7], [1] * 12, [3, 4, 5]], ids=str)
def test_sums_of_parts_add_up(cuts, dtype):
    x = sample((12, 3, 4, 5), 10.0, dtype)
    parts = sum(group_sums(part) for part in x.split(cuts))
    # A sample's sums do not depend on its neighbours, whatever the dtype: only the order of float64 additions differs.
    torch.testing.assert_close(parts, group_sums(x), **EXACT)


def test_parts_of_an_image_add_up():
    x = sample((6, 3, 9, 5), 10.0)
    parts = group_sums(x[:, :, :2]) + group_sums(x[:, :, 2:])
    torch.testing.assert_close(parts, group_sums(x), **EXACT)


@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 4, 5)], ids=str)
def test_groups_by_index_in_any_order(shape):
    x = sample(shape, 5.0)
    groups = torch.tensor([2, 0, 0, 4, 2, 0, 1, 4, 2])
    merged = group_sums(x, Groups(groups, 5))
    for group in range(5):
        torch.testing.assert_close(merged[group : group + 1], group_sums(x[groups == group]), **EXACT)
    assert torch.equal(merged[3], torch.zeros(7, dtype=torch.float64))  # a group without samples
    order = torch.tensor([8, 1, 6, 0, 3, 7, 5, 2, 4])
    torch.testing.assert_close(group_sums(x[order], Groups(groups[order], 5)), merged, **EXACT)


# -- the elementwise step ----------------------------------------------------------------------------------------------


def autograd_truth(x, dy, weight, bias, eps=1e-5):
    """Output and input gradient of batch normalization in float64, written with mean and var alone."""
    wide = x.double().requires_grad_()
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, keepdim=True, correction=0)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    y = (wide - mean) / torch.sqrt(var + eps) * weight.reshape(shape) + bias.reshape(shape)
    return y.detach(), torch.autograd.grad(y, wide, dy.double())[0]


@pytest.mark.parametrize("loc", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(32, 3), (8, 3, 5, 5)], ids=str)
def test_normalize_and_gradient_in_float32_far_from_zero(shape, loc):
    x, dy = sample(shape, loc, torch.float32), sample(shape, dtype=torch.float32, seed=1)
    weight, bias = torch.tensor([[0.5, 1.0, 2.0]]).double(), torch.tensor([[1.0, 0.0, -1.0]]).double()
    count, mean, var = moments(group_sums(x))
    affine = Affine(mean, torch.rsqrt(var + 1e-5), weight, bias)
    y = normalize(x, affine)
    dz, rest, sums = backward_sums(dy, x, affine)
    assert dz is dy
    assert not rest
    dx = grad_input(dy, x, affine, weight * sums / count)
    expected_y, expected_dx = autograd_truth(x, dy, weight, bias)
    # Values of at most some 8 after two or three float32 roundings of 6e-8 each, wherever the input lies.
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-6, atol=2e-6)


# -- running statistics ------------------------------------------------------------------------------------------------


def buffers(dtype=torch.float64):
    return (
        torch.tensor([0.5, -1.0, 2.0], dtype=dtype),
        torch.tensor([1.0, 0.3, 4.0], dtype=dtype),
        torch.tensor(0),
        torch.tensor(0),
    )


def batchnorm(momentum):
    layer = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    layer.running_mean, layer.running_var = buffers()[:2]
    return layer


def check_buffers(state, layer):
    torch.testing.assert_close(state[0], layer.running_mean, **EXACT)
    torch.testing.assert_close(state[1], layer.running_var, **EXACT)


STEPS = [[3, 2, 4], [1, 5], [4, 4, 4]]
"""Sizes of the groups in each of three steps."""


def step_statistics(sizes, seed):
    x = sample((sum(sizes), 3, 2, 2), 3.0, seed=seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return x.split(sizes), moments(group_sums(x, Groups(groups, len(sizes))))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_sequential_update_is_batchnorm_on_each_group_in_turn(momentum):
    state, layer = buffers(), batchnorm(momentum)
    for seed, sizes in enumerate(STEPS):
        chunks, statistics = step_statistics(sizes, seed)
        update_running(Running(*state, momentum, "sequential"), *statistics)
        for chunk in chunks:
            layer(chunk)
        check_buffers(state, layer)
    assert state[2] == layer.num_batches_tracked == 8


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_mean_update_is_the_mean_of_batchnorms_on_one_group_each(momentum):
    state, layer = buffers(), batchnorm(momentum)
    for seed, sizes in enumerate(STEPS):
        chunks, statistics = step_statistics(sizes, seed)
        update_running(Running(*state, momentum, "mean"), *statistics)
        replicas = [copy.deepcopy(layer) for _ in chunks]
        for replica, chunk in zip(replicas, chunks, strict=True):
            replica(chunk)
        layer.running_mean = torch.stack([r.running_mean for r in replicas]).mean(0)
        layer.running_var = torch.stack([r.running_var for r in replicas]).mean(0)
        layer.num_batches_tracked += 1
        check_buffers(state, layer)
    assert state[2] == 3


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_total_update_is_batchnorm_on_the_whole_batch(momentum):
    state, layer = buffers(), batchnorm(momentum)
    for seed, sizes in enumerate(STEPS):
        chunks, statistics = step_statistics(sizes, seed)
        update_running(Running(*state, momentum, "total"), *statistics)
        layer(torch.cat(chunks))
        check_buffers(state, layer)
    assert state[2] == layer.num_batches_tracked == 3


@pytest.mark.parametrize("mode", ["mean", "sequential", "total"])
def test_groups_without_samples_do_not_count(mode):
    plain, padded = buffers(), buffers()
    chunks, statistics = step_statistics([3, 2, 4], 0)
    groups = torch.repeat_interleave(torch.tensor([1, 3, 4]), torch.tensor([3, 2, 4]))
    update_running(Running(*plain, 0.1, mode), *statistics)
    update_running(Running(*padded, 0.1, mode), *moments(group_sums(torch.cat(chunks), Groups(groups, 6))))
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_divisor_makes_the_mean_over_processes_the_mean_over_groups():
    """Five groups on three processes, three, two and none: each divides by 5/3."""
    together = buffers()
    _, (count, mean, var) = step_statistics([3, 2, 4, 1, 2], 0)
    update_running(Running(*together, 0.1), count, mean, var)
    states = []
    for rows in (slice(0, 3), slice(3, 5), slice(5, 5)):
        states.append(buffers())
        update_running(Running(*states[-1], 0.1, divisor=5 / 3), count[rows], mean[rows], var[rows])
    for index in range(3):
        values = torch.stack([state[index] for state in states]).double()
        torch.testing.assert_close(values.mean(0), together[index].double(), **EXACT)


@pytest.mark.parametrize("mode", ["mean", "sequential", "total"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e25], ids=str)
def test_nonfinite_statistics_are_counted_and_kept_out(bad, dtype, mode):
    x = sample((6, 3, 2, 2))
    x[4, 1, 0, 0] = bad
    state = buffers(dtype)
    before = [b.clone() for b in state]
    groups = torch.arange(6) // 3
    update_running(Running(*state, 0.1, mode), *moments(group_sums(x, Groups(groups, 2))))
    if bad == 1e25 and dtype == torch.float64:  # its square fits, in a buffer of this width
        assert state[2] > 0
        assert torch.isfinite(state[1]).all()
        return
    assert all(torch.equal(a, b) for a, b in zip(state[:3], before[:3], strict=True))
    assert state[3] == 1


@pytest.mark.parametrize("mode", ["mean", "sequential", "total"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_step_without_samples_changes_nothing(mode, momentum):
    state = buffers()
    groups = Groups(torch.empty(0, dtype=torch.int64), 2)
    update_running(Running(*state, momentum, mode), *moments(group_sums(torch.empty(0, 3, 2), groups)))
    assert all(torch.equal(a, b) for a, b in zip(state, buffers(), strict=True))


# -- renorm ------------------------------------------------------------------------------------------------------------


def test_limits_of_the_paper():
    expected = {
        0: (1, 0),
        5_000: (1, 0),
        10_000: (1 + 2 / 7, 1.25),
        15_000: (1 + 4 / 7, 2.5),
        25_000: (1 + 8 / 7, 5),
        39_999: (1 + 2 * 34_999 / 35_000, 5),
        40_000: (3, 5),
        10**12: (3, 5),
    }
    for steps, limits in expected.items():
        found = correction_limits(torch.tensor(steps), Limits(3.0, 5.0, 5_000, 40_000, 25_000))
        assert [v.item() for v in found] == pytest.approx(limits, rel=1e-15)


@pytest.mark.parametrize(
    ("start", "end", "values"),
    [(0, 4, [0, 0.25, 0.5, 0.75, 1, 1]), (2, 3, [0, 0, 0, 1, 1, 1]), (2, 2, [0, 0, 1, 1, 1, 1]), (0, 0, [1] * 6)],
    ids=str,
)
def test_ramp(start, end, values):
    assert [ramp(torch.tensor(step), start, end).item() for step in range(6)] == values


def test_corrections_are_clipped_on_both_sides():
    mean = torch.tensor([[0.5, -9.0, 9.0, 0.0]], dtype=torch.float64)
    var = torch.tensor([[1.44, 100.0, 0.01, 1.0]], dtype=torch.float64)
    zeros, ones = torch.zeros(4), torch.ones(4)
    limit = [torch.tensor(v, dtype=torch.float64) for v in (3.0, 5.0)]
    r, d = corrections(mean, var, zeros, ones, 0.0, *limit)
    assert r[0].tolist() == pytest.approx([1.2, 3.0, 1 / 3, 1.0], rel=1e-15)
    assert d[0].tolist() == [0.5, -5.0, 5.0, 0.0]


def test_eps_is_inside_the_root():
    var, running = torch.tensor([[0.5]]).double(), torch.tensor([1.5])
    limit = [torch.tensor(v, dtype=torch.float64) for v in (10.0, 10.0)]
    r, d = corrections(torch.ones(1, 1).double(), var, torch.zeros(1), running, 0.5, *limit)
    assert r.item() == pytest.approx((1.0 / 2.0) ** 0.5, rel=1e-15)
    assert d.item() == pytest.approx(1 / 2.0**0.5, rel=1e-15)
