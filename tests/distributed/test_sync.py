"""Synchronized layers on real processes against float64 nn.BatchNorm on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
from layer_jobs import Case, check_against, reference, train_layer

# float64 with |mean|/std up to 10: the statistics lose (mean/std)^2 * 1e-16, so 1e-12 leaves two digits for summation.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

SPLITS = [(8,), (4, 4), (7, 1), (0, 6), (5, 0), (3, 2, 4), (0, 0, 5), (2, 2, 2, 2), (1, 5, 0, 3), (0, 1, 1, 0)]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.fault(
    "data",
    "ranks with batches of different sizes, or none",
    moment="in training",
    outcome="the result of one process on the whole batch",
    lost="nothing",
)
def test_ragged_and_empty_ranks(pools, sizes):
    case = Case("SyncBatchNorm", sizes)
    check_against(pools(len(sizes)).run(train_layer, case), reference(case), **EXACT)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((6,), False),
        ((5, 7), False),
        ((3, 4, 5), False),
        ((3, 4, 5), True),
        ((2, 3, 4, 2), False),
        ((2, 3, 4, 2), True),
    ],
    ids=str,
)
def test_any_rank_and_memory_format(pools, world, shape, channels_last):
    case = Case("SyncBatchNorm", (5, 3, 0, 4)[:world], shape=shape, channels_last=channels_last)
    check_against(pools(world).run(train_layer, case), reference(case), **EXACT)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
def test_options_of_batchnorm(pools, options):
    case = Case("SyncBatchNorm", (3, 0, 4), options)
    check_against(pools(3).run(train_layer, case), reference(case), **EXACT)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs(pools, dtype, autocast):
    case = Case("SyncBatchNorm", (4, 0, 3), dtype=dtype, autocast=autocast)
    results = pools(3).run(train_layer, case)
    # The arithmetic is float32 with exact statistics: a few float32 roundings, then one to the output's own dtype (its
    # eps, relative) whatever the dtype. The gradient's terms may cancel, hence the same bound absolutely.
    eps = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    check_against(results, reference(case), rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((6,), False), ((3, 40, 41), False), ((3, 40, 41), True)], ids=str
)
def test_means_near_zero(pools, shape, channels_last, dtype):
    """Where the mean is not far from zero the elementwise step is one multiplication and addition."""
    case = Case("SyncBatchNorm", (4, 0, 3), shape=shape, channels_last=channels_last, dtype=dtype, loc=1.0)
    # float32: sums of up to 4,096 values one after the other, and a few roundings.
    bound = EXACT if dtype == torch.float64 else {"rtol": 5e-6, "atol": 5e-6}
    check_against(pools(3).run(train_layer, case), reference(case), **bound)


@pytest.mark.parametrize("loc", [1.0, 10.0])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_residual_and_activation(pools, activation, residual, loc):
    case = Case("SyncBatchNorm", (3, 0, 2), {"activation": activation}, residual=residual, loc=loc)
    check_against(pools(3).run(train_layer, case), reference(case), **EXACT)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_keeping_the_output_alone(pools, activation):
    case = Case("SyncBatchNorm", (3, 0, 2), {"save": "output", "activation": activation}, loc=1.0)
    # xhat is had from the output: (1 + |bias|) / |weight| roundings, and a slope's hundred.
    check_against(pools(3).run(train_layer, case), reference(case), rtol=1e-10, atol=1e-10)


def mixed_dtypes(sizes):
    """Autocast may hand a half-precision batch to one rank and a float32 one (an empty one, say) to another."""
    import torch.distributed as dist

    case = Case("SyncBatchNorm", sizes, dtype=torch.bfloat16 if dist.get_rank() % 2 else torch.float32)
    return {k: v for k, v in train_layer(case).items() if k == "buffers"}


def test_ranks_may_differ_in_dtype(pools):
    first, second = (r["buffers"] for r in pools(2).run(mixed_dtypes, (4, 4)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_groups_of_consecutive_ranks(pools):
    sizes = (2, 3, 1, 4)
    results = pools(4).run(train_layer, Case("SyncBatchNorm", sizes, {"sync_group_size": 2}))
    for pair in ((0, 2), (2, 4)):
        truth = _reference_of_part(Case("SyncBatchNorm", sizes), *pair)
        check_against(results[slice(*pair)], truth, **EXACT)


def test_group_given_as_ranks(pools):
    sizes = (2, 3, 1, 4)
    results = pools(4).run(train_in_group, Case("SyncBatchNorm", sizes), [[0, 3], [1, 2]])
    together = torch.cat([results[0]["y"][0], results[3]["y"][0]])
    spread = together.var((0, 2, 3), correction=0)
    weight = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
    torch.testing.assert_close(spread, weight.square(), rtol=1e-4, atol=0)
    assert not torch.allclose(results[0]["buffers"]["running_mean"], results[1]["buffers"]["running_mean"])
    assert torch.equal(results[0]["buffers"]["running_mean"], results[3]["buffers"]["running_mean"])


def train_in_group(case, groups):
    import torch.distributed as dist

    handles = [dist.new_group(ranks) for ranks in groups]
    mine = next(h for h, ranks in zip(handles, groups, strict=True) if dist.get_rank() in ranks)
    return train_layer(Case(case.layer, case.sizes, {"process_group": mine}))


def _reference_of_part(case, first, last):
    """The truth where only ranks first..last-1 share statistics, on their own rows of the whole batch."""
    import layer_jobs

    whole = layer_jobs.batch
    rows = slice(sum(case.sizes[:first]), sum(case.sizes[:last]))
    try:
        layer_jobs.batch = lambda c, step: tuple(t[rows] for t in whole(c, step))
        return reference(case)
    finally:
        layer_jobs.batch = whole
