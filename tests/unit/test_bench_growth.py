"""The modelled cost of all-reduces against values worked out by hand and published ones."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from syncbn.bench import growth
from syncbn.bench.growth import LINKS, Link, all_reduce_us, step_ms
from syncbn.compat import import_torchvision

NVLINK = LINKS[0]


def test_time_within_and_between_nodes() -> None:
    link = Link("plain", 10.0, 1.0, 5.0, 4.0, 2.0, "made up")
    # 4 ranks: 6 messages of 1 us, 2000 bytes at 4000 per us. 3 nodes of 8: 14 of 1 us, 4 of 5 us, 2000 at 2000 per us.
    assert all_reduce_us(link, 1000, 1) == 0
    assert all_reduce_us(link, 1000, 4) == pytest.approx(10 + 6 + 0.5)
    assert all_reduce_us(link, 1000, 24) == pytest.approx(10 + 14 + 0.5 + 20 + 1)


def test_nvlink_has_the_published_latencies() -> None:
    assert all_reduce_us(NVLINK, 4096, 8) == pytest.approx(16, rel=0.1)
    assert 17 <= all_reduce_us(NVLINK, 4096, 16) <= 40
    # NVIDIA/nccl#1453, what NCCL printed of itself.
    assert all_reduce_us(NVLINK, 128, 16) == pytest.approx(25.215, abs=0.01)
    assert all_reduce_us(NVLINK, 1024, 16) == pytest.approx(25.331, abs=0.01)


def test_resnet50_has_106_collectives() -> None:
    channels = growth.RESNET50_CHANNELS
    assert len(channels) == 53
    assert sum(channels) == 26560
    sizes = growth.collective_bytes(channels)
    assert len(sizes) == 106
    assert sizes[0] == (2 * 64 + 1) * 8
    assert sizes[-1] == 2 * 64 * 8
    assert sum(sizes) == 8 * (4 * 26560 + 53)


def test_resnet50_channels_are_torchvisions() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("the model is torchvision's, which is not installed")
    with torch.device("meta"):
        model = import_torchvision("models").resnet50(weights=None)
    found = [m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert found == list(growth.RESNET50_CHANNELS)


def test_the_table() -> None:
    rows = growth.growth_rows()
    assert [row.ranks for row in rows] == len(LINKS) * list(growth.WORLD_SIZES)
    own = [row for row in rows if row.link == "nvlink"]
    times = [row.step_ms for row in own]
    assert times == sorted(times)
    assert own[2].step_ms == pytest.approx(1.7, rel=0.1)  # 106 all-reduces of about 16 us
    # Groups that lie within a node cost what a node costs.
    assert {row.group_step_ms for row in own[2:]} == {own[2].step_ms}
    assert own[2].step_ms < 0.2 * own[-1].step_ms == 0.2 * step_ms(NVLINK, 1024)
    text = growth.growth_lines(rows)
    assert sum(line.split()[:2] == ["1024", "128"] for line in text) == len(LINKS)
    assert max(map(len, text)) <= 120
