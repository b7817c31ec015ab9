"""Whole training steps side by side: forward, loss, backward and SGD, with each normalization.

Three comparisons: the layers on one process; the same on real processes under DistributedDataParallel; and 8 logical
GPUs that one process emulates, against 4 processes that host two each. What has to be equal is checked in float64
before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.bench.processes import interleaved_together, run_processes
from syncbn.bench.step_models import (
    CPU,
    CPU_SHAPES,
    CUDA_SHAPES,
    TOLERANCE,
    VARIANTS,
    Precision,
    Shape,
    Step,
    build,
    check_alone,
    check_together,
    checked,
    make_batch,
    make_step,
    missing,
    variant_options,
    wrap,
)
from syncbn.bench.timing import Spread, Timing, geometric_mean_of_ratios, interleaved, ratio

Report = Callable[[str], None]
Seconds = dict[str, tuple[float, ...]]

CHECKED = Shape("resnet20", 4, 16, 2)
LOGICAL_GPUS = 8
REAL_PROCESSES = 4
EMULATED = Shape("resnet20", 2, 32, 2)
"""Each logical GPU's share: CIFAR's model and images, two a GPU. That is the case that emulation is for, a batch so
small that a process is busier with its layers' overhead and its collectives than with images; with more of them a GPU
the step is all convolution, and four processes on several cores have more arithmetic at their disposal than one."""
ARMS = ("local", "groups", "sync")
"""Statistics of each logical GPU; of groups of 4; of all 8."""


@dataclass(frozen=True)
class Emulation:
    """One process's step of 8 logical GPUs over the same step on 4 processes, by wall time."""

    ratio: Spread
    """Geometric mean over the arms."""
    by_arm: dict[str, Spread]
    one_ms: dict[str, Spread]
    four_ms: dict[str, Spread]
    difference: dict[str, float]
    """Largest relative difference of the losses of three steps, in float64, for each arm."""


def run_steps(
    device: torch.device,
    rounds: int,
    report: Report,
    *,
    models: Sequence[str] = ("resnet20", "resnet50"),
    worlds: Sequence[int] = (2, 4),
    precision: Precision = "fp32",
    emulation: bool = True,
    shapes: Sequence[Shape] | None = None,
) -> dict[str, Any]:
    """Check and time the steps.

    Args:
        device: of the steps on one process; those on several processes, and the emulation, are the CPU's.
        rounds: samples of each; half as many of ResNet-50 on the CPU, whose step takes a second, but three at least.
        report: called with a line of text as each part is done.
        models: those to measure.
        worlds: numbers of gloo processes; none on CUDA.
        precision: ``"bf16"`` runs forward and loss under autocast.
        emulation: measure :func:`emulation_ratio` too (on the CPU alone).
        shapes: instead of the device's own.

    Returns:
        Plain data for JSON: ``steps`` (see :func:`rows`), ``checks``, ``emulation`` (None where it was not measured),
        ``skipped`` (lines that say what was not, and why), ``precision``, ``device``.

    Raises:
        RuntimeError: what has to be equal is not, a loss is not finite, or it has not fallen.
    """
    chosen, skipped = _chosen(device, models, shapes)
    if device.type == "cuda":
        worlds, emulation = (), False
        skipped.append("steps on several processes and the emulation: measured on the CPU, with --device cpu")
    checks = check_alone(CHECKED)
    steps: list[dict[str, Any]] = []
    for shape in chosen:
        steps += _step_rows(shape, 1, precision, alone(shape, rounds_of(shape, rounds, device), device, precision))
        report(f"steps: {shape.model}, {shape.batch} images on one process")
    for world in worlds:
        known = tuple((shape, rounds_of(shape, rounds, CPU)) for shape in chosen)
        differences, times = run_processes(together_job, world, CHECKED, known, precision)[0]
        checks |= differences
        for shape, seconds in zip(chosen, times, strict=True):
            steps += _step_rows(shape, world, precision, _timings(seconds))
        report(f"steps: {', '.join(shape.model for shape in chosen)} on {world} processes")
    found = None
    if emulation:
        found = emulation_ratio(rounds)
        checks |= found.difference
        report(f"steps: {LOGICAL_GPUS} logical GPUs on one process and on {REAL_PROCESSES}")
    return {
        "device": device.type,
        "precision": precision,
        "checks": [{"what": what, "difference": value, "tolerance": TOLERANCE} for what, value in checks.items()],
        "steps": steps,
        "emulation": None if found is None else _emulation_json(found),
        "skipped": skipped,
    }


