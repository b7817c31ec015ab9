"""Suites: which contenders are compared on which shapes, and their measurements."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from syncbn.bench.correctness import avoid_kinks, errors, references, tolerances
from syncbn.bench.costs import Bandwidth, Costs, measure_costs, saved
from syncbn.bench.peers import CONTENDERS, Contender, LayerStep, UnavailableError
from syncbn.bench.problem import (
    DTYPES,
    GHOST_GROUPS,
    GROUPS,
    Problem,
    Shape,
    ends_block,
    layer_shapes,
    make_problem,
)
from syncbn.bench.timing import Spread, Timing, interleaved, progress, ratio, run_processes

COMPILED_BATCH = 8
PROFILED_CHANNELS = 256  # of layers whose GPU kernels are counted; every family has some, and the profiler is slow
SMALL_ELEMENTS = 1 << 18  # 1 MB in float32: up to here a sample takes a millisecond, and more of them cost little
SMALL_ROUNDS = 3  # times as many rounds for such inputs
LARGE_MEAN = 1e3  # at which the errors of all contenders are shown; the standard deviation is 1


class WrongError(RuntimeError):
    """A result of ours is further from the reference than its tolerance."""


@dataclass(frozen=True)
class Selection:
    """The user's options."""

    device: str
    dtypes: tuple[str, ...]
    families: tuple[str, ...]
    rounds: int
    check: bool = False  # measure only what the rows need
    compiled: bool = False  # measure compiled training steps instead
    instruction_sets: tuple[str, ...] = ()  # of the CPU, each measured in a process of its own; () is that in use
    several_processes: bool = True  # measure also what several processes do together


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    baseline: str  # the contender that the times of the others are divided by
    needed: tuple[str, ...]  # contenders that a row is about
    more: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    batches: tuple[int, ...] = (2, 8, 32)  # samples per process of ResNet-50's shapes
    cpu_elements: int = 1 << 23  # largest input on the CPU, where a pass over 64 MiB takes tens of milliseconds
    keep: Callable[[Shape, torch.dtype], bool] = lambda shape, dtype: True  # which of the families' shapes are measured
    rows_on: tuple[str, ...] = ("cpu", "cuda")  # devices for which there are rows about this suite
    runs_on: tuple[str, ...] = ("cpu", "cuda")
    world_size: int = 1
    more_rounds: int = 1  # times as many rounds as the others
    separate: bool = False  # report each shape by itself, not their geometric mean

    def shapes(self, selection: Selection, dtype: torch.dtype) -> list[Shape]:
        families = [family for family in selection.families if family in self.families]
        found = layer_shapes(families, self.batches, self.cpu_elements if selection.device == "cpu" else None)
        return [shape for shape in found if self.keep(shape, dtype)]

    def rounds(self, selection: Selection, shape: Shape) -> int:
        more = SMALL_ROUNDS if shape.elements <= SMALL_ELEMENTS else 1
        return selection.rounds * max(self.more_rounds, more)


