"""Which ranks share statistics: groups made, handed in, saved, lost; and batches that have no variance anywhere."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from layer_jobs import Case, batch, check_against, reference, train_layer
from pool import Pool
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import collectives

# As in test_sync: exact but for summation.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def sample(size, seed=0, shape=(3, 4)):
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def message_of(function, *args):
    """What a ValueError says, or None."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)


def merged(sizes, layer):
    """Whether ``layer``'s running mean after one step (momentum 1) is that of the given ranks' samples together."""
    layer(sample(sizes[dist.get_rank()], dist.get_rank()))
    together = torch.cat([sample(sizes[rank], rank) for rank in (layer.scope.ranks or range(len(sizes)))])
    return torch.allclose(layer.running_mean, together.mean((0, 2)), rtol=1e-12, atol=1e-12)


# -- made --------------------------------------------------------------------------------------------------------------


def use_group_size(size):
    return message_of(syncbn.SyncBatchNorm(3, sync_group_size=size, dtype=torch.float64), sample(4))


@pytest.mark.parametrize("size", [3, 8])
def test_group_size_that_does_not_divide_the_world(pools, size):
    for message in pools(4).run(use_group_size, size):
        assert f"sync_group_size={size} does not divide the world size 4" in message
        assert "a divisor of 4" in message


def count_new_groups(ranks):
    """Groups made by five layers, of which one is a copy, in two steps; after forgetting those of earlier tests."""
    calls, made = [], dist.new_group
    collectives._groups.clear()
    try:
        dist.new_group = lambda *args, **kwargs: calls.append(args) or made(*args, **kwargs)
        layers = [syncbn.SyncBatchNorm(3, momentum=1.0, sync_group_size=2, dtype=torch.float64) for _ in range(3)]
        layers.append(syncbn.BatchRenorm(3, sync_group_size=2, dtype=torch.float64))
        layers.append(copy.deepcopy(layers[0]))
        model = nn.Sequential(*layers)
        for _ in range(2):
            model(sample(3))
        model.append(syncbn.SyncBatchNorm(3, process_group=ranks[dist.get_rank() // 2], dtype=torch.float64))
        model(sample(3))
    finally:
        dist.new_group = made
    names = {collectives.resolve_name(layer.scope) for layer in model}
    return len(calls), len(names)


def test_groups_are_made_once(pools):
    assert pools(4).run(count_new_groups, [[0, 1], [2, 3]]) == [(1, 1)] * 4


def world_in_other_words():
    """The whole world needs no group of its own, however it is named."""
    size = dist.get_world_size()
    scopes = [collectives.Scope(), collectives.Scope(sync_group_size=size), collectives.Scope(ranks=tuple(range(size)))]
    return all(collectives.resolve(scope) is dist.group.WORLD for scope in scopes)


def test_the_world_is_not_made_again(pools):
    assert pools(3).run(world_in_other_words) == [True] * 3


# -- handed in ---------------------------------------------------------------------------------------------------------


def use_handles(sizes):
    """Groups of ranks 0 and 2, and 1 and 3; then a group of others. The handle itself is used, also by a copy."""
    handles = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine = handles[dist.get_rank() % 2]
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, process_group=mine, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    same = collectives.resolve(twin.scope) is collectives.resolve(layer.scope) is mine
    works = merged(sizes, layer) and merged(sizes, twin)
    other = message_of(lambda: syncbn.SyncBatchNorm(3, process_group=handles[1 - dist.get_rank() % 2]))
    return same, works, other


def test_handles(pools):
    for same, works, other in pools(4).run(use_handles, (2, 3, 0, 4)):
        assert same
        assert works
        assert "process_group must be a process group that this process is in" in other


def use_a_second_world():
    """A group of all ranks that the user made (with a timeout or a backend of its own) is used, not the default one."""
    mine = dist.new_group(timeout=datetime.timedelta(seconds=30))
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, process_group=mine, dtype=torch.float64)
    return collectives.resolve(layer.scope) is mine, collectives.resolve(collectives.Scope()) is dist.group.WORLD


def test_second_group_of_all_ranks(pools):
    assert pools(2).run(use_a_second_world) == [(True, True)] * 2


def use_ranks_without_this_one():
    layer = syncbn.SyncBatchNorm(3, process_group=[1, 2], dtype=torch.float64)
    return message_of(layer, sample(4)) if dist.get_rank() in (0, 3) else str(layer(sample(4)).shape)


def test_rank_outside_the_group(pools):
    outside, first, second, other = pools(4).run(use_ranks_without_this_one)
    assert first == second == "torch.Size([4, 3, 4])"
    for message, rank in ((outside, 0), (other, 3)):
        assert f"holds the ranks (1, 2), and not this process's rank {rank}" in message


# -- saved -------------------------------------------------------------------------------------------------------------


def save_layer(path):
    if dist.get_rank() < 2:
        group = dist.new_group([0, 1], use_local_synchronization=True)
        layer = syncbn.SyncBatchNorm(3, momentum=1.0, process_group=group, dtype=torch.float64)
        layer(sample(2))
        if dist.get_rank() == 0:
            torch.save(layer, path)
    dist.barrier()


def load_layer(path, sizes):
    layer = torch.load(path, weights_only=False)
    return merged(sizes, layer) if dist.get_rank() < 2 else message_of(layer, sample(2))


def test_saved_with_its_group_and_loaded_elsewhere(pools, tmp_path):
    path = str(tmp_path / "layer.pt")
    pools(3).run(save_layer, path)
    first, second, outside = pools(3).run(load_layer, path, (2, 5, 1))
    assert first is second is True
    assert "holds the ranks (0, 1), and not this process's rank 2" in outside
    layer = torch.load(path, weights_only=False)  # here is no world: plain batch normalization
    assert layer.scope.ranks == (0, 1)
    torch.testing.assert_close(layer(sample(4)), nn.BatchNorm1d(3, dtype=torch.float64)(sample(4)), **EXACT)


def restart_world(rendezvous, sizes):
    """A layer and a pickled one outlive their world; what was made for the old one is not used in the new."""
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, process_group=[1, 0], dtype=torch.float64)
    before = merged(sizes, layer)
    stored = pickle.dumps(layer)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    forgotten = len(collectives._groups)
    alone = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    alone.load_state_dict(layer.state_dict())
    same = torch.equal(layer(sample(3)), alone(sample(3)))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=10),
    )
    return before, forgotten, same, merged(sizes, layer), merged(sizes, pickle.loads(stored))


