"""What synchronized statistics cost as the number of ranks grows: a model of given links, checked where it can be.

A network of L layers makes 2 L all-reduces a step, of 2C+1 and 2C float64 numbers, each of which the next layer waits
for. Their time is modelled (:mod:`syncbn.bench.links`) in two ways that are kept apart: with *given* links, for up to
1024 GPUs, and with a link that is *fitted* to all-reduces measured on this machine, which then has to predict a whole
network's all-reduces measured here too. The fit says whether such a model holds; it says nothing about other machines.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from syncbn.bench.links import Link, Measured, all_reduce_time, fit_all, group_shapes, network_time, parse_link
from syncbn.bench.processes import interleaved_together, run_processes
from syncbn.bench.timing import Spread, spread
from syncbn.collectives import all_reduce_sum

RESNET50_CHANNELS: tuple[int, ...] = (
    *(64, 64, 64, 256, 256),
    *(64, 64, 256) * 2,
    *(128, 128, 512, 512),
    *(128, 128, 512) * 3,
    *(256, 256, 1024, 1024),
    *(256, 256, 1024) * 5,
    *(512, 512, 2048, 2048),
    *(512, 512, 2048) * 2,
)
"""Channels of the 53 BatchNorm layers of torchvision's ``resnet50``, in forward order (He et al. 2015, arXiv
1512.03385, table 1): the stem; then in each block two narrow layers and a wide one, and the shortcut's in a stage's
first block."""

WORLD_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FITTED_CHANNELS = (64, 128, 256, 512, 1024, 2048)
BYTES_PER_NUMBER = 8
SMALL_BYTES = 4096
"""The size up to which an all-reduce's time hardly depends on its size."""
REPEATS = 10
"""All-reduces in a row of a sample, as one layer's follows another's."""

ANCHORS: tuple[dict[str, str], ...] = (
    {
        "what": "an NVLink node of 8 takes about 16 us for an all-reduce of up to 4 KB",
        "means": "106 of them, one after another, are 1.7 ms a step",
        "source": "arithmetic on a given latency; NCCL's own estimate (see nvlink) is 15.2 us",
    },
    {
        "what": "two such nodes take 17 to 40 us",
        "means": "106 of them are 1.8 to 4.2 ms a step",
        "source": "arithmetic likewise; NCCL's own estimate for 16 H100 on two nodes is 25.2 us (NVIDIA/nccl#1453)",
    },
    {
        "what": "torch's SyncBatchNorm with its collectives batched into one forward and one backward, on 8 P100",
        "means": "EfficientNet-B3 988 -> 838 ms a step (15.2 % less), MobileNetV2 453 -> 373 ms (17.7 % less); on 2 of "
        "them 0.9 % and 0.4 % less",
        "source": "pytorch/pytorch#38246",
    },
)

Report = Callable[[str], None]


def collective_bytes(channels: Sequence[int]) -> list[int]:
    """Bytes of a step's all-reduces for layers of so many channels: forward 2C+1 numbers, backward 2C, float64."""
    forward = [(2 * c + 1) * BYTES_PER_NUMBER for c in channels]
    backward = [2 * c * BYTES_PER_NUMBER for c in reversed(channels)]
    return forward + backward


def run_growth(
    device: torch.device,
    rounds: int,
    report: Report,
    *,
    links: Sequence[str] = ("nvlink", "pcie", "ethernet"),
    worlds: Sequence[int] = (2, 3, 4),
    sync_group_size: int = 8,
) -> dict[str, Any]:
    """Measure all-reduces on gloo processes of this machine, fit the model, and predict with given links.

    Args:
        device: the bench's; on CUDA it is said what one machine cannot measure, and the rest is the same.
        rounds: samples of each measurement.
        report: called with a line of text as each part is done.
        links: names, or texts as :func:`~syncbn.bench.links.parse_link` reads them.
        worlds: numbers of processes to measure with; empty measures nothing.
        sync_group_size: consecutive ranks that share statistics, for the column beside the whole world's.

    Returns:
        Plain data for JSON: ``network``, ``links``, ``growth`` (see :func:`rows`), ``measured`` (None without worlds),
        ``anchors``, ``assumed``, ``not_measured``. Times are in microseconds or milliseconds, as their names say.

    Raises:
        ValueError: a link that cannot be, or a size or world below 1 or 2.
    """
    if sync_group_size < 1 or any(world < 2 for world in worlds):
        raise ValueError(f"expected sync_group_size >= 1 and worlds >= 2, got {sync_group_size} and {tuple(worlds)}")
    known = [parse_link(text) for text in links]
    sizes = collective_bytes(RESNET50_CHANNELS)
    measured = _measure(sorted(worlds), rounds, report) if worlds else None
    layers = len(RESNET50_CHANNELS)
    return {
        "network": {
            "name": "resnet50",
            "layers": layers,
            "collectives": len(sizes),
            "forward_bytes": sum(sizes[:layers]),
            "backward_bytes": sum(sizes[layers:]),
            "largest_bytes": max(sizes),
        },
        "links": [asdict(link) for link in known],
        "growth": [_predict(link, sizes, world, sync_group_size) for link in known for world in WORLD_SIZES],
        "measured": measured,
        "anchors": list(ANCHORS),
        "assumed": [
            "nothing overlaps: each all-reduce is waited for, and the ranks arrive together",
            "ranks fill one node after another, and sync groups are consecutive ranks",
            "the network between the nodes is idle but for this, and all groups' traffic fits it",
        ],
        "not_measured": _not_measured(device),
    }


