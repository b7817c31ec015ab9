"""Logical GPUs: every sample on exactly one process, and the same sharing of statistics for every number of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from syncbn.train.config import config_from_dict
from syncbn.train.logical_gpus import Partition, Placement

CASES = [
    {"gpus": 8, "norm": {"name": "batch"}},
    {"gpus": 8, "norm": {"name": "sync"}},
    {"gpus": 6, "norm": {"name": "sync"}, "sync_group_size": 2},
    {"gpus": 6, "norm": {"name": "sync"}, "sync_group_size": 3},
    {"gpus": 12, "norm": {"name": "sync"}, "sync_group_size": 4},
    {"gpus": 8, "norm": {"name": "ghost", "ghost_batch_size": 2}},
    {"gpus": 8, "norm": {"name": "ghost", "ghost_batch_size": 2, "sync": True}, "sync_group_size": 4},
]


def partitions(case, processes):
    config = config_from_dict({"per_gpu_batch_size": 4, **case})
    return [Partition.of(config, Placement(rank, processes)) for rank in range(processes)]


def sharing(case, processes, samples):
    """For each sample the global row that it is counted in, read off what each process is told."""
    rows = []
    for partition in partitions(case, processes):
        groups = partition.groups(samples, torch.device("cpu"))
        local = partition.local_range(samples)
        index = torch.zeros(len(local), dtype=torch.int64) if groups.index is None else groups.index
        assert len(index) == len(local)
        assert groups.number == len(partition.row_range)
        rows += [partition.row_range[i] for i in index.tolist()]
    return rows


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("samples", [1, 3, 4, 9, 24, 31, 32])
def test_sharing_does_not_depend_on_the_processes(case, samples):
    samples = min(samples, case["gpus"] * 4)
    alone = sharing(case, 1, samples)
    assert len(alone) == samples
    for processes in (n for n in range(2, case["gpus"] + 1) if case["gpus"] % n == 0):
        assert sharing(case, processes, samples) == alone


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_that_share_a_row_communicate(case):
    for processes in (n for n in range(1, case["gpus"] + 1) if case["gpus"] % n == 0):
        made = partitions(case, processes)
        used = [set(partition.rows(partition.local_range(10**6)).tolist()) for partition in made]
        for a, b in itertools.combinations(range(processes), 2):
            together = b in made[a].ranks
            assert together == (a in made[b].ranks)
            assert together or not used[a] & used[b]
            if together:
                assert made[a].row_range == made[b].row_range


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("samples", [5, 24])
def test_mean_over_processes_is_the_mean_over_filled_rows(case, samples):
    """With a number for each row in place of its statistics."""
    values = torch.arange(1.0, 100.0)
    alone = sharing(case, 1, samples)
    expected = values[sorted(set(alone))].mean()
    for processes in (n for n in range(1, case["gpus"] + 1) if case["gpus"] % n == 0):
        made = partitions(case, processes)
        total = 0.0
        for partition in made:
            filled = {
                row for other in partition.ranks for row in made[other].rows(made[other].local_range(samples)).tolist()
            }
            divisor = partition.groups(samples, torch.device("cpu")).divisor
            total += sum(float(values[row]) for row in filled) / divisor
        assert total / processes == pytest.approx(float(expected), rel=1e-6)
