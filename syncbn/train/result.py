"""What a run returns and leaves behind."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

_PACKAGES = ("syncbn", "torch", "torchvision", "accelerate")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of one training run."""

    status: Literal["ok", "diverged"]
    """``diverged``: a training loss was not finite, and the run ended there."""
    test_error: float | None
    """Fraction of test images whose class is wrong, after training; None for a run that diverged."""
    test_loss: float | None
    """Mean cross entropy over the test set, after training."""
    steps: int
    """Optimizer steps taken."""
    samples: int
    """Training images seen."""
    seconds: float
    """Time spent training, evaluations left out."""
    images_per_second: float
    """``samples / seconds``."""
    parameters: int
    """Trainable numbers of the model."""
    losses: list[float]
    """Mean training loss of each optimizer step."""
    history: list[dict[str, float | int | None]]
    """One entry an evaluation: epoch, step, train_loss, test_error, test_loss."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The trained model on the test set under each kind of statistics, one entry each: ``statistics`` (``running``,
    ``batch`` or ``population``), ``estimator`` (``mean`` or ``total``, of the population's variance), ``samples`` (that
    the population statistics are of), ``test_error``, ``test_loss``. Without batch statistics there is ``running``
    alone. Empty for a run that diverged."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """How far each layer's batch statistics are from the population's, in the order of the model; see
    :class:`syncbn.population.LayerDivergence` for the keys. Empty without batch statistics."""
    peak_memory_bytes: int | None = None
    """Largest memory of the first process: allocated on a GPU, resident on a CPU; None where it cannot be told."""
    train_images: int | None = None
    """Images in the training set; None in a result from before this was recorded."""
    test_images: int | None = None
    """Images in the test set; None in a result from before this was recorded."""
    processes: int
    """Processes that executed the run."""
    environment: dict[str, str]
    """Versions, device, git commit."""
    config: dict[str, Any]
    """The resolved configuration."""

    def to_json(self, path: Path) -> None:
        """Write atomically; a number that is not finite is written as null."""
        write_atomically(path, json.dumps(jsonable(asdict(self)), indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, path: Path) -> RunResult:
        """Read what :meth:`to_json` wrote; null among the losses is NaN again."""
        values = json.loads(path.read_text())
        values["losses"] = [math.nan if loss is None else loss for loss in values["losses"]]
        return cls(**values)


def jsonable(value: Any) -> Any:
    """``value`` with null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader, or a kill half-way, never meets a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers may depend on: versions, device, threads, git commit of the code."""
    found = {
        "python": platform.python_version(),
        "device": _device_name(device),
        "threads": str(torch.get_num_threads()),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    commit = git_commit(Path(__file__).parent)
    return found if commit is None else found | {"git_commit": commit}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that ``folder`` lies in, ``-dirty`` if it was changed; None outside of one."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's checkout, whose commit says nothing about it.
    if git("ls-files", "--error-unmatch", Path(__file__).name if folder == Path(__file__).parent else ".") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return commit if commit is None or not git("status", "--porcelain", "-uno") else f"{commit}-dirty"