def _not_measured(device: torch.device) -> list[str]:
    said = ["the rows of given links are the model's, from the numbers that each link states"]
    if device.type == "cuda":
        found = torch.cuda.device_count()
        why = "an all-reduce takes two devices" if found < 2 else "the processes measured here speak gloo, on the CPU"
        said.append(f"NCCL on the {found} CUDA device{'s' * (found != 1)} of this machine: {why}")
    return said


def _predict(link: Link, sizes: Sequence[int], world_size: int, sync_group_size: int) -> dict[str, Any]:
    shapes = group_shapes(world_size, None, link.ranks_per_node)
    (whole,) = shapes
    world_us = network_time(link, sizes, world_size)
    group_us = network_time(link, sizes, world_size, sync_group_size)
    return {
        "link": link.name,
        "ranks": world_size,
        "nodes": whole.nodes,
        "small_us": all_reduce_time(link, SMALL_BYTES, whole),
        "step_ms": world_us / 1e3,
        "sync_group_size": min(sync_group_size, world_size),
        "group_step_ms": group_us / 1e3,
        "group_over_world": group_us / world_us,
    }


# ---- what can be measured here


def all_reduce_job(channels: Sequence[int], network: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Time all-reduces in the world that this process is in; the slowest rank's seconds, by round.

    Returns:
        For each size in bytes (as text) the seconds of one all-reduce, and under ``"network"`` those of all that a
        network with layers of ``network`` channels makes in a step, back to back.

    Raises:
        RuntimeError: a sum is not the ranks' sum.
    """
    assert dist.group.WORLD is not None, "called on processes that have a world"
    name = dist.group.WORLD.group_name
    singles = sorted(set(collective_bytes(channels)))
    step = collective_bytes(network)
    tensors = {size: torch.ones(size // BYTES_PER_NUMBER, dtype=torch.float64) for size in {*singles, *step}}
    for tensor in tensors.values():
        if not bool((all_reduce_sum(tensor, name) == dist.get_world_size()).all()):
            raise RuntimeError(f"the all-reduce of {tensor.numel()} ones over {dist.get_world_size()} ranks is wrong")

    def repeat(sizes: Sequence[int]) -> Callable[[], None]:
        def run() -> None:
            for size in sizes:
                all_reduce_sum(tensors[size], name)

        return run

    contenders = {str(size): repeat([size] * REPEATS) for size in singles} | {"network": repeat(step)}
    timings = interleaved_together(contenders, rounds=rounds)
    return {
        name: [sample / (1 if name == "network" else REPEATS) for sample in timing.samples]
        for name, timing in timings.items()
    }


def _measure(worlds: Sequence[int], rounds: int, report: Report) -> dict[str, Any]:
    points: list[tuple[Measured, Spread]] = []
    network: dict[int, Spread] = {}
    for world in worlds:
        times = run_processes(all_reduce_job, world, FITTED_CHANNELS, RESNET50_CHANNELS, rounds)[0]
        network[world] = _scaled(times.pop("network"), 1e3)
        for size, samples in times.items():
            us = _scaled(samples, 1e6)
            points.append((Measured(world, int(size), us.median), us))
        report(f"growth: {len(times)} sizes and a network's all-reduces on {world} gloo processes")
    measured = [point for point, _ in points]
    cores = _cores()
    fits = fit_all(measured, cores)
    sizes = collective_bytes(RESNET50_CHANNELS)
    predicted = {world: network_time(fits[0].link(world), sizes, world) / 1e3 for world in worlds}
    return {
        "backend": "gloo",
        "cores": cores,
        "all_reduces": [
            {"ranks": m.world_size, "bytes": m.num_bytes, "us": us.median, "low": us.low, "high": us.high}
            for m, us in points
        ],
        "fits": [found.json() for found in fits],
        "network": [
            {
                "ranks": world,
                "measured_ms": ms.median,
                "low": ms.low,
                "high": ms.high,
                "predicted_ms": predicted[world],
                "predicted_over_measured": predicted[world] / ms.median,
            }
            for world, ms in network.items()
        ],
        "held_out": _held_out(measured, max(worlds), cores),
    }


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _scaled(seconds: Sequence[float], factor: float) -> Spread:
    return spread(second * factor for second in seconds)


def _held_out(measured: Sequence[Measured], world_size: int, cores: int) -> dict[str, Any] | None:
    """What the smaller worlds alone would have said of the largest: the test of a model of growth."""
    known = [m for m in measured if m.world_size < world_size]
    if len({m.world_size for m in known}) < 2:  # one world cannot tell the call's cost from the rounds'
        return None
    found = fit_all(known, cores)[0]
    link = found.link(world_size)
    (shape,) = group_shapes(world_size, None, world_size)
    errors = [
        all_reduce_time(link, m.num_bytes, shape) / m.microseconds for m in measured if m.world_size == world_size
    ]
    return {
        "ranks": world_size,
        "fitted_to": sorted({m.world_size for m in known}),
        "algorithm": found.algorithm,
        "predicted_over_measured": statistics.median(errors),
    }


# ---- text


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for each link and world size of :func:`run_growth`'s result, for CSV.

    Keys: ``link``, ``ranks``, ``nodes``, ``small_us`` (an all-reduce of 4 KB over all ranks), ``step_ms`` (a step's
    all-reduces over all ranks), ``sync_group_size``, ``group_step_ms`` (within groups), ``group_over_world``.
    """
    return list(result["growth"])


def lines(result: dict[str, Any]) -> list[str]:
    """The text of :func:`run_growth`'s result."""
    return [*_growth_lines(result), "", *_measured_lines(result), "", *_said(result)]


def _growth_lines(result: dict[str, Any]) -> list[str]:
    network, growth = result["network"], result["growth"]
    group = max((row["sync_group_size"] for row in growth), default=1)
    kilobytes = (network["forward_bytes"] + network["backward_bytes"]) / 1e3
    text = [
        f"Cost of synchronization against world size: {network['name']}, {network['layers']} layers, "
        f"{network['collectives']} all-reduces a step, {kilobytes:.0f} kB a rank (modelled)",
        "  ranks, nodes  GPUs, and nodes that they fill",
        "  4 KB us       one all-reduce of 4 KB over all ranks",
        "  step ms       a step's all-reduces over all ranks, one after another: what is added to a step",
        f"  groups ms     the same with sync_group_size={group}: statistics of {group} consecutive ranks",
        "  ratio         groups / all ranks",
    ]
    for link in result["links"]:
        text += ["", f"{link['name']}: {link['source']}"]
        text.append(f"{'ranks':>6} {'nodes':>6} {'4 KB us':>9} {'step ms':>9} {'groups ms':>10} {'ratio':>6}")
        text += [
            f"{row['ranks']:>6} {row['nodes']:>6} {row['small_us']:>9.1f} {row['step_ms']:>9.2f} "
            f"{row['group_step_ms']:>10.2f} {row['group_over_world']:>6.2f}"
            for row in growth
            if row["link"] == link["name"]
        ]
    return text


def _measured_lines(result: dict[str, Any]) -> list[str]:
    measured = result["measured"]
    if measured is None:
        return ["Measured here: nothing (no worlds were asked for)"]
    worlds = [row["ranks"] for row in measured["network"]]
    text = [
        f"Measured here: gloo, {', '.join(map(str, worlds))} processes on {measured['cores']} cores, "
        f"{len(measured['all_reduces'])} all-reduces of 1 to 33 kB; the model fitted to them"
    ]
    for found in measured["fits"]:
        bandwidth = "no effect of size" if found["bandwidth"] is None else f"{found['bandwidth']:.2f} GB/s"
        text.append(
            f"  {found['algorithm']:<19} base {found['base']:.0f} us, {found['alpha']:.0f} us a round and "
            f"{found['wait']:.0f} more for each process on a core beyond the first, {bandwidth}; "
            f"residuals {100 * found['rms']:.0f} % (root mean square), {100 * found['worst']:.0f} % at most"
        )
    text.append("  a whole network's all-reduces back to back, and what the first of these fits says:")
    text += [
        f"  {row['ranks']} processes: {row['measured_ms']:.1f} ms ({row['low']:.1f}-{row['high']:.1f}), "
        f"predicted {row['predicted_ms']:.1f} ms: {row['predicted_over_measured']:.2f} of it"
        for row in measured["network"]
    ]
    if (held := measured["held_out"]) is not None:
        text.append(
            f"  fitted without them ({held['algorithm']}), all-reduces on {held['ranks']} processes are predicted at "
            f"{held['predicted_over_measured']:.2f} of their time"
        )
    if max(worlds) > measured["cores"]:
        text.append(
            f"  more than {measured['cores']} processes share the cores here: their rounds wait for a core rather than "
            "for a link, which the fit separates as far as so few worlds can, and it is no guide to other machines"
        )
    return text


def _said(result: dict[str, Any]) -> list[str]:
    text = ["Published, to set beside it:"]
    text += [f"  {anchor['what']}: {anchor['means']} [{anchor['source']}]" for anchor in result["anchors"]]
    text += ["Assumed:", *(f"  {line}" for line in result["assumed"])]
    return [*text, "Not measured:", *(f"  {line}" for line in result["not_measured"])]