def lose_a_rank():
    if dist.get_rank() == 1:
        os._exit(7)
    syncbn.SyncBatchNorm(3, dtype=torch.float64)(sample(2))


def test_worlds_end(tmp_path):
    """A world of its own: it is ended and made anew, and then loses a rank."""
    pool = Pool(2)
    try:
        for before, forgotten, same, after, loaded in pool.run(restart_world, str(tmp_path / "again"), (2, 3)):
            assert before
            assert forgotten == 0, "a destroyed group was kept alive"
            assert same
            assert after
            assert loaded
        start = time.monotonic()
        with pytest.raises(AssertionError, match="exit code 7") as caught:
            pool.run(lose_a_rank, timeout=30)
        # Rank 0 is told, and does not wait for ever: by the closed connection, or else when the 10 s are over.
        assert "rank 0" in str(caught.value)
        assert time.monotonic() - start < 20
    finally:
        pool.stop()


# -- batches -----------------------------------------------------------------------------------------------------------


def single_value(sizes, options):
    """An error on every rank, and a layer and a world that go on."""
    layer = syncbn.SyncBatchNorm(3, **options)
    message = message_of(layer, torch.ones(sizes[dist.get_rank()], 3))
    y = layer(torch.ones(1, 3) * dist.get_rank())
    counts = layer.num_batches_tracked, getattr(layer, "num_nonfinite_batches", None)
    return message, tuple(y.shape), [None if count is None else count.item() for count in counts]


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_single_value_raises_on_every_rank(pools, options):
    for message, shape, counts in pools(3).run(single_value, (1, 0, 0), options):
        assert "SyncBatchNorm" in message
        assert "one value per channel over all processes" in message
        assert shape == (1, 3)
        assert counts == ([None, None] if options else [1, 0])


def empty_everywhere():
    layer = syncbn.SyncBatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 3, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    unchanged = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    return unchanged, tuple(y.shape), torch.equal(layer.weight.grad, torch.zeros(3)), layer.num_nonfinite_batches.item()


def test_empty_on_every_rank(pools):
    assert pools(3).run(empty_everywhere) == [(True, (0, 3, 4), True, 0)] * 3


def nonfinite_on_one_rank():
    layer = syncbn.SyncBatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    x = sample(2).float()
    if dist.get_rank() == 1:
        x[0, 0, 0] = float("inf")
    layer(x)
    return all(torch.equal(v, before[k]) for k, v in layer.state_dict().items()), layer.num_nonfinite_batches.item()


def test_nonfinite_on_one_rank_is_kept_out_on_all(pools):
    assert pools(3).run(nonfinite_on_one_rank) == [(True, 1)] * 3


def evaluate_on_one_rank():
    layer = syncbn.SyncBatchNorm(3).eval()
    return tuple(layer(torch.ones(2, 3)).shape) if dist.get_rank() == 1 else None


def test_evaluation_waits_for_nobody(pools):
    assert pools(2).run(evaluate_on_one_rank, timeout=20) == [None, (2, 3)]


def test_world_of_one(pools):
    case = Case("SyncBatchNorm", (5,), {"sync_group_size": 1})
    check_against(pools(1).run(train_layer, case), reference(case), **EXACT)


# -- DistributedDataParallel -------------------------------------------------------------------------------------------


def make_model(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 2 * 3, 2)
    ).double()


def train_model(model, case, rows, scale):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(case.steps):
        x, dy = (t[rows] for t in batch(case, step))
        optimizer.zero_grad()
        loss = (model(x) * dy[:, :2, 0, 0]).sum() / sum(case.sizes) * scale
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def train_ddp(case, options):
    rank = dist.get_rank()
    start = sum(case.sizes[:rank])
    model = DistributedDataParallel(make_model(syncbn.SyncBatchNorm), **options)
    # DDP averages the gradients; the loss is a sum over all samples.
    state = train_model(model, case, slice(start, start + case.sizes[rank]), dist.get_world_size())
    return {name.removeprefix("module."): value for name, value in state.items()}


@pytest.mark.works_with(
    "torch", "DistributedDataParallel on 3 processes, one of them with an empty batch, with five sets of its options"
)
@pytest.mark.parametrize(
    "options",
    [
        {"broadcast_buffers": False},
        {"broadcast_buffers": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-5},  # a reduction for each parameter, between ours
    ],
    ids=str,
)
def test_distributed_data_parallel(pools, options):
    case = Case("SyncBatchNorm", (3, 0, 4), steps=4)
    truth = train_model(make_model(nn.BatchNorm2d), case, slice(None), 1)
    for state in pools(3).run(train_ddp, case, options):
        for name, expected in truth.items():
            torch.testing.assert_close(state[name], expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