SUITES = (
    Suite(
        "alone",
        "one process, forward and backward",
        baseline="nn.BatchNorm",
        needed=(
            "nn.BatchNorm",
            "SyncBatchNorm",
            "BatchRenorm",
            "GhostBatchNorm of 2 groups",
            "torch's SyncBatchNorm function",
        ),
        more=("textbook", "textbook compiled", "renorm of eager ops", "torchrl's BatchRenorm1d"),
        families=("resnet50", "detector", "unet3d", "mlp", "small", "tiny"),
        cpu_elements=1 << 24,
    ),
    Suite(
        "host",
        "a layer of 1 KB on one process: the time of the host",
        baseline="nn.BatchNorm",
        needed=("nn.BatchNorm", "SyncBatchNorm", "BatchRenorm", "GhostBatchNorm of 2 groups"),
        more=("torch's SyncBatchNorm function",),
        families=("host",),
        rows_on=("cpu",),
        more_rounds=30,
    ),
    Suite(
        "pair",
        "two processes that share statistics over gloo, time of the slower one",
        baseline="textbook",
        needed=("nn.BatchNorm", "SyncBatchNorm", "textbook", "textbook compiled"),
        more=("textbook compiled, sums together",),
        families=("resnet50", "unet3d", "mlp", "tiny"),
        batches=(2, 8),
        rows_on=("cpu",),
        runs_on=("cpu",),
        world_size=2,
    ),
    Suite(
        "ghost",
        f"{GROUPS} ghost groups",
        baseline="loop over chunks",
        needed=("GhostBatchNorm", "GhostBatchNorm of 1 group", "loop over chunks"),
        families=("resnet50", "mlp", "tiny"),
        batches=(GROUPS, 2 * GROUPS),
        keep=lambda shape, dtype: shape.size[0] % GROUPS == 0,
    ),
    Suite(
        "fused",
        "normalization, residual and ReLU",
        baseline="nn.BatchNorm, add, ReLU",
        needed=("SyncBatchNorm + add + ReLU", "nn.BatchNorm, add, ReLU"),
        families=("resnet50", "tiny"),
        keep=lambda shape, dtype: ends_block(shape),
        rows_on=("cuda",),
    ),
    Suite(
        "activation",
        "normalization and ReLU",
        baseline="nn.BatchNorm, ReLU",
        needed=(),
        more=("SyncBatchNorm + ReLU", "nn.BatchNorm, ReLU", "timm's BatchNormAct2d"),
        families=("resnet50", "tiny"),
        keep=lambda shape, dtype: ends_block(shape),
        rows_on=(),
    ),
    Suite(
        "large",
        "inputs over 100 MB, against the copy bandwidth",
        baseline="nn.BatchNorm",
        needed=("SyncBatchNorm",),
        more=("nn.BatchNorm",),
        families=("resnet50", "detector"),
        batches=(32, 64),
        keep=lambda shape, dtype: shape.elements * dtype.itemsize >= 100_000_000,  # launches and caches do not matter
        rows_on=("cuda",),
        runs_on=("cuda",),
    ),
)


def suites_of(selection: Selection) -> list[Suite]:
    """The suites to run: all, or those that rows need."""
    suites = [s for s in SUITES if selection.device in (s.rows_on if selection.check else s.runs_on)]
    return [suite for suite in suites if suite.world_size == 1 or selection.several_processes]


