"""The model of an all-reduce against values worked out by hand, its fit, and the table made of it."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
from dataclasses import replace

import pytest
import torch

from syncbn.bench import growth
from syncbn.bench.links import (
    LINKS,
    Algorithm,
    Fit,
    GroupShape,
    Link,
    Measured,
    all_reduce_time,
    carried_bytes,
    fit,
    fit_all,
    group_shapes,
    message_rounds,
    network_time,
    parse_link,
)
from syncbn.compat import import_torchvision

PLAIN = Link("plain", 10.0, 1.0, 5.0, 4.0, 2.0, 4, "ring", "recursive_doubling", "made up")


@pytest.mark.parametrize(
    ("algorithm", "rounds", "carried"),
    [
        # by ranks:          1  2  3  4   5   8      1    2     3      4      8, each of 1000 bytes
        ("ring", (0, 2, 4, 6, 8, 14), (0, 1000, 4000 / 3, 1500, 1750)),
        ("recursive_doubling", (0, 1, 3, 2, 4, 3), (0, 1000, 3000, 2000, 3000)),
        ("tree", (0, 2, 4, 4, 6, 6), (0, 2000, 2000, 2000, 2000)),
        ("chain", (0, 2, 4, 6, 8, 14), (0, 2000, 2000, 2000, 2000)),
        ("exchange", (0, 1, 2, 3, 4, 7), (0, 1000, 2000, 3000, 7000)),
    ],
)
def test_rounds_and_bytes(algorithm: Algorithm, rounds: tuple[int, ...], carried: tuple[float, ...]) -> None:
    assert tuple(message_rounds(algorithm, ranks) for ranks in (1, 2, 3, 4, 5, 8)) == rounds
    found = [carried_bytes(algorithm, ranks, 1000) for ranks in (1, 2, 3, 4, 8)]
    assert found == pytest.approx(list(carried))


def test_time_within_and_between_nodes() -> None:
    # 4 ranks on a node: 6 rounds of 1 us, 1500 bytes at 4000 a us; 2 nodes: 1 round of 5 us, 1000 bytes at 2000 a us.
    assert all_reduce_time(PLAIN, 1000, GroupShape(4, 1)) == pytest.approx(10 + 6 + 0.375)
    assert all_reduce_time(PLAIN, 1000, GroupShape(4, 2)) == pytest.approx(10 + 6 + 0.375 + 5 + 0.5)
    assert all_reduce_time(PLAIN, 1000, GroupShape(1, 2)) == pytest.approx(10 + 5 + 0.5)
    assert all_reduce_time(PLAIN, 1000, GroupShape(1, 1)) == 0


def test_group_shapes() -> None:
    assert group_shapes(6, None, 4) == {GroupShape(4, 2)}
    assert group_shapes(16, 4, 4) == {GroupShape(4, 1)}
    assert group_shapes(16, 8, 4) == {GroupShape(4, 2)}
    assert group_shapes(8, 3, 4) == {GroupShape(3, 1), GroupShape(2, 2), GroupShape(2, 1)}
    assert group_shapes(2, 8, 4) == {GroupShape(2, 1)}


def test_nvlink_has_the_published_latencies() -> None:
    link = LINKS["nvlink"]
    (node,), (two_nodes,) = group_shapes(8, None, 8), group_shapes(16, None, 8)
    assert all_reduce_time(link, 4096, node) == pytest.approx(16, rel=0.1)
    assert 17 <= all_reduce_time(link, 4096, two_nodes) <= 40
    # NVIDIA/nccl#1453, what NCCL printed of itself.
    assert all_reduce_time(link, 128, two_nodes) == pytest.approx(25.215, abs=0.01)
    assert all_reduce_time(link, 1024, two_nodes) == pytest.approx(25.331, abs=0.01)


def test_sync_groups_within_a_node_cost_what_a_node_costs() -> None:
    link, sizes = LINKS["nvlink"], growth.collective_bytes(growth.RESNET50_CHANNELS)
    node = network_time(link, sizes, 8)
    times = [network_time(link, sizes, world) for world in growth.WORLD_SIZES]
    assert times == sorted(times)
    for world in (8, 64, 1024):
        assert network_time(link, sizes, world, sync_group_size=8) == node
    assert node < 0.2 * network_time(link, sizes, 1024)
    # A group that straddles two nodes pays for the link between them.
    assert network_time(link, sizes, 24, sync_group_size=6) > network_time(link, sizes, 6)


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
    assert [m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)] == list(
        growth.RESNET50_CHANNELS
    )


def synthetic(truth: Fit, worlds: tuple[int, ...] = (2, 3, 4), noise: float = 0.0) -> list[Measured]:
    generator = torch.Generator().manual_seed(3)
    points = []
    for world in worlds:
        for size in growth.collective_bytes(growth.FITTED_CHANNELS):
            time = all_reduce_time(truth.link(world), size, GroupShape(world, 1))
            factor = 1 + noise * float(torch.randn((), generator=generator))
            points.append(Measured(world, size, time * factor))
    return points


@pytest.mark.parametrize("algorithm", ["ring", "recursive_doubling", "exchange"])
def test_fit_recovers_what_made_the_measurements(algorithm: Algorithm) -> None:
    truth = Fit(algorithm, 100.0, 40.0, 0.0, 0.5, 0, 0, 0, 8)
    found = fit(synthetic(truth), algorithm, cores=8)
    assert (found.base, found.alpha, found.wait, found.bandwidth) == pytest.approx((100, 40, 0, 0.5), rel=1e-6)
    assert found.worst < 1e-9
    assert fit_all(synthetic(truth), cores=8)[0].algorithm == algorithm


def test_fit_tells_waiting_for_a_core_from_the_link() -> None:
    truth = Fit("ring", 0.0, 40.0, 700.0, 0.5, 0, 0, 0, 2)
    found = fit(synthetic(truth), "ring", cores=2)
    assert (found.base, found.alpha, found.wait, found.bandwidth) == pytest.approx(
        (0, 40, 700, 0.5), rel=1e-6, abs=1e-6
    )
    assert found.link(2).alpha_node == pytest.approx(40)
    assert found.link(4).alpha_node == pytest.approx(740)


def test_fit_of_noisy_measurements_is_close_and_never_negative() -> None:
    truth = Fit("ring", 5.0, 40.0, 0.0, 2.0, 0, 0, 0, 8)
    found = fit(synthetic(truth, noise=0.05), "ring", cores=8)
    assert min(found.base, found.alpha, found.wait) >= 0
    assert found.alpha == pytest.approx(40, rel=0.15)
    assert 0.01 < found.rms < 0.1
    level = [Measured(world, size, 50.0 - size / 1e4) for world in (2, 4) for size in (1000, 30000)]
    assert fit(level, "ring", cores=8).bandwidth == math.inf  # larger messages were faster: no bandwidth at all


def test_parse_link() -> None:
    assert parse_link("pcie") is LINKS["pcie"]
    changed = parse_link("nvlink:alpha_between=8,ranks_per_node=4,within=ring")
    assert replace(changed, name="", source="") == replace(
        LINKS["nvlink"], alpha_between=8.0, ranks_per_node=4, within="ring", name="", source=""
    )
    for wrong in ("nvlonk", "nvlink:gamma=3", "nvlink:base=fast", "nvlink:base=-1", "nvlink:between=star", "pcie:base"):
        with pytest.raises(ValueError, match="link"):
            parse_link(wrong)


def test_run_growth_without_measurements() -> None:
    result = growth.run_growth(torch.device("cpu"), 1, print, links=["nvlink", "nvlink:alpha_between=20"], worlds=())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    rows = growth.rows(result)
    assert [row["ranks"] for row in rows] == 2 * list(growth.WORLD_SIZES)
    eight = rows[2]
    assert eight["step_ms"] == pytest.approx(1.7, rel=0.1)  # 106 all-reduces of about 16 us
    assert rows[3]["group_step_ms"] == eight["step_ms"]
    assert rows[9]["step_ms"] < rows[19]["step_ms"]
    assert csv.DictWriter(io.StringIO(), list(rows[0])).writerows(rows) is None
    text = "\n".join(growth.lines(result))
    assert "38246" in text
    assert "nothing (no worlds" in text
    said = growth.run_growth(torch.device("cuda"), 1, print, worlds=())["not_measured"]
    assert any("NCCL" in line for line in said)


def test_run_growth_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="sync_group_size"):
        growth.run_growth(torch.device("cpu"), 1, print, sync_group_size=0, worlds=())
    with pytest.raises(ValueError, match="worlds"):
        growth.run_growth(torch.device("cpu"), 1, print, worlds=(1,))
