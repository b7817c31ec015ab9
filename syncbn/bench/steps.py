"""Times of whole training steps: forward, loss, backward and SGD, with each normalization.

Three comparisons: the normalizations on one process; the same on several processes under DistributedDataParallel; and
8 logical GPUs emulated by one process, against 4 processes that host two each. Steps that must be equal are compared in
float64 before they are timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from syncbn.bench.processes import interleaved_together, progress, run_processes
from syncbn.bench.step_models import (
    CPU,
    StepConfig,
    TrainingStep,
    build,
    check_alone,
    check_together,
    checked,
    make_batch,
    make_step,
    variants,
    wrap,
)
from syncbn.bench.timing import Spread, Timing, geometric_mean_of_ratios, interleaved, ratio

CONFIGS = {
    "cpu": (
        StepConfig("resnet20", 8, 32, 4),
        # At 64 pixels, not ImageNet's 224, a step takes one second, not ten. The maps are small, so that the overhead
        # of a layer counts more than in real training.
        StepConfig("resnet50", 4, 64, 2),
    ),
    "cuda": (
        StepConfig("resnet20", 128, 32, 32, channels_last=True),
        StepConfig("resnet50", 2, 224, 1, channels_last=True),
        StepConfig("resnet50", 8, 224, 4, channels_last=True),
        StepConfig("resnet50", 32, 224, 8, channels_last=True),
    ),
}
CHECKED = StepConfig("resnet20", 4, 16, 2)

LOGICAL_GPUS = 8
REAL_PROCESSES = 4
EMULATED = StepConfig("resnet20", 2, 32, 2)
"""Per logical GPU. Emulation is for batches this small, at which layer overhead and collectives take most of the time.
With more images convolutions dominate, and four processes have more cores for them than one."""
ARMS = ("local", "groups", "sync")
"""Statistics of each logical GPU, of groups of 4, of all 8."""


class StepTime(NamedTuple):
    """One normalization's step."""

    part: str
    """``"one process"``, ``"processes"`` or ``"emulation"``."""
    model: str
    batch: int
    """Images per process; per logical GPU in the emulation."""
    image_size: int
    ranks: int
    variant: str
    """The normalization; in the emulation one of :data:`ARMS`."""
    ratio: Spread
    """Time over that of local BatchNorm; in the emulation that of one process over that of 4."""
    seconds: Spread
    """In the emulation those of the one process."""


@dataclass
class StepResults:
    times: list[StepTime] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    """Largest relative difference between steps that must be equal, in float64."""
    skipped: list[str] = field(default_factory=list)
    """What was not measured, and why."""