@dataclass
class Measurement:
    """The contenders of a suite on one shape and dtype."""

    suite: str
    shape: Shape
    dtype: str
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """By contender and tensor, relative to the tensor's largest element."""
    costs: dict[str, Costs] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)  # contenders that were not timed, and why

    @property
    def wrong(self) -> list[str]:
        """Contenders that exceed the tolerances of our layers."""
        return [name for name in self.errors if self.excess(name)]

    def excess(self, name: str) -> list[str]:
        """A sentence for each tensor of a contender that exceeds its tolerance. NaN does."""
        limits = tolerances(DTYPES[self.dtype], self.shape.elements // self.shape.size[1])
        return [
            f"{tensor} is off the float64 reference by {error:.2g} of its largest element, allowed {limits[tensor]:.2g}"
            for tensor, error in self.errors[name].items()
            if not error <= limits[tensor]
        ]

    def ratio(self, numerator: str, denominator: str) -> Spread:
        return ratio(self.timings[numerator], self.timings[denominator])

    def memory_limit(self, bandwidth: Bandwidth) -> float:
        """The least seconds of a step."""
        return bandwidth.seconds(self.shape, DTYPES[self.dtype])


def run_suite(suite: Suite, selection: Selection) -> list[Measurement]:
    """Check, time and measure a suite's contenders on all its shapes; WrongError if a layer of ours is wrong."""
    if suite.world_size == 1:
        answer = _measure_all(suite.name, selection)
    else:
        answer = run_processes(_measure_all, suite.world_size, suite.name, selection, timeout=1800.0)[0]
    if isinstance(answer, WrongError):
        raise answer
    return answer


def _measure_all(name: str, selection: Selection) -> list[Measurement] | WrongError:
    """The measurements of a suite, or the error, which all ranks of the suite's world return together."""
    suite = next(suite for suite in SUITES if suite.name == name)
    group = dist.group.WORLD if suite.world_size > 1 else None
    result = []
    with warnings.catch_warnings():
        # Peers call deprecated functions of torch, as the code that they stand for does.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"syncbn\.bench")
        for dtype in selection.dtypes:
            shapes = suite.shapes(selection, DTYPES[dtype])
            for index, shape in enumerate(shapes, 1):
                progress(f"{suite.name} {dtype} {index}/{len(shapes)}: {shape.label}")
                try:
                    result.append(measure(suite, selection, shape, dtype, group))
                except WrongError as error:
                    return error
    return result


def measure(
    suite: Suite, selection: Selection, shape: Shape, dtype: str, group: dist.ProcessGroup | None
) -> Measurement:
    """Check the contenders on one shape, then time them in turns, then measure their costs."""
    device = torch.device(selection.device)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    parts = [make_problem(shape, DTYPES[dtype], device, rank=r, group=group) for r in range(ranks)]
    found = Measurement(suite.name, shape, dtype)
    contenders = [CONTENDERS[name] for name in (suite.needed if selection.check else suite.needed + suite.more)]
    if shape.channels_last or (shape.family == "resnet50" and shape.size[0] != COMPILED_BATCH):
        skipped = [c for c in contenders if c.compiled and c.name not in suite.needed]
        reason = f"each compilation takes seconds; done only for contiguous inputs, ResNet-50's at N={COMPILED_BATCH}"
        found.unavailable = {contender.name: reason for contender in skipped}
        contenders = [contender for contender in contenders if contender not in skipped]
    steps = _checked_steps(contenders, parts, rank, found)
    found.timings = interleaved(steps, rounds=suite.rounds(selection, shape), device=device, together=group is not None)
    for name, step in steps.items():
        known, numbers = (*step.known, *step.buffers), shape.size[1] * GHOST_GROUPS.get(CONTENDERS[name].kind, 1)
        if selection.check:  # no row is about other costs
            if CONTENDERS[name].ours:
                found.costs[name] = Costs(**saved(step, known, numbers), missing="all else: left out by --check")
            continue
        found.costs[name] = measure_costs(
            step,
            known,
            device=device,
            channels_and_groups=numbers,
            compiled=CONTENDERS[name].compiled,
            profiled=not selection.check and (shape.size[1] == PROFILED_CHANNELS or shape.family == "tiny"),
        )
    return found


def large_mean_errors(selection: Selection) -> Measurement:
    """Every contender's errors at a mean of :data:`LARGE_MEAN` and a standard deviation of 1, in float32; no times."""
    found = Measurement("large mean", Shape("large mean", (GROUPS, 64, 14, 14)), "float32")
    problem = make_problem(found.shape, torch.float32, torch.device(selection.device), mean=LARGE_MEAN, std=1.0)
    contenders = [contender for contender in CONTENDERS.values() if contender.ours or not selection.check]
    _checked_steps(contenders, [problem], 0, found)
    return found


def _checked_steps(
    contenders: Sequence[Contender], parts: Sequence[Problem], rank: int, found: Measurement
) -> dict[str, LayerStep]:
    """The steps of the contenders that can run, each run once; WrongError if a layer of ours is wrong.

    The errors, or why a contender is unavailable, are added to ``found``. Errors are the maximum over the processes, so
    that all time the same contenders and raise together.
    """
    if any("relu" in contender.kind for contender in contenders):
        avoid_kinks(parts)
    expected = references(parts, rank)
    steps = {}
    for contender in contenders:
        try:
            step = contender.make(parts[rank])
            found.errors[contender.name] = errors(step(), expected(contender.kind))
            steps[contender.name] = step
        except UnavailableError as error:
            found.unavailable[contender.name] = str(error)
        except Exception as error:
            if contender.ours:
                raise
            found.unavailable[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if (group := parts[rank].group) is not None:
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, (found.errors, found.unavailable), group=group)
        for _, unavailable in everyone:
            found.unavailable |= unavailable
        for name in found.unavailable:
            found.errors.pop(name, None)
        for name, own in found.errors.items():
            found.errors[name] = {tensor: max(errors[name][tensor] for errors, _ in everyone) for tensor in own}
    for name in found.wrong:
        if CONTENDERS[name].ours:
            raise WrongError(f"{name} on {found.shape.label}, {found.dtype}: {'; '.join(found.excess(name))}")
    return {name: step for name, step in steps.items() if name in found.errors}


@contextlib.contextmanager
def world_of_one(device: torch.device) -> Iterator[None]:
    """On CUDA, a process group of this process alone, which torch's SyncBatchNorm function needs."""
    if device.type == "cuda":
        dist.init_process_group("nccl" if dist.is_nccl_available() else "gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if device.type == "cuda":
            dist.destroy_process_group()
