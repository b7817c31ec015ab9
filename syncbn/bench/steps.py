"""Times of whole training steps: forward, loss, backward and SGD, with each normalization.

Three comparisons: the normalizations on one process; the same on several processes under DistributedDataParallel; and
8 logical GPUs emulated by one process, against 4 processes that host two each. Steps that must be equal are compared in
float64 before they are timed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.bench.problem import Shape
from syncbn.bench.suites import Measurement, Suite, WrongError
from syncbn.bench.timing import Timing, interleaved, progress, run_processes
from syncbn.compat import import_torchvision
from syncbn.convert import convert
from syncbn.layers import BatchRenorm
from syncbn.population import RunningStatistics
from syncbn.train.tasks.models import cifar_resnet, initialize

TrainingStep = Callable[[], Tensor]
Options = Mapping[str, Any] | None
"""Arguments of :func:`syncbn.convert`; None leaves torch's BatchNorm."""

CLASSES = {"resnet20": 10, "resnet18": 1000, "resnet50": 1000}
LEARNING_RATE = 1e-3  # so small that the loss of a batch of two images falls from the first step on, which is checked
TOLERANCE = 1e-9  # of the relative difference between equal steps in float64: rounding errors of twenty layers
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepConfig:
    model: Literal["resnet20", "resnet18", "resnet50"]
    batch: int  # images per process
    image_size: int  # side of the square images in pixels
    ghost_batch_size: int
    channels_last: bool = False

    @property
    def shape(self) -> Shape:
        """Of the images on one process."""
        return Shape(self.model, (self.batch, 3, self.image_size, self.image_size), channels_last=self.channels_last)


def variants(config: StepConfig) -> dict[str, Options]:
    """The normalizations to time.

    BatchRenorm is in its warm-up, in which r and d are computed and then clipped to 1 and 0. A step costs the same as
    later on, and its loss is that of local BatchNorm.
    """
    return {
        "local": None,
        "sync": {"kind": "sync"},
        "ghost": {"kind": "ghost", "ghost_batch_size": config.ghost_batch_size},
        "renorm": {"kind": "renorm"},
    }


