"""Does the number of processes change the answer? Train the same configuration under several and compare everything."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.config_io import save_config
from syncbn.train.launch import launch
from syncbn.train.result import RunResult

TOLERANCE = 1e-10
"""Largest difference of a float64 run: rounding of sums taken in another order, grown over the steps."""
_WINDOWS = ("window_second_moment", "window_gradient", "running_second_moment")


@dataclass(frozen=True)
class Trained:
    """What a run left: its losses, and its parameters and buffers by name."""

    losses: Sequence[float]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read the folder of a finished run."""
        from safetensors.torch import load_file

        result = RunResult.from_json(folder / "result.json")
        return cls(result.losses, load_file(folder / "model.safetensors"))


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences between two trainings, relative to 1 or to the larger value where it exceeds 1."""

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


def compare(a: Trained, b: Trained) -> Difference:
    """Compare two trainings. What is not finite, or is there in one alone, differs by infinity."""
    losses = _distance(torch.tensor(a.losses, dtype=torch.float64), torch.tensor(b.losses, dtype=torch.float64))
    by_tensor = {
        name: _distance(a.tensors[name], b.tensors[name]) if name in a.tensors and name in b.tensors else math.inf
        for name in sorted(a.tensors.keys() | b.tensors.keys())
    }
    is_buffer = ("running_mean", "running_var", "num_batches_tracked", *_WINDOWS)
    buffers = [d for name, d in by_tensor.items() if name.endswith(is_buffer)]
    weights = [d for name, d in by_tensor.items() if not name.endswith(is_buffer)]
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
    """Train under each number of processes, print the differences from the first, and return whether all are tiny.

    Raises:
        ConfigError: a number of processes that does not divide the logical GPUs.
        LaunchError: a training failed.
    """
    if len(processes) < 2:
        raise ConfigError("processes", ",".join(map(str, processes)), "at least two numbers to compare")
    for number in processes:
        config.check_processes(number)
    config = parity_config(config, steps)
    folder = Path(tempfile.mkdtemp(prefix="syncbn-parity-"))
    trained = _train_all(config, processes, folder, say, timeout)
    shutil.rmtree(folder)  # not after an error, which speaks of the logs in it
    return all(compare(trained[0], other).largest <= TOLERANCE for other in trained[1:])


def _train_all(
    config: RunConfig, processes: Sequence[int], folder: Path, say: Callable[[str], None], timeout: float
) -> list[Trained]:
    save_config(config, folder / "config.yaml")
    trained: list[Trained] = []
    for index, number in enumerate(processes):
        out = folder / f"{index}-of-{number}"
        arguments: list[Any] = ["train", "--config", folder / "config.yaml", "--out", out, "--device", "cpu"]
        launch(number, list(map(str, arguments)), folder / f"{index}.log", timeout)
        trained.append(Trained.read(out))
        if index == 0:
            reference = f"{number} process{'es' if number > 1 else ''}"
            taken = len(trained[0].losses)
            say(f"{config.norm.name}: {config.gpus} logical GPUs, {taken} steps in fp64, by {reference}")
            continue
        report(compare(trained[0], trained[-1]), number, reference, say)
    return trained


def report(difference: Difference, processes: int, reference: str, say: Callable[[str], None]) -> None:
    """Say how two trainings differ, by tensor where the tolerance is exceeded."""
    verdict = "same" if difference.largest <= TOLERANCE else "DIFFERENT"
    say(
        f"  {processes} processes against {reference}: losses {difference.losses:.1e}, "
        f"weights {difference.weights:.1e}, buffers {difference.buffers:.1e}: {verdict} (tolerance {TOLERANCE:.0e})"
    )
    for name, distance in difference.by_tensor.items():
        if distance > TOLERANCE:
            say(f"    {name}: {distance:.1e}")
