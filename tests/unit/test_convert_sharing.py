"""convert: with whom a converted layer shares statistics, and classes that are registered."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from convert_cases import (
    KINDS,
    ScaledBatchNorm,
    every_kind,
    pickled,
    scale,
    snapshot,
)
from torch import nn

import syncbn
from syncbn import SyncBatchNorm, convert, revert
from syncbn.collectives import Scope
from syncbn.convert_layer import drop_then_act

# -- who shares statistics ---------------------------------------------------------------------------------------------


def test_torch_sync_batchnorm_stays_synchronized() -> None:
    for kind, options in KINDS.items():
        assert convert(nn.SyncBatchNorm(4), kind, **options).scope == Scope()
        assert convert(nn.BatchNorm2d(4), kind, **options).scope == (Scope() if kind == "sync" else None)
        assert convert(nn.SyncBatchNorm(4), kind, sync_group_size=2, **options).scope == Scope(sync_group_size=2)
        by_hand = SyncBatchNorm(4, sync_group_size=2)
        assert convert(by_hand, kind, **options).scope == Scope(sync_group_size=2)
        assert convert(by_hand, kind, process_group=[0, 1], **options).scope == Scope(ranks=(0, 1))
        assert revert(by_hand).scope == Scope(sync_group_size=2)
    assert convert(nn.SyncBatchNorm(4), "ghost", ghost_batch_size=2, sync=False).scope is None


@pytest.mark.usefixtures("world")
@every_kind
def test_the_process_group_of_torch_sync_batchnorm(kind: str) -> None:
    group = dist.new_group([0])
    layer = nn.SyncBatchNorm(4, process_group=group)
    before = snapshot(layer)
    convert(layer, kind, **KINDS[kind])
    assert layer.scope == Scope(ranks=(0,))
    assert not hasattr(layer, "process_group")
    layer(torch.randn(4, 4))
    assert snapshot(revert(copy.deepcopy(layer)))[""][1]["process_group"] is group
    unpickled = revert(pickled(layer))
    assert dist.get_process_group_ranks(unpickled.process_group) == [0]
    assert unpickled.process_group is not None
    convert(layer, kind, sync_group_size=1, **KINDS[kind])
    assert layer.scope == Scope(sync_group_size=1)
    assert snapshot(revert(layer)) == before
    assert layer.process_group is group


def test_a_process_group_is_not_guessed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4, process_group=dist.new_group([0])))
        other = pickled(convert(model, "sync"))
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"SyncBatchNorm '1' cannot be reverted.*ranks \[0\].*init_process_group"):
        revert(other)
    assert all(isinstance(m, SyncBatchNorm) for m in other)


# -- the registry ------------------------------------------------------------------------------------------------------


@every_kind
def test_a_registered_class_keeps_its_behaviour(kind: str) -> None:
    syncbn.register_batchnorm(ScaledBatchNorm, scale)
    layer = ScaledBatchNorm(3)
    layer.factor = 5.0
    plain = copy.deepcopy(layer)
    convert(layer, kind, ghost_batch_size=4) if kind == "ghost" else convert(layer, kind)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    assert type(revert(layer)) is ScaledBatchNorm


class OddBatchNorm(nn.BatchNorm2d):
    """Its attributes have the names of options."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.scope, self.activation, self.save = "all", "gelu", True


@every_kind
def test_attributes_with_the_names_of_options(kind: str) -> None:
    syncbn.register_batchnorm(OddBatchNorm)
    layer = OddBatchNorm(3)
    before = snapshot(layer)
    convert(layer, kind, **KINDS[kind])
    assert (layer.scope, layer.activation, layer.save) == (Scope() if kind == "sync" else None, None, "input")
    assert snapshot(revert(layer)) == before


def test_a_registration_is_for_the_class_alone() -> None:
    class Child(ScaledBatchNorm):
        pass

    syncbn.register_batchnorm(ScaledBatchNorm, scale)
    with pytest.raises(ValueError, match="Child"):
        convert(Child(3), "sync")
    syncbn.register_batchnorm(Child)
    assert convert(Child(3), "sync").after is None


@pytest.mark.parametrize(
    ("cls", "after", "message"),
    [
        (nn.Linear, None, "expected a subclass of torch's batch normalization.*Linear"),
        (nn.InstanceNorm2d, None, "expected a subclass of torch's batch normalization.*InstanceNorm2d"),
        ("ScaledBatchNorm", None, "expected a subclass.*'ScaledBatchNorm'"),
        (nn.BatchNorm2d, scale, "BatchNorm2d is converted as it is"),
        (SyncBatchNorm, drop_then_act, "SyncBatchNorm is converted as it is"),
        (ScaledBatchNorm, lambda layer, x: x, "cannot be imported by its name.*top level"),
    ],
    ids=["linear", "instance norm", "name", "plain", "own", "lambda"],
)
def test_what_cannot_be_registered(cls: Any, after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        syncbn.register_batchnorm(cls, after)
