"""Training steps under torch.compile, with each normalization: how long they take, and how long to compile."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from syncbn.bench.steps import CPU, Options, StepConfig, TrainingStep, build, make_batch, make_step, variants
from syncbn.bench.suites import Measurement, Suite, WrongError
from syncbn.bench.timing import Timing, interleaved, progress, run_with_environment

COMPILED = StepConfig("resnet18", 8, 64, 4)  # two ghost groups
TOLERANCE = 1e-4  # of the relative difference from the eager losses in float32, of which the second follows an update

COMPILED_SUITES = tuple(
    Suite(name, title, "local", tuple(variants(COMPILED)), rows_on=("cpu",), runs_on=("cpu",), separate=True)
    for name, title in (("compiled", "compiled step"), ("compilation", "first step with cold caches, which compiles"))
)


def measure_compiled(rounds: int, config: StepConfig = COMPILED) -> list[Measurement]:
    """Time the compilation once for each normalization, then the compiled steps in turns.

    Each compilation has a process and a cache folder of its own. The process that times the steps finds what they have
    compiled in a copy of their folders. WrongError if a compiled step's loss is not that of the eager one.
    """
    try:
        build(config, None, CPU, torch.float32)
    except ImportError as error:
        unavailable = dict.fromkeys(variants(config), str(error))
        return [Measurement(suite.name, config.shape, "float32", unavailable=unavailable) for suite in COMPILED_SUITES]
    compilation = {}
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, "everything")
        for name, options in variants(config).items():
            progress(f"compilation of {config.model}, {name}")
            own = Path(folder, name)
            compilation[name] = Timing((run_with_environment(_caches(own), first_step_seconds, config, options),))
            shutil.copytree(own, everything, dirs_exist_ok=True)
        progress(f"compiled steps of {config.model}")
        timings = run_with_environment(_caches(everything), time_compiled_steps, rounds, config)
    found = {"compiled": timings, "compilation": compilation}
    return [Measurement(suite.name, config.shape, "float32", found[suite.name]) for suite in COMPILED_SUITES]


def _caches(folder: Path) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder)}


def first_step_seconds(config: StepConfig, options: Options) -> float:
    """The time of the first step of a compiled model."""
    torch.set_num_threads(1)
    torch.compile(torch.sin)(torch.ones(64, requires_grad=True)).sum().backward()  # loads the compiler
    step = _step(config, options, compiled=True)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_compiled_steps(rounds: int, config: StepConfig) -> dict[str, Timing]:
    torch.set_num_threads(1)
    steps = {}
    for name, options in variants(config).items():
        eager, compiled = _step(config, options, compiled=False), _step(config, options, compiled=True)
        for _ in range(2):
            expected, loss = float(eager()), float(compiled())
            if not abs(loss / expected - 1) <= TOLERANCE:
                raise WrongError(f"compiled {config.model}, {name}: the loss is {loss:.6g}, expected {expected:.6g}")
        steps[name] = compiled
    return interleaved(steps, rounds=rounds, device=CPU)


def _step(config: StepConfig, options: Options, *, compiled: bool) -> TrainingStep:
    model: Any = build(config, options, CPU, torch.float32)
    if compiled:
        model = torch.compile(model, fullgraph=True)
    return make_step(model, *make_batch(config, CPU, torch.float32))
