"""Times of whole training steps: forward, loss, backward and SGD, with each normalization.

Three comparisons: the normalizations on one process; the same on several processes under DistributedDataParallel; and
8 logical GPUs emulated by one process, against 4 processes that host two each. Steps that must be equal are compared in
float64 before they are timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from syncbn.bench.processes import interleaved_together, progress, run_processes
from syncbn.bench.shapes import Shape
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
from syncbn.bench.suites import Measurement, Suite
from syncbn.bench.timing import Timing, interleaved

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

WORLDS = (1, 2, 4)
STEP_SUITES = (
    *(
        Suite(f"step on {n}", f"training step on {n} processes", "local", tuple(variants(EMULATED)), separate=True)
        for n in WORLDS
    ),
    Suite(
        "emulation",
        f"training step of {LOGICAL_GPUS} logical GPUs, emulated on one process or on {REAL_PROCESSES} real ones",
        baseline="real",
        needed=("emulated", "real"),
        rows_on=("cpu",),
    ),
)


def run_steps(
    device: torch.device, rounds: int, worlds: Sequence[int] = WORLDS, configs: Sequence[StepConfig] | None = None
) -> tuple[list[Measurement], dict[str, float]]:
    """Check and time the steps on one process and, on the CPU, on several.

    Args:
        device: of the steps on one process.
        rounds: samples of each. ResNet-50 on the CPU has half as many, at least three: its step takes a second.
        worlds: numbers of processes.
        configs: default :data:`CONFIGS` for the device.

    Returns:
        The timings, and the largest relative difference between steps that must be equal.

    Raises:
        RuntimeError: two steps that must be equal are not, or a loss has not fallen.
    """
    measurements: list[Measurement] = []
    checks: dict[str, float] = {}
    jobs = []
    for config in configs or CONFIGS[device.type]:
        try:
            build(config, None, device, torch.float32)
        except ImportError as error:
            measurements.append(_measurement(1, config, {}))
            measurements[-1].unavailable = dict.fromkeys(variants(config), str(error))
            continue
        slow = config.model == "resnet50" and device.type == "cpu"
        jobs.append((config, max(3, rounds // 2) if slow else rounds, device))
    for world in worlds if device.type == "cpu" else (1,):
        progress(f"training steps on {world} processes")
        differences, timings = steps_job(jobs) if world == 1 else run_processes(steps_job, world, jobs)[0]
        checks |= differences
        measurements += [_measurement(world, job[0], found) for job, found in zip(jobs, timings, strict=True)]
    return measurements, checks


def _measurement(world: int, config: StepConfig, timings: dict[str, Timing]) -> Measurement:
    return Measurement(f"step on {world}", _shape(config, config.model), "float32", timings)


def _shape(config: StepConfig, name: str) -> Shape:
    return Shape(name, (config.batch, 3, config.image_size, config.image_size), channels_last=config.channels_last)


def steps_job(
    jobs: Iterable[tuple[StepConfig, int, torch.device]], small: StepConfig = CHECKED
) -> tuple[dict[str, float], list[dict[str, Timing]]]:
    """Check and time steps, on one process alone or called on each process of a world.

    Args:
        jobs: what to time, with its rounds and device.
        small: what the checks are made on.

    Returns:
        The checks' differences, and the timings of each job.
    """
    differences = check_together(small) if dist.is_initialized() else check_alone(small)
    return differences, [_time_steps(*job) for job in jobs]


def _time_steps(config: StepConfig, rounds: int, device: torch.device) -> dict[str, Timing]:
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


def measure_emulation(rounds: int, config: StepConfig = EMULATED) -> tuple[list[Measurement], dict[str, float]]:
    """Time a step of 8 logical GPUs on one process against the same step on 4 processes that host two each.

    Both sides have one thread per process, the same global batch, weights and statistics, and they take turns: while
    the one process works, the others wait in a barrier. In the arm ``local`` both sides have ghost groups, and the 4
    processes exchange only gradients. In ``groups`` one process has 2 ghost groups, and the 4 processes share
    statistics in pairs. In ``sync`` all share them.

    Args:
        rounds: samples of each.
        config: of a logical GPU.

    Returns:
        A measurement for each arm, and the largest relative differences between the two sides in float64.

    Raises:
        RuntimeError: the two sides differ in float64.
    """
    progress(f"training step of {LOGICAL_GPUS} logical GPUs on one process and on {REAL_PROCESSES}")
    timings, differences = run_processes(emulation_job, REAL_PROCESSES, rounds, config, ARMS)[0]
    found = [Measurement("emulation", _shape(config, f"{config.model} {arm}"), "float32", timings[arm]) for arm in ARMS]
    return found, checked(differences)


def emulation_job(
    rounds: int, config: StepConfig, arms: Sequence[str]
) -> tuple[dict[str, dict[str, Timing]], dict[str, float]]:
    """Called on each of 4 processes; for each arm the timings ``emulated`` and ``real``, and the checks."""
    timings, differences = {}, {}
    for arm in arms:
        differences[f"emulated {arm} = real {arm}"] = _losses_differ(*_sides(arm, config, torch.float64))
        emulated, real = _sides(arm, config, torch.float32)
        # One call per sample: processes that idle would otherwise ask for many.
        timings[arm] = interleaved_together({"emulated": emulated, "real": real}, rounds=rounds, min_sample=0.0)
    return timings, differences


def _sides(arm: str, config: StepConfig, dtype: torch.dtype) -> tuple[TrainingStep, TrainingStep]:
    """The step of rank 0 with all images, during which the others have nothing to do, and the step of all ranks."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    hosted = LOGICAL_GPUS // processes
    shared = {"local": 1, "groups": LOGICAL_GPUS // 2, "sync": LOGICAL_GPUS}[arm]
    one: dict[str, Any] = {"kind": "ghost", "ghost_batch_size": shared * config.batch}
    several = one if shared <= hosted else {"kind": "sync", "sync_group_size": shared // hosted}
    x, y = make_batch(replace(config, batch=config.batch * hosted), CPU, dtype, rank, processes)
    real = make_step(wrap(build(config, several, CPU, dtype)), x, y, processes)
    if rank != 0:
        return lambda: torch.zeros((), dtype=dtype), real
    x, y = make_batch(replace(config, batch=config.batch * LOGICAL_GPUS), CPU, dtype)
    return make_step(build(config, one, CPU, dtype), x, y), real


def _losses_differ(one: TrainingStep, other: TrainingStep) -> float:
    """The largest relative difference of the losses of three steps, of which two depend on updates of the weights."""
    differences = []
    for _ in range(3):
        expected = _total(one)
        differences.append(abs(_total(other) / expected - 1))
    return max(differences)
