"""A check that the number of processes does not change a run: train it under several numbers and compare everything."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from syncbn.train.config import RunConfig, require, save_config
from syncbn.train.launch import launch
from syncbn.train.result import RunResult
from syncbn.train.stored import load_tensors

TOLERANCE = 1e-10
"""Largest accepted difference in float64: sums in another order round differently, and this grows over the steps."""
_MOVING_AVERAGE = ("window_second_moment", "window_gradient", "running_second_moment")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", *_MOVING_AVERAGE)


@dataclass(frozen=True)
class Trained:
    """The losses of a finished run, and its parameters and buffers by name."""

    losses: Sequence[float]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Trained:
        return cls(RunResult.from_json(folder / "result.json").losses, load_tensors(folder / "model.safetensors"))


@dataclass(frozen=True)
class Difference:
    """Largest differences between two runs: absolute for values up to 1, else relative."""

    losses: float
    weights: float
    buffers: float
    by_tensor: dict[str, float]

    @property
    def largest(self) -> float:
        return max(self.losses, self.weights, self.buffers)


def parity_config(config: RunConfig, steps: int) -> RunConfig:
    """The configuration in fp64, cut to ``steps`` optimizer steps."""
    budget = replace(config.budget, epochs=None, steps=steps, checkpoint_every=0)
    return replace(config, precision="fp64", budget=budget)


def compare_runs(a: Trained, b: Trained) -> Difference:
    """Compare two runs. A value that is not finite, or a tensor that only one run has, differs by infinity."""
    losses = _distance(torch.tensor(a.losses, dtype=torch.float64), torch.tensor(b.losses, dtype=torch.float64))
    by_tensor = {
        name: _distance(a.tensors[name], b.tensors[name]) if name in a.tensors and name in b.tensors else math.inf
        for name in sorted(a.tensors.keys() | b.tensors.keys())
    }
    buffers = [d for name, d in by_tensor.items() if name.endswith(_BUFFERS)]
    weights = [d for name, d in by_tensor.items() if not name.endswith(_BUFFERS)]
    return Difference(losses, max(weights, default=0.0), max(buffers, default=0.0), by_tensor)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    a, b = a.double(), b.double()
    distance = ((a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp(min=1)).nan_to_num(nan=math.inf)
    return float(distance.max()) if distance.numel() else 0.0


def run_parity(
    config: RunConfig, processes: Sequence[int], steps: int, say: Callable[[str], None], timeout: float = 1800
) -> bool:
    """Train a configuration for some optimizer steps, in fp64 on the CPU, under at least two numbers of processes.

    ``say`` is called with each line of the report, which compares the others with the first. One training may take
    ``timeout`` seconds. Returns whether all differences are within :data:`TOLERANCE`.

    Raises:
        ConfigError: a number of processes does not divide the logical GPUs.
        LaunchError: a training failed.
    """
    require(steps >= 1, "steps", steps, "an integer of at least 1")
    require(len(processes) > 1, "processes", ",".join(map(str, processes)), "at least two numbers to compare")
    for number in processes:
        config.check_processes(number)
    config = parity_config(config, steps)
    folder = Path(tempfile.mkdtemp(prefix="syncbn-parity-"))
    save_config(config, folder / "config.yaml")
    first = _train(folder, 0, processes[0], timeout)
    reference = f"{processes[0]} process{'es' if processes[0] > 1 else ''}"
    say(f"{config.norm.name}: {config.gpus} logical GPUs, {len(first.losses)} steps in fp64, by {reference}")
    same = True
    for index, number in enumerate(processes[1:], start=1):
        d = compare_runs(first, _train(folder, index, number, timeout))
        verdict = "same" if d.largest <= TOLERANCE else "DIFFERENT"
        figures = f"losses {d.losses:.1e}, weights {d.weights:.1e}, buffers {d.buffers:.1e}"
        say(f"  {number} processes against {reference}: {figures}: {verdict} (tolerance {TOLERANCE:.0e})")
        for name, distance in d.by_tensor.items():
            if distance > TOLERANCE:
                say(f"    {name}: {distance:.1e}")
        same &= verdict == "same"
    shutil.rmtree(folder)  # kept after an error, whose message names the logs in it
    return same


def _train(folder: Path, index: int, processes: int, timeout: float) -> Trained:
    out = folder / f"{index}-of-{processes}"
    words = ["train", "--config", str(folder / "config.yaml"), "--out", str(out), "--device", "cpu"]
    launch(processes, words, folder / f"{index}.log", timeout)
    return Trained.read(out)
