"""Suites: which contenders meet on which shapes, and what came of it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from syncbn.bench.correctness import References, avoid_kinks, errors, tolerances
from syncbn.bench.figures import Figures, measure_figures
from syncbn.bench.peers import CONTENDERS, Contender, Step, UnavailableError
from syncbn.bench.problem import Problem, make_problem
from syncbn.bench.processes import interleaved_together, run_processes
from syncbn.bench.shapes import (
    DTYPES,
    Shape,
    ghost_shapes,
    large_shapes,
    layer_shapes,
    residual_shapes,
)
from syncbn.bench.timing import Spread, Timing, interleaved, ratio

GROUPS = 32
BATCHES = (2, 8, 32)
COMPILED_BATCH = 8
"""Where compiled contenders are not needed for the table, they are timed at this batch alone: each compiles."""

PROFILED_CHANNELS = 256
"""Layers of so many channels have their GPU kernels counted: every family has some, and counting takes longer than
timing."""

LARGE_MEAN = 1e3
"""Mean, at a standard deviation of 1, at which the contenders' errors are shown."""

WORLD_TIMEOUT_SECONDS = 1800.0


class WrongError(Exception):
    """One of our own layers is not within its tolerance of the reference."""


@dataclass(frozen=True)
class Selection:
    """What the user asked for."""

    device: str
    dtypes: tuple[str, ...]
    families: tuple[str, ...]
    rounds: int
    check: bool = False
    """Only what the table needs."""


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    baseline: str
    """The contender that the others' times are divided by."""
    needed: tuple[str, ...]
    """Contenders that rows of the table are about."""
    more: tuple[str, ...]
    shapes: Callable[[Selection, torch.dtype], list[Shape]]
    rows_on: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which there are rows about it."""
    runs_on: tuple[str, ...] = ("cpu", "cuda")
    world_size: int = 1


@dataclass
class Measurement:
    """What the contenders of a suite did on one shape and dtype."""

    suite: str
    shape: Shape
    dtype: str
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """By contender and tensor, relative to the tensor's largest element."""
    figures: dict[str, Figures] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Contenders that were not timed, with the reason."""

    @property
    def wrong(self) -> list[str]:
        """Contenders further from the reference than ours may be."""
        return [name for name in self.errors if self.excess(name)]

    def excess(self, name: str) -> list[str]:
        """The tensors of a contender that are, in words; a figure that is no number is too."""
        limits = tolerances(DTYPES[self.dtype], self.shape.elements // self.shape.size[1])
        return [
            f"{tensor} is off the float64 reference by {error:.2g} of its largest element, allowed {limits[tensor]:.2g}"
            for tensor, error in self.errors[name].items()
            if not error <= limits[tensor]
        ]

    def ratio(self, numerator: str, denominator: str) -> Spread:
        return ratio(self.timings[numerator], self.timings[denominator])


# -- the suites --------------------------------------------------------------------------------------------------------


def _limit(selection: Selection, elements: int) -> int | None:
    """Largest inputs on the CPU, where a pass over 64 MiB takes tens of milliseconds; none on CUDA."""
    return elements if selection.device == "cpu" else None


def _alone_shapes(selection: Selection, dtype: torch.dtype) -> list[Shape]:
    return layer_shapes(selection.families, BATCHES, _limit(selection, 1 << 24))


def _pair_shapes(selection: Selection, dtype: torch.dtype) -> list[Shape]:
    return layer_shapes(
        [name for name in selection.families if name != "detector"], BATCHES[:2], _limit(selection, 1 << 23)
    )


def _ghost_shapes(selection: Selection, dtype: torch.dtype) -> list[Shape]:
    return ghost_shapes(selection.families, GROUPS, _limit(selection, 1 << 23))


def _residual_shapes(selection: Selection, dtype: torch.dtype) -> list[Shape]:
    return residual_shapes(selection.families, BATCHES, _limit(selection, 1 << 23))


def _large_shapes(selection: Selection, dtype: torch.dtype) -> list[Shape]:
    return large_shapes(selection.families, dtype)


SUITES = (
    Suite(
        "alone",
        "one process, forward and backward",
        "nn.BatchNorm",
        ("nn.BatchNorm", "SyncBatchNorm", "BatchRenorm", "torch's SyncBatchNorm function"),
        ("textbook", "textbook compiled", "renorm of eager ops", "torchrl's BatchRenorm1d"),
        _alone_shapes,
    ),
    Suite(
        "pair",
        "two processes that share statistics over gloo, the slower one's time",
        "textbook",
        ("nn.BatchNorm", "SyncBatchNorm", "textbook", "textbook compiled"),
        ("textbook compiled, sums together",),
        _pair_shapes,
        rows_on=("cpu",),
        runs_on=("cpu",),
        world_size=2,
    ),
    Suite(
        "ghost",
        f"{GROUPS} ghost groups",
        "loop over chunks",
        ("GhostBatchNorm", "GhostBatchNorm of 1 group", "loop over chunks"),
        (),
        _ghost_shapes,
    ),
    Suite(
        "fused",
        "normalization, residual and ReLU",
        "nn.BatchNorm, add, ReLU",
        ("SyncBatchNorm + add + ReLU", "nn.BatchNorm, add, ReLU"),
        (),
        _residual_shapes,
        rows_on=("cuda",),
    ),
    Suite(
        "activation",
        "normalization and ReLU",
        "nn.BatchNorm, ReLU",
        (),
        ("SyncBatchNorm + ReLU", "nn.BatchNorm, ReLU", "timm's BatchNormAct2d"),
        _residual_shapes,
        rows_on=(),
    ),
    Suite(
        "large",
        "inputs over 100 MB, against the copy bandwidth",
        "nn.BatchNorm",
        ("SyncBatchNorm",),
        ("nn.BatchNorm",),
        _large_shapes,
        rows_on=("cuda",),
        runs_on=("cuda",),
    ),
)


def contenders_of(suite: Suite, selection: Selection) -> list[Contender]:
    names = suite.needed if selection.check else suite.needed + suite.more
    return [CONTENDERS[name] for name in names]


def suites_of(selection: Selection) -> list[Suite]:
    """The suites that are run: those that rows of the table need, or all."""
    allowed = "rows_on" if selection.check else "runs_on"
    return [suite for suite in SUITES if selection.device in getattr(suite, allowed)]


# -- running them ------------------------------------------------------------------------------------------------------


def progress(text: str) -> None:
    """A line for whoever waits, from one process of those that are there."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run_suite(suite: Suite, selection: Selection) -> list[Measurement]:
    """Check, time and measure a suite's contenders on all its shapes.

    Raises:
        WrongError: one of our layers is off; nothing was timed on that shape.
    """
    if suite.world_size == 1:
        return _run(suite, selection, None)
    answers = run_processes(_run_in_world, suite.world_size, suite.name, selection, timeout=WORLD_TIMEOUT_SECONDS)
    measurements, wrong = answers[0]
    if wrong:
        raise WrongError(wrong)
    return list(measurements)