def build(config: StepConfig, options: Options, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in training mode, with the same weights for all ``options``; ImportError without torchvision."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if config.model == "resnet20":
            model = cifar_resnet(20, 3, CLASSES[config.model], 16, nn.BatchNorm2d)
            initialize(model)
        else:
            make = getattr(import_torchvision("models"), config.model)
            model = make(weights=None, num_classes=CLASSES[config.model])
    if options is not None:
        convert(model, **options)
    memory_format = config.shape.memory_format
    moved: nn.Module = model.to(device=device, dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
    return moved


def make_batch(
    config: StepConfig, device: torch.device, dtype: torch.dtype, rank: int = 0, processes: int = 1
) -> tuple[Tensor, Tensor]:
    """This process's consecutive part of a global batch of ``processes * config.batch`` images, and their classes.

    The global batch depends on its size alone, so that one process can have the same images as several.
    """
    total = config.batch * processes
    generator = torch.Generator().manual_seed(total)
    x = torch.randn(total, *config.shape.size[1:], generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES[config.model], (total,), generator=generator)
    part = slice(rank * config.batch, (rank + 1) * config.batch)
    return x[part].to(device, dtype).contiguous(memory_format=config.shape.memory_format), y[part].to(device)


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(model: nn.Module) -> nn.Module:
    """On several processes under DistributedDataParallel, which leaves buffers to the layers, as in training."""
    if not dist.is_initialized():
        return model
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(model, **options)


def backward(model: nn.Module, x: Tensor, y: Tensor, processes: int = 1) -> Tensor:
    """Forward, loss and backward; returns this process's part of the global batch's mean loss, ()."""
    loss = F.cross_entropy(model(x), y, reduction="sum") / (len(y) * processes)
    shared = RunningStatistics(model, BatchRenorm)  # whose next forward needs the averages over the ranks
    if processes > 1:
        shared.start()
    (loss * processes).backward()  # DistributedDataParallel averages the gradients over the processes
    shared.finish()
    return loss.detach()


def make_step(model: nn.Module, x: Tensor, y: Tensor, processes: int = 1) -> TrainingStep:
    """A step of SGD with momentum, always on the same batch; it returns the loss as :func:`backward` does."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, x, y, processes)
        optimizer.step()
        return loss

    return step


def check(config: StepConfig) -> dict[str, float]:
    """Compare steps that must be equal, in float64: those of all processes with those of one with the whole batch.

    Returns for each pair the largest relative difference of loss and gradients, at most :data:`TOLERANCE`.
    """
    rank, processes = world()
    x, y = make_batch(config, CPU, torch.float64, rank, processes)
    all_x, all_y = make_batch(replace(config, batch=config.batch * processes), CPU, torch.float64)
    options = variants(config)
    pairs: list[tuple[str, Options, Options]] = [
        ("sync = local on the whole batch", options["sync"], None),
        ("local = a ghost group for each process", None, {"kind": "ghost", "ghost_batch_size": config.batch}),
    ]
    if processes == 1:
        pairs.append(("renorm in its warm-up = local", options["renorm"], None))
    found = {}
    for what, here, there in pairs:
        model, truth = wrap(build(config, here, CPU, torch.float64)), build(config, there, CPU, torch.float64)
        loss = backward(model, x, y, processes)
        if processes > 1:
            dist.all_reduce(loss)
        found[f"{what}, world size {processes}"] = _difference(model, loss, truth, backward(truth, all_x, all_y))
    if processes == 1:
        model, truth = build(config, options["ghost"], CPU, torch.float64), build(config, None, CPU, torch.float64)
        chunks = zip(x.split(config.ghost_batch_size), y.split(config.ghost_batch_size), strict=True)
        expected = torch.stack([backward(truth, *chunk) for chunk in chunks])
        for gradient in _gradients(truth):
            gradient /= len(expected)
        found["ghost groups = local on each chunk"] = _difference(model, backward(model, x, y), truth, expected.mean())
    return checked(found)


def checked(differences: dict[str, float]) -> dict[str, float]:
    """``differences``, or WrongError if one exceeds :data:`TOLERANCE`."""
    for what, difference in differences.items():
        if not difference <= TOLERANCE:
            raise WrongError(f"{what}: the steps differ by {difference:.1e}, expected at most {TOLERANCE:.0e}")
    return differences


def _difference(model: nn.Module, loss: Tensor, truth: nn.Module, expected: Tensor) -> float:
    """The largest difference of the losses and of the gradients, relative to the largest gradient of each parameter."""
    pairs = zip(_gradients(model), _gradients(truth), strict=True)
    largest = [(found - true).abs().max() / true.abs().max().clamp(min=1e-6) for found, true in pairs]
    return float(torch.stack([(loss / expected - 1).abs(), *largest]).max())  # unlike Python's max, NaN if one is


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


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
ARMS = ("local", "groups", "sync")  # statistics of each logical GPU, of groups of 4, of all 8

WORLDS = (1, 2, 4)
_VARIANTS = tuple(variants(EMULATED))
STEP_SUITES = (
    *(Suite(f"step on {n}", f"step, world size {n}", "local", _VARIANTS, rows_on=(), separate=True) for n in WORLDS),
    Suite(
        "emulation",
        f"step of {LOGICAL_GPUS} logical GPUs, emulated on one process or on {REAL_PROCESSES} real ones",
        baseline="real",
        needed=("emulated", "real"),
        rows_on=("cpu",),
    ),
)


def run_steps(
    device: torch.device, rounds: int, worlds: Sequence[int] = WORLDS, configs: Sequence[StepConfig] | None = None
) -> tuple[list[Measurement], dict[str, float]]:
    """Check and time the steps on one process and, on the CPU, on several; the timings, and the checks' differences.

    WrongError if steps differ that must be equal, or if a loss has not fallen.
    """
    measurements: list[Measurement] = []
    checks: dict[str, float] = {}
    jobs = []
    for config in configs or CONFIGS[device.type]:
        try:
            build(config, None, device, torch.float32)
        except ImportError as error:
            unavailable = dict.fromkeys(variants(config), str(error))
            measurements.append(Measurement("step on 1", config.shape, "float32", unavailable=unavailable))
            continue
        slow = config.model == "resnet50" and device.type == "cpu"  # a step takes a second
        jobs.append((config, max(3, rounds // 2) if slow else rounds, device))
    for processes in worlds if device.type == "cpu" else (1,):
        progress(f"training steps on {processes} processes")
        differences, timings = steps_job(jobs) if processes == 1 else run_processes(steps_job, processes, jobs)[0]
        checks |= differences
        for (config, _, _), found in zip(jobs, timings, strict=True):
            measurements.append(Measurement(f"step on {processes}", config.shape, "float32", found))
    return measurements, checks


def steps_job(
    jobs: Iterable[tuple[StepConfig, int, torch.device]], small: StepConfig = CHECKED
) -> tuple[dict[str, float], list[dict[str, Timing]]]:
    """Check steps on ``small``, and time each job with its rounds and device, alone or on each process of a world."""
    return check(small), [_time_steps(*job) for job in jobs]


def _time_steps(config: StepConfig, rounds: int, device: torch.device) -> dict[str, Timing]:
    rank, processes = world()
    x, y = make_batch(config, device, torch.float32, rank, processes)
    steps = {}
    for name, options in variants(config).items():
        model = build(config, options, device, torch.float32)
        steps[name] = make_step(wrap(model), x, y, processes)
    first = {name: _total(step) for name, step in steps.items()}
    several = processes > 1
    timings = interleaved(steps, rounds=rounds, device=device, warmup=1 if several else 2, together=several)
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
            raise WrongError(f"{name}: the loss went from {first[name]:.4g} to {loss:.4g}, expected a lower one")


def measure_emulation(rounds: int) -> tuple[list[Measurement], dict[str, float]]:
    """Time a step of 8 logical GPUs on one process against the same step on 4 processes that host two each.

    Both sides have one thread per process, the same global batch, weights and statistics, and they take turns: while
    the one process works, the others wait in a barrier. In the arm ``local`` both sides have ghost groups, and the 4
    processes exchange only gradients. In ``groups`` one process has 2 ghost groups, and the 4 processes share
    statistics in pairs. In ``sync`` all share them. Returns as :func:`run_steps` does.
    """
    progress(f"training step of {LOGICAL_GPUS} logical GPUs on one process and on {REAL_PROCESSES}")
    timings, differences = run_processes(emulation_job, REAL_PROCESSES, rounds, EMULATED, ARMS)[0]
    shapes = {arm: replace(EMULATED.shape, family=f"{EMULATED.model} {arm}") for arm in ARMS}
    found = [Measurement("emulation", shapes[arm], "float32", timings[arm]) for arm in ARMS]
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
        sides = {"emulated": emulated, "real": real}
        timings[arm] = interleaved(sides, rounds=rounds, device=CPU, min_sample=0.0, together=True)
    return timings, differences


def _sides(arm: str, config: StepConfig, dtype: torch.dtype) -> tuple[TrainingStep, TrainingStep]:
    """The step of rank 0 with all images, during which the others have nothing to do, and the step of all ranks."""
    rank, processes = world()
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
    losses = torch.tensor([(_total(one), _total(other)) for _ in range(3)], dtype=torch.float64)
    return float((losses[:, 1] / losses[:, 0] - 1).abs().max())
