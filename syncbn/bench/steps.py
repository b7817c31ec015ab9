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
    ms: Spread
    """In the emulation those of the one process."""


@dataclass
class StepResults:
    times: list[StepTime] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    """Largest relative difference between steps that must be equal, in float64."""
    skipped: list[str] = field(default_factory=list)
    """What was not measured, and why."""

    def add(self, part: str, config: StepConfig, ranks: int, variant: str, timing: Timing, baseline: Timing) -> None:
        ms = Spread(*(1e3 * seconds for seconds in timing.spread))
        where = (part, config.model, config.batch, config.image_size, ranks)
        self.times.append(StepTime(*where, variant, ratio(timing, baseline), ms))


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
        progress(f"steps: {config.model}, {config.batch} images on one process")
        try:
            timings = time_steps(config, own_rounds, device)
        except ImportError as error:
            results.skipped.append(f"{config.model}, {config.batch} images: {error}")
            continue
        chosen.append((config, own_rounds))
        for name, timing in timings.items():
            results.add("one process", config, 1, name, timing, timings["local"])
    if device.type == "cuda":
        results.skipped.append("steps on several processes and the emulation: measured with --device cpu")
        return results
    for world in worlds:
        progress(f"steps: {', '.join(config.model for config, _ in chosen)} on {world} processes")
        differences, found = run_processes(together_job, world, CHECKED, chosen)[0]
        results.checks |= differences
        for (config, _), timings in zip(chosen, found, strict=True):
            for name, timing in timings.items():
                results.add("processes", config, world, name, timing, timings["local"])
    return results


def time_steps(config: StepConfig, rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time a step of each normalization, in turns, on this process or together with the others of its world."""
    together = dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    x, y = make_batch(config, device, torch.float32, rank, processes)
    steps = {}
    for name, options in variants(config).items():
        model = build(config, options, device, torch.float32)
        steps[name] = make_step(wrap(model) if together else model, x, y, processes)
    first = {name: _total(step) for name, step in steps.items()}
    if together:
        timings = interleaved_together(steps, rounds=rounds, warmup=1)
    else:
        timings = interleaved(steps, rounds=rounds, device=device)
    _check_losses(first, {name: _total(step) for name, step in steps.items()})
    return timings


def together_job(
    small: StepConfig, configs: Sequence[tuple[StepConfig, int]]
) -> tuple[dict[str, float], list[dict[str, Timing]]]:
    """Called on each process of a world: :func:`check_together` on ``small``, and the timings for each of ``configs``,
    which come with their rounds."""
    return check_together(small), [time_steps(config, rounds, CPU) for config, rounds in configs]


def _total(step: TrainingStep) -> float:
    """Take a step; its loss over all processes."""
    loss = step()
    if dist.is_initialized():
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
    progress(f"steps: {LOGICAL_GPUS} logical GPUs on one process and on {REAL_PROCESSES}")
    timings, differences = run_processes(emulation_job, REAL_PROCESSES, rounds, config, ARMS)[0]
    results = StepResults(checks=checked(differences))
    for arm, found in timings.items():
        results.add("emulation", config, REAL_PROCESSES, arm, found["one"], found["four"])
    return results


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
    text += _table([time for time in results.times if time.part != "emulation"], "time / local")
    if emulated := [time for time in results.times if time.part == "emulation"]:
        text += ["", f"{LOGICAL_GPUS} logical GPUs on one process, against the same step on {REAL_PROCESSES} processes"]
        text += [*_table(emulated, "one / several"), f"geometric mean {emulation_ratio(emulated)}"]
    text += ["", "Checked in float64, largest relative difference of loss and gradients:"]
    text += [f"  {what}: {difference:.1e}" for what, difference in results.checks.items()]
    return text + ["Not measured:", *(f"  {line}" for line in results.skipped)] * bool(results.skipped)


def _table(times: Iterable[StepTime], ratios: str) -> Iterable[str]:
    yield f"{'model':<9} {'batch':>5} {'pixels':>6} {'processes':>9}  {'norm':<7} {ratios:<21} ms"
    for time in times:
        where = f"{time.model:<9} {time.batch:>5} {time.image_size:>6} {time.ranks:>9}"
        yield f"{where}  {time.variant:<7} {time.ratio!s:<21} {time.ms}"