def _chosen(
    device: torch.device, models: Sequence[str], shapes: Sequence[Shape] | None
) -> tuple[list[Shape], list[str]]:
    """The shapes to measure, and a line for each model that is not here."""
    if shapes is None:
        shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    shapes = [shape for shape in shapes if shape.model in models]
    reasons = {shape.model: missing(shape.model) for shape in shapes}
    return [s for s in shapes if reasons[s.model] is None], [why for why in reasons.values() if why is not None]


def rounds_of(shape: Shape, rounds: int, device: torch.device) -> int:
    """Samples of a shape's steps."""
    return max(3, rounds // 2) if shape.model == "resnet50" and device.type == "cpu" else rounds


def _timings(seconds: Seconds) -> dict[str, Timing]:
    return {name: Timing(samples) for name, samples in seconds.items()}


def _step_rows(shape: Shape, ranks: int, precision: str, timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    part = "one process" if ranks == 1 else "processes"
    return [
        _row(part, shape, ranks, precision, name, timing.spread, ratio(timing, timings["local"]))
        for name, timing in timings.items()
    ]


def _row(
    part: str, shape: Shape, ranks: int, precision: str, variant: str, seconds: Spread, ratios: Spread
) -> dict[str, Any]:
    return {
        "part": part,
        "model": shape.model,
        "batch": shape.batch,
        "image_size": shape.image_size,
        "ranks": ranks,
        "precision": precision,
        "variant": variant,
        "ratio": ratios.median,
        "ratio_low": ratios.low,
        "ratio_high": ratios.high,
        "ms": seconds.median * 1e3,
        "ms_low": seconds.low * 1e3,
        "ms_high": seconds.high * 1e3,
    }


# ---- times


def alone(shape: Shape, rounds: int, device: torch.device, precision: Precision = "fp32") -> dict[str, Timing]:
    """Steps of each variant on this process, in turns. One thread on the CPU, as the project's processes have."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        steps = _steps(shape, device, precision, 0, 1)
        first = {name: float(step()) for name, step in steps.items()}
        timings = interleaved(steps, rounds=rounds, device=device)
        _check_losses(first, {name: float(step()) for name, step in steps.items()})
    finally:
        torch.set_num_threads(threads)
    return timings


def together_job(
    small: Shape, shapes: Sequence[tuple[Shape, int]], precision: Precision
) -> tuple[dict[str, float], list[Seconds]]:
    """Check and time the variants in the world that this process is in; the slowest rank's seconds, by round.

    Args:
        small: what :func:`check_together` is run on.
        shapes: each with its rounds; ``batch`` images a process.
        precision: as :func:`run_steps`'s.
    """
    differences = check_together(small)
    times = []
    for shape, rounds in shapes:
        steps = _steps(shape, CPU, precision, dist.get_rank(), dist.get_world_size())
        first = {name: _total(step()) for name, step in steps.items()}
        timings = interleaved_together(steps, rounds=rounds, warmup=1)
        _check_losses(first, {name: _total(step()) for name, step in steps.items()})
        times.append({name: timing.samples for name, timing in timings.items()})
    return differences, times


def _steps(shape: Shape, device: torch.device, precision: Precision, rank: int, processes: int) -> dict[str, Step]:
    x, y = make_batch(shape, device, torch.float32, rank, processes)
    options = variant_options(shape)
    steps = {}
    for variant in VARIANTS:
        model = build(shape, options.get(variant), device, torch.float32)
        steps[variant] = make_step(model if processes == 1 else wrap(model), x, y, processes, precision)
    return steps


def _total(loss: Tensor) -> float:
    dist.all_reduce(loss)
    return float(loss)


def _check_losses(first: Mapping[str, float], last: Mapping[str, float]) -> None:
    """Training on one batch over and over has to learn it."""
    for name, loss in last.items():
        if not (math.isfinite(loss) and loss < first[name]):
            raise RuntimeError(f"{name}: the loss went from {first[name]:.4g} to {loss:.4g}, expected a lower one")


# ---- emulation


def emulation_ratio(rounds: int = 7, shape: Shape = EMULATED) -> Emulation:
    """Time a step of 8 logical GPUs on one process against the same step on 4 processes that host two each.

    Both sides have one thread a process, the same global batch, the same weights and the same statistics, and take
    turns: while the one process works the others sleep in a barrier. In the arm ``local`` each logical GPU has its own
    statistics, so on both sides the layers have ghost groups and the 4 processes exchange gradients alone; in
    ``groups`` 4 logical GPUs share them, which is 2 ghost groups on one process and a collective between two of the 4;
    in ``sync`` all do.

    Args:
        rounds: samples of each.
        shape: images of a logical GPU.

    Raises:
        RuntimeError: the two sides differ in float64.
    """
    seconds, difference = run_processes(emulation_job, REAL_PROCESSES, rounds, shape, ARMS)[0]
    timings = {arm: {side: Timing(samples) for side, samples in seconds[arm].items()} for arm in ARMS}
    by_arm = {arm: ratio(timings[arm]["one"], timings[arm]["four"]) for arm in ARMS}
    spreads = {
        side: {arm: Spread(*(1e3 * value for value in timings[arm][side].spread)) for arm in ARMS}
        for side in ("one", "four")
    }
    return Emulation(
        geometric_mean_of_ratios(by_arm.values()), by_arm, spreads["one"], spreads["four"], checked(difference)
    )


def emulation_job(rounds: int, shape: Shape, arms: Sequence[str]) -> tuple[dict[str, Seconds], dict[str, float]]:
    """In a world of 4: for each arm, the seconds of the one process (``one``) and of the world (``four``)."""
    seconds, difference = {}, {}
    for arm in arms:
        one, four = _sides(arm, shape, torch.float64)
        difference[f"emulated {arm} = real {arm}"] = _losses_differ(one, four)
        one, four = _sides(arm, shape, torch.float32)
        seconds[arm] = _take_turns({"one": one, "four": four}, rounds)
    return seconds, difference


def _sides(arm: str, shape: Shape, dtype: torch.dtype) -> tuple[Step, Step]:
    """The step of rank 0 alone, which costs the others nothing, and the step of all."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    hosted = LOGICAL_GPUS // processes
    shared = {"local": 1, "groups": LOGICAL_GPUS // 2, "sync": LOGICAL_GPUS}[arm]
    emulated = {"kind": "ghost", "ghost_batch_size": shared * shape.batch}
    real: dict[str, Any] = emulated if shared <= hosted else {"kind": "sync", "sync_group_size": shared // hosted}
    all_of_it, share = (replace(shape, batch=shape.batch * gpus) for gpus in (LOGICAL_GPUS, hosted))
    x, y = make_batch(share, CPU, dtype, rank, processes)
    four = make_step(wrap(build(shape, real, CPU, dtype)), x, y, processes)
    if rank != 0:
        return lambda: torch.zeros((), dtype=dtype), four
    x, y = make_batch(all_of_it, CPU, dtype)
    return make_step(build(shape, emulated, CPU, dtype), x, y), four


def _losses_differ(one: Step, four: Step, steps: int = 3) -> float:
    """The largest relative difference of the losses of some steps; from the second on they tell of the updates too."""
    largest = 0.0
    for _ in range(steps):
        alone, all_of_them = one(), four()
        for loss in (alone, all_of_them):
            dist.all_reduce(loss)
        largest = max(largest, abs(float(all_of_them / alone) - 1))
    return largest


def _take_turns(steps: Mapping[str, Step], rounds: int) -> Seconds:
    # One call a sample: ranks that have nothing to do must not ask for a thousand.
    timings = interleaved(steps, rounds=rounds, device=CPU, before=dist.barrier, min_sample=0.0)
    seconds: Seconds = {}
    for name, timing in timings.items():
        slowest = torch.tensor(timing.samples, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds[name] = tuple(slowest.tolist())
    return seconds


def _emulation_json(found: Emulation) -> dict[str, Any]:
    arms = {
        arm: {"ratio": list(found.by_arm[arm]), "one_ms": list(found.one_ms[arm]), "four_ms": list(found.four_ms[arm])}
        for arm in ARMS
    }
    return {
        "ratio": list(found.ratio),
        "arms": arms,
        "model": EMULATED.model,
        "batch": EMULATED.batch,
        "image_size": EMULATED.image_size,
        "logical_gpus": LOGICAL_GPUS,
        "processes": REAL_PROCESSES,
    }


# ---- text


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row for each timed step of :func:`run_steps`'s result, for CSV.

    Keys: ``part`` (``one process``, ``processes``, ``emulation``), ``model``, ``batch`` (images of a process; of a
    logical GPU in the emulation), ``image_size``, ``ranks``, ``precision``, ``variant`` (an arm in the emulation),
    ``ratio`` with its quartiles ``ratio_low`` and ``ratio_high`` (to local BatchNorm; in the emulation one process over
    4), ``ms`` with ``ms_low`` and ``ms_high`` (in the emulation of the one process).
    """
    found = list(result["steps"])
    if result["emulation"] is not None:
        for arm, values in result["emulation"]["arms"].items():
            seconds = Spread(*(ms / 1e3 for ms in values["one_ms"]))
            found.append(_row("emulation", EMULATED, REAL_PROCESSES, "fp32", arm, seconds, Spread(*values["ratio"])))
    return found


def lines(result: Mapping[str, Any]) -> list[str]:
    """The text of :func:`run_steps`'s result."""
    text = [
        f"Training steps ({result['device']}, {result['precision']}): forward, loss, backward, SGD; median (quartiles)",
        "  / local  time over that of torch's BatchNorm in the same round, first of all",
        "  batch    images of each process; on several, of the slowest process, under DistributedDataParallel",
        f"{'model':<9} {'batch':>5} {'pixels':>6} {'processes':>9}  {'norm':<7} {'/ local':<20} ms",
    ]
    text += [
        f"{row['model']:<9} {row['batch']:>5} {row['image_size']:>6} {row['ranks']:>9}  {row['variant']:<7} "
        f"{_spread(row, 'ratio', 2):<20} {_spread(row, 'ms', 1)}"
        for row in result["steps"]
    ]
    text += ["", *(_emulation_lines(result["emulation"]) if result["emulation"] is not None else ())]
    text.append("Checked in float64, largest relative difference of loss and gradients:")
    text += [f"  {check['what']}: {check['difference']:.1e}" for check in result["checks"]]
    return text + ["Not measured:", *(f"  {line}" for line in result["skipped"])] * bool(result["skipped"])


def _spread(row: Mapping[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f} ({row[name + '_low']:.{digits}f}-{row[name + '_high']:.{digits}f})"


def _emulation_lines(found: Mapping[str, Any]) -> list[str]:
    text = [
        f"{found['logical_gpus']} logical GPUs of {found['batch']} images emulated by one process, against the same "
        f"step ({found['model']}, {found['image_size']} pixels) on {found['processes']} processes; one thread each"
    ]
    for arm, values in found["arms"].items():
        one, four = values["one_ms"][0], values["four_ms"][0]
        text.append(f"  {arm:<7} {Spread(*values['ratio'])}: {one:.1f} ms against {four:.1f} ms")
    return [*text, f"  geometric mean {Spread(*found['ratio'])}", ""]
