"""fvcore, which finds batch normalization by its classes: precise statistics and the count of operations."""

from __future__ import annotations

import copy

import pytest
import torch
from fvcore.nn import FlopCountAnalysis, parameter_count, update_bn_stats
from model_steps import images, make
from torch import nn

import syncbn


def network() -> nn.Module:
    return make(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    )


@pytest.mark.works_with("fvcore", "`update_bn_stats` of a converted model: what `update_population_statistics` finds")
def test_precise_statistics() -> None:
    batches = list(images(12, number=24).add(3).split(4))
    theirs = syncbn.convert(network(), "sync")
    ours, plain = copy.deepcopy(theirs), network()
    for model in (theirs, plain):
        update_bn_stats(model, batches, num_iters=len(batches))
    assert theirs[1].momentum == 0.1
    syncbn.update_population_statistics(ours, batches)
    theirs(batches[0])  # the new buffers are the layer's own
    plain(batches[0])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(theirs[1].get_buffer(name), plain[1].get_buffer(name), rtol=1e-12, atol=1e-12)
    ours(batches[0])
    # fvcore normalizes by each batch's biased variance and subtracts squares, in float64 here.
    torch.testing.assert_close(theirs[4].running_mean, ours[4].running_mean, rtol=1e-9, atol=1e-9)


@pytest.mark.works_with("fvcore", "`FlopCountAnalysis` and `parameter_count` of a converted model")
def test_counts() -> None:
    plain, x = network().eval(), images(12)
    model = syncbn.convert(copy.deepcopy(plain), "sync")
    assert parameter_count(model) == parameter_count(plain)
    counts = [FlopCountAnalysis(each, x).by_module_and_operator() for each in (model, plain)]
    assert counts[0] == counts[1]
