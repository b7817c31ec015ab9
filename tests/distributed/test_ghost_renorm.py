"""Synchronized ghost batches and synchronized renorm on real processes, against one process with the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from layer_jobs import Case, batch, batchnorm, check_against, reference, set_affine, train_layer

import syncbn
from syncbn.collectives import max_over_ranks

# As in test_sync: exact but for summation.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def ghost_index(case):
    """Ghost group of each sample of the whole batch: each rank counts its own samples."""
    return torch.cat([torch.arange(size) // case.options["ghost_batch_size"] for size in case.sizes])


def loop_over_groups(case):
    """nn.BatchNorm on group 0 of all ranks, then on group 1 of all ranks, and so on."""
    update = case.options.get("running_update", "mean")
    layer, index = batchnorm(case), ghost_index(case)
    outputs, gradients = [], []
    for step in range(case.steps):
        x, dy = batch(case, step)
        y, dx, before, after = torch.empty_like(x), torch.empty_like(x), copy.deepcopy(layer.state_dict()), []
        for group in index.unique():
            if update != "sequential":
                layer.load_state_dict(before)
            rows = x[index == group].requires_grad_()
            output = layer(rows)
            output.backward(dy[index == group])
            y[index == group], dx[index == group] = output.detach(), rows.grad
            after.append(copy.deepcopy(layer.state_dict()))
        if update == "mean":
            layer.load_state_dict({k: torch.stack([s[k].double() for s in after]).mean(0) for k in before})
        if update == "total":
            layer.load_state_dict(before)
            layer(x)
        outputs.append(y)
        gradients.append(dx)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": outputs, "dx": gradients, "grad": grads, "buffers": dict(layer.named_buffers())}


SPLITS = [
    ((4, 4), "error"),
    ((6, 2), "error"),  # a rank with fewer groups
    ((4, 0, 6), "error"),  # and one with none
    ((5, 4, 3), "smaller"),
    ((3, 0, 5, 2), "smaller"),
    ((2, 2, 2, 2), "error"),
]


@pytest.mark.parametrize("options", [{}, {"max_ghost_groups": 5}], ids=["agreed", "given"])
@pytest.mark.parametrize(("sizes", "remainder"), SPLITS, ids=str)
def test_group_i_is_merged_with_group_i_of_the_others(pools, sizes, remainder, options):
    options = {"ghost_batch_size": 2, "remainder": remainder, "sync": True, **options}
    case = Case("GhostBatchNorm", sizes, options)
    check_against(pools(len(sizes)).run(train_layer, case), loop_over_groups(case), **EXACT)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("update", ["sequential", "mean", "total"])
def test_running_statistics(pools, update, momentum):
    options = {"ghost_batch_size": 2, "sync": True, "running_update": update, "momentum": momentum}
    case = Case("GhostBatchNorm", (6, 0, 4), options, channels_last=True)
    check_against(pools(3).run(train_layer, case), loop_over_groups(case), **EXACT)


def test_without_sync_each_rank_is_alone(pools):
    options = {"ghost_batch_size": 2, "remainder": "smaller"}
    case = Case("GhostBatchNorm", (5, 4), options, loc=3.0)
    alone = [Case("GhostBatchNorm", (5,), options, loc=3.0), Case("GhostBatchNorm", (4,), options, loc=3.0)]
    first, second = pools(2).run(train_layer, case)
    rows = [slice(0, 5), slice(5, 9)]
    for result, part, own in zip((first, second), rows, alone, strict=True):
        layer = syncbn.GhostBatchNorm(3, **options, dtype=torch.float64)
        set_affine(layer, torch.float64)
        for step in range(own.steps):
            y = layer(batch(case, step)[0][part])
        torch.testing.assert_close(result["y"][-1], y.detach(), **EXACT)
        torch.testing.assert_close(result["buffers"]["running_var"], layer.running_var, **EXACT)


RENORM = {"r_max": 1.5, "d_max": 1.0, "warmup_steps": 1, "r_ramp_end": 6, "d_ramp_end": 4, "momentum": 0.2}


@pytest.mark.parametrize("sizes", [(4, 4), (7, 1), (3, 0, 5), (1, 2, 3), (0, 3, 1, 2)], ids=str)
def test_renorm_of_synchronized_statistics(pools, sizes):
    case = Case("BatchRenorm", sizes, {**RENORM, "sync": True}, steps=9, loc=2.0)
    single = syncbn.BatchRenorm(3, **RENORM, dtype=torch.float64)
    set_affine(single, torch.float64)
    truth = reference(case, single)
    check_against(pools(len(sizes)).run(train_layer, case), truth, **EXACT)
    plain = reference(Case("BatchRenorm", sizes, steps=9, loc=2.0))
    assert (truth["y"][-1] - plain["y"][-1]).abs().max() > 0.1, "the corrections should matter here"


@pytest.mark.parametrize("sizes", [(4, 4), (5, 0, 3)], ids=str)
def test_renorm_of_synchronized_ghost_batches(pools, sizes):
    ghosts = {"ghost_batch_size": 2, "remainder": "smaller"}
    case = Case("BatchRenorm", sizes, {**RENORM, **ghosts, "sync": True}, steps=9, loc=2.0)
    single = syncbn.BatchRenorm(3, **RENORM, dtype=torch.float64)
    set_affine(single, torch.float64)
    index = ghost_index(case)
    single.sample_groups = syncbn.layers.SampleGroups(index, int(index.max()) + 1)
    check_against(pools(len(sizes)).run(train_layer, case), reference(case, single), **EXACT)


# -- how many groups travel --------------------------------------------------------------------------------------------


def count_agreements(sizes):
    """Train on batches of other sizes after the first; how often the ranks agreed on a number, and on which."""
    import syncbn.layers as base

    calls = []
    try:
        base.max_over_ranks = lambda *args: calls.append(args) or max_over_ranks(*args)
        layer = syncbn.GhostBatchNorm(3, 2, sync=True)
        for size in sizes[dist.get_rank()]:
            layer(torch.randn(size, 3, 4))
    finally:
        base.max_over_ranks = max_over_ranks
    return len(calls), layer._agreed_groups


def test_the_ranks_agree_once(pools):
    results = pools(3).run(count_agreements, [(2, 4, 2), (6, 2, 0), (0, 0, 6)])
    assert results == [(1, 3)] * 3


def exceed(options):
    """The second batch has more groups, on all ranks."""
    layer = syncbn.GhostBatchNorm(3, 2, sync=True, **options)
    layer(torch.randn(4, 3, 4))
    try:
        layer(torch.randn(6, 3, 4))
    except ValueError as error:
        layer(torch.randn(2, 3, 4))  # and the layer goes on
        return str(error)


@pytest.mark.parametrize("options", [{}, {"max_ghost_groups": 2}], ids=["agreed", "given"])
def test_more_groups_than_agreed(pools, options):
    for message in pools(2).run(exceed, options):
        for part in ["GhostBatchNorm", "(6, 3, 4)", "3 ghost groups", "agreed on 2", "max_ghost_groups=3"]:
            assert part in message


def single_value_in_a_group():
    """Two groups here and one there, the second of a single value over all ranks."""
    layer = syncbn.GhostBatchNorm(3, 2, remainder="smaller", sync=True)
    size = 3 if dist.get_rank() == 0 else 2
    try:
        layer(torch.randn(size, 3))
    except ValueError as error:
        return str(error)


def test_single_value_in_a_group_raises_on_every_rank(pools):
    for message in pools(2).run(single_value_in_a_group):
        assert "one value per channel" in str(message)