def run_steps(
    device: torch.device, rounds: int, worlds: Sequence[int] = (2, 4), configs: Sequence[StepConfig] | None = None
) -> StepResults:
    """Check and time the steps on one process and, on the CPU, on several.

    Args:
        device: of the steps on one process.
        rounds: samples of each. ResNet-50 on the CPU has half as many, at least three: its step takes a second.
        worlds: numbers of gloo processes.
        configs: default :data:`CONFIGS` for the device.

    Raises:
        RuntimeError: two steps that must be equal are not, or a loss has not fallen.
    """
    results = StepResults(checks=check_alone(CHECKED))
    chosen: list[tuple[StepConfig, int]] = []
    for config in configs or CONFIGS[device.type]:
        slow = config.model == "resnet50" and device.type == "cpu"
        own_rounds = max(3, rounds // 2) if slow else rounds
        try:
            timings = alone(config, own_rounds, device)
        except ImportError as error:
            if f"{config.model}: {error}" not in results.skipped:
                results.skipped.append(f"{config.model}: {error}")
            continue
        chosen.append((config, own_rounds))
        results.times += _step_times("one process", config, 1, timings)
        progress(f"steps: {config.model}, {config.batch} images on one process")
    if device.type == "cuda":
        results.skipped.append("steps on several processes and the emulation: measured with --device cpu")
        return results
    for world in worlds:
        differences, found = run_processes(together_job, world, CHECKED, chosen)[0]
        results.checks |= differences
        for (config, _), timings in zip(chosen, found, strict=True):
            results.times += _step_times("processes", config, world, timings)
        progress(f"steps: {', '.join(config.model for config, _ in chosen)} on {world} processes")
    return results


def _step_times(part: str, config: StepConfig, ranks: int, timings: Mapping[str, Timing]) -> Iterable[StepTime]:
    where = (part, config.model, config.batch, config.image_size, ranks)
    for name, timing in timings.items():
        yield StepTime(*where, name, ratio(timing, timings["local"]), timing.spread)


def alone(config: StepConfig, rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time a step of each normalization on this process, in turns."""
    steps = _steps(config, device, 0, 1)
    first = {name: float(step()) for name, step in steps.items()}
    timings = interleaved(steps, rounds=rounds, device=device)
    _check_losses(first, {name: float(step()) for name, step in steps.items()})
    return timings


def together_job(
    small: StepConfig, configs: Sequence[tuple[StepConfig, int]]
) -> tuple[dict[str, float], list[dict[str, Timing]]]:
    """Check and time the normalizations; called on each process of a world.

    Args:
        small: for :func:`~syncbn.bench.step_models.check_together`.
        configs: what to time, each with its rounds.

    Returns:
        The checks' differences, and the timings for each of ``configs``.
    """
    differences = check_together(small)
    found = []
    for config, rounds in configs:
        steps = _steps(config, CPU, dist.get_rank(), dist.get_world_size())
        first = {name: _total(step) for name, step in steps.items()}
        found.append(interleaved_together(steps, rounds=rounds, warmup=1))
        _check_losses(first, {name: _total(step) for name, step in steps.items()})
    return differences, found


def _steps(config: StepConfig, device: torch.device, rank: int, processes: int) -> dict[str, TrainingStep]:
    x, y = make_batch(config, device, torch.float32, rank, processes)
    steps = {}
    for name, options in variants(config).items():
        model = build(config, options, device, torch.float32)
        steps[name] = make_step(model if processes == 1 else wrap(model), x, y, processes)
    return steps


def _total(step: TrainingStep) -> float:
    """Take a step; its loss over all processes."""
    loss = step()
    dist.all_reduce(loss)
    return float(loss)


def _check_losses(first: Mapping[str, float], last: Mapping[str, float]) -> None:
    """Repeated training on one batch must lower its loss."""
    for name, loss in last.items():
        if not (math.isfinite(loss) and loss < first[name]):
            raise RuntimeError(f"{name}: the loss went from {first[name]:.4g} to {loss:.4g}, expected a lower one")


# -- emulation ---------------------------------------------------------------------------------------------------------


def measure_emulation(rounds: int, config: StepConfig = EMULATED) -> StepResults:
    """Time a step of 8 logical GPUs on one process against the same step on 4 processes that host two each.

    Both sides have one thread per process, the same global batch, weights and statistics, and they take turns: while
    the one process works, the others wait in a barrier. In the arm ``local`` both sides have ghost groups, and the 4
    processes exchange only gradients. In ``groups`` one process has 2 ghost groups, and the 4 processes share
    statistics in pairs. In ``sync`` all share them.

    Args:
        rounds: samples of each.
        config: of a logical GPU.

    Raises:
        RuntimeError: the two sides differ in float64.
    """
    timings, differences = run_processes(emulation_job, REAL_PROCESSES, rounds, config, ARMS)[0]
    where = ("emulation", config.model, config.batch, config.image_size, REAL_PROCESSES)
    times = [
        StepTime(*where, arm, ratio(found["one"], found["four"]), found["one"].spread) for arm, found in timings.items()
    ]
    progress(f"steps: {LOGICAL_GPUS} logical GPUs on one process and on {REAL_PROCESSES}")
    return StepResults(times, checked(differences))


def emulation_ratio(times: Iterable[StepTime]) -> Spread:
    """The time of one process over that of 4; geometric mean over the arms."""
    return geometric_mean_of_ratios(time.ratio for time in times if time.part == "emulation")


def emulation_job(
    rounds: int, config: StepConfig, arms: Sequence[str]
) -> tuple[dict[str, dict[str, Timing]], dict[str, float]]:
    """Called on each of 4 processes; for each arm the timings of ``one`` process and of ``four``, and the checks."""
    timings, differences = {}, {}
    for arm in arms:
        differences[f"emulated {arm} = real {arm}"] = _losses_differ(*_sides(arm, config, torch.float64))
        one, four = _sides(arm, config, torch.float32)
        # One call per sample: processes that idle would otherwise ask for many.
        timings[arm] = interleaved_together({"one": one, "four": four}, rounds=rounds, min_sample=0.0)
    return timings, differences


def _sides(arm: str, config: StepConfig, dtype: torch.dtype) -> tuple[TrainingStep, TrainingStep]:
    """The step of rank 0 with all images, during which the others have nothing to do, and the step of all ranks."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    hosted = LOGICAL_GPUS // processes
    shared = {"local": 1, "groups": LOGICAL_GPUS // 2, "sync": LOGICAL_GPUS}[arm]
    emulated = {"kind": "ghost", "ghost_batch_size": shared * config.batch}
    real: dict[str, Any] = emulated if shared <= hosted else {"kind": "sync", "sync_group_size": shared // hosted}
    x, y = make_batch(replace(config, batch=config.batch * hosted), CPU, dtype, rank, processes)
    four = make_step(wrap(build(config, real, CPU, dtype)), x, y, processes)
    if rank != 0:
        return lambda: torch.zeros((), dtype=dtype), four
    x, y = make_batch(replace(config, batch=config.batch * LOGICAL_GPUS), CPU, dtype)
    return make_step(build(config, emulated, CPU, dtype), x, y), four


def _losses_differ(one: TrainingStep, four: TrainingStep) -> float:
    """The largest relative difference of the losses of three steps, of which two depend on updates of the weights."""
    differences = []
    for _ in range(3):
        expected = _total(one)
        differences.append(abs(_total(four) / expected - 1))
    return max(differences)


# -- text --------------------------------------------------------------------------------------------------------------


def step_lines(device: str, results: StepResults) -> list[str]:
    """The results as text."""
    text = [f"Training steps ({device}): forward, loss, backward, SGD; median (quartiles)"]
    text.append(f"{'model':<9} {'batch':>5} {'pixels':>6} {'processes':>9}  {'norm':<7} {'time / local':<21} ms")
    text += [f"{_where(t)} {t.ranks:>9}  {_spreads(t)}" for t in results.times if t.part != "emulation"]
    emulated = [time for time in results.times if time.part == "emulation"]
    if emulated:
        text += ["", f"{LOGICAL_GPUS} logical GPUs on one process, against the same step on {REAL_PROCESSES} processes"]
        text.append(f"{'model':<9} {'batch':>5} {'pixels':>6} {'':>9}  {'norm':<7} {'one / four':<21} ms of the one")
        text += [f"{_where(time)} {'':>9}  {_spreads(time)}" for time in emulated]
        text.append(f"geometric mean {emulation_ratio(emulated)}")
    text += ["", "Checked in float64, largest relative difference of loss and gradients:"]
    text += [f"  {what}: {difference:.1e}" for what, difference in results.checks.items()]
    return text + ["Not measured:", *(f"  {line}" for line in results.skipped)] * bool(results.skipped)


def _where(time: StepTime) -> str:
    return f"{time.model:<9} {time.batch:>5} {time.image_size:>6}"


def _spreads(time: StepTime) -> str:
    low, high = time.ratio.low, time.ratio.high
    ms = [1e3 * seconds for seconds in time.seconds]
    ratios = f"{time.ratio.median:.2f} ({low:.2f}-{high:.2f})"
    return f"{time.variant:<7} {ratios:<21} {ms[0]:.1f} ({ms[1]:.1f}-{ms[2]:.1f})"