def _run_in_world(name: str, selection: Selection) -> tuple[list[Measurement], str]:
    suite = next(suite for suite in SUITES if suite.name == name)
    # What peers call may be deprecated; it is what is pasted all the same.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"syncbn\.bench")
    try:
        return _run(suite, selection, dist.group.WORLD), ""
    except WrongError as error:  # all ranks raise it together
        return [], str(error)


def _run(suite: Suite, selection: Selection, group: dist.ProcessGroup | None) -> list[Measurement]:
    result = []
    for dtype in selection.dtypes:
        shapes = suite.shapes(selection, DTYPES[dtype])
        for index, shape in enumerate(shapes, 1):
            progress(f"{suite.name} {dtype} {index}/{len(shapes)}: {shape.label}")
            result.append(measure(suite, selection, shape, dtype, group))
    return result


def measure(
    suite: Suite, selection: Selection, shape: Shape, dtype: str, group: dist.ProcessGroup | None
) -> Measurement:
    """One shape: the contenders are checked first, then timed in turns, then their figures taken."""
    device = torch.device(selection.device)
    ranks = range(1 if group is None else group.size())
    rank = 0 if group is None else group.rank()
    parts = [make_problem(shape, DTYPES[dtype], device, groups=GROUPS, rank=r, group=group) for r in ranks]
    found = Measurement(suite.name, shape, dtype)
    if any("relu" in contender.kind for contender in contenders_of(suite, selection)):
        avoid_kinks(parts)
    references = References(parts, rank)
    steps: dict[str, Step] = {}
    for contender in contenders_of(suite, selection):
        try:
            if contender.compiled and contender.name not in suite.needed and _skips_compiling(shape):
                raise UnavailableError(
                    f"compiled once a size, ResNet-50's at N={COMPILED_BATCH} alone: each takes seconds"
                )
            step = contender.make(parts[rank])
            found.errors[contender.name] = errors(step(), references.of(contender.kind))
            steps[contender.name] = step
        except UnavailableError as error:
            found.unavailable[contender.name] = str(error)
        except Exception as error:
            if contender.ours:  # a peer may fail in any way, and is left out with the reason
                raise
            found.unavailable[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    _share_errors(found, group)
    _require_right(found)
    steps = {name: step for name, step in steps.items() if name in found.errors}
    if group is None:
        found.timings = interleaved(steps, rounds=selection.rounds, device=device)
    else:
        found.timings = interleaved_together(steps, rounds=selection.rounds, group=group)
    for name, step in steps.items():
        found.figures[name] = figures_of(CONTENDERS[name], step, parts[rank])
    return found


def _skips_compiling(shape: Shape) -> bool:
    return shape.channels_last or (shape.family == "resnet50" and shape.size[0] != COMPILED_BATCH)


def figures_of(contender: Contender, step: Step, problem: Problem) -> Figures:
    groups = problem.groups if contender.kind == "ghost" else 1
    return measure_figures(
        step,
        (*step.known, *step.buffers),
        device=problem.device,
        channels_and_groups=problem.num_features * groups,
        compiled=contender.compiled,
        profiled=problem.num_features == PROFILED_CHANNELS or problem.shape.family == "tiny",
    )


def _share_errors(found: Measurement, group: dist.ProcessGroup | None) -> None:
    """The largest over the processes, so that all come to the same verdict and time the same contenders."""
    if group is None:
        return
    everyone: list[dict[str, dict[str, float]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyone, found.errors, group=group)
    for name, own in list(found.errors.items()):
        if not all(name in other for other in everyone):
            del found.errors[name]
            found.unavailable[name] = "it failed on another process"
            continue
        for tensor in own:
            own[tensor] = max(other[name][tensor] for other in everyone)


def _require_right(found: Measurement) -> None:
    for name in found.wrong:
        if CONTENDERS[name].ours:
            raise WrongError(f"{name} on {found.shape.label}, {found.dtype}: {'; '.join(found.excess(name))}")


def large_mean_errors(selection: Selection) -> Measurement:
    """Every contender's errors at a mean of :data:`LARGE_MEAN` and a standard deviation of 1, in float32; no times."""
    shape = Shape("large mean", (GROUPS, 64, 14, 14))
    found = Measurement("large mean", shape, "float32")
    device = torch.device(selection.device)
    problem = make_problem(shape, torch.float32, device, groups=GROUPS, mean=LARGE_MEAN, std=1.0)
    avoid_kinks([problem])
    references = References([problem], 0)
    for contender in CONTENDERS.values():
        if selection.check and not contender.ours:
            continue
        try:
            found.errors[contender.name] = errors(contender.make(problem)(), references.of(contender.kind))
        except Exception as error:
            if contender.ours:
                raise
            found.unavailable[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    _require_right(found)
    return found


@contextlib.contextmanager
def world_of_one(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, which torch's SyncBatchNorm function asks for; on CUDA only."""
    if device.type != "cuda" or dist.is_initialized() or not dist.is_available():
        yield
        return
    backend = "nccl" if dist.is_nccl_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{Path(folder, 'rendezvous')}"
        dist.init_process_group(backend, init_method=where, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
