"""The result of a run."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of one training run.

    Example:
        >>> from pathlib import Path
        >>> from syncbn.train import RunResult
        >>> def best_error(folder: Path) -> float:
        ...     result = RunResult.from_json(folder / "result.json")
        ...     return min(entry["test_error"] for entry in result.history)
    """

    status: Literal["ok", "diverged"]
    """``diverged``: a training loss was not finite, and the run ended there."""
    test_error: float | None
    """Fraction of test images classified wrongly, after training; None if the run diverged."""
    test_loss: float | None
    """Mean cross entropy over the test set, after training; None if the run diverged."""
    steps: int
    """Optimizer steps taken."""
    samples: int
    """Training images seen."""
    seconds: float
    """Training time without evaluations."""
    images_per_second: float
    """``samples / seconds``."""
    parameters: int
    """Number of trainable parameters."""
    losses: list[float]
    """Mean training loss of each optimizer step."""
    history: list[dict[str, float | int | None]]
    """One entry per evaluation: epoch, step, train_loss, test_error, test_loss."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The trained model on the test set with each kind of statistics. Each entry has ``statistics`` (``running``,
    ``batch`` or ``population``), ``estimator`` (``mean`` or ``total``, for the population variance), ``samples`` (of
    the population), ``test_error`` and ``test_loss``. A norm without batch statistics has ``running`` only. Empty if
    the run diverged."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Divergence of each layer's batch statistics from the population's, in the order of the model, with the fields of
    :class:`syncbn.population.LayerDivergence`. Empty for a norm without batch statistics."""
    peak_memory_bytes: int | None = None
    """Peak memory of rank 0: allocated on a GPU, resident on a CPU; None if unknown."""
    train_images: int | None = None
    """Number of training images; None in a result from before this was recorded."""
    test_images: int | None = None
    """Number of test images; None in a result from before this was recorded."""
    processes: int
    """Number of processes."""
    environment: dict[str, str]
    """Versions, device, git commit."""
    config: dict[str, Any]
    """The full configuration, as nested dictionaries."""

    def to_json(self, path: Path) -> None:
        """Write the result atomically. Numbers that are not finite become null."""
        write_atomically(path, json.dumps(jsonable(asdict(self)), indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, path: Path) -> RunResult:
        """Read what :meth:`to_json` wrote. A null among the losses becomes NaN."""
        values = json.loads(path.read_text())
        values["losses"] = [math.nan if loss is None else loss for loss in values["losses"]]
        return cls(**values)


def jsonable(value: Any) -> Any:
    """``value`` with None in place of numbers that are not finite, which JSON cannot express."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes ``path``: readers, also after a kill, see the whole or the old file."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the whole text or the old file."""
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def environment(device: torch.device) -> dict[str, str]:
    """What may influence the numbers: versions, device, threads, git commit of the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    found = {"python": platform.python_version(), "device": name, "threads": str(torch.get_num_threads())}
    for package in ("syncbn", "torch", "torchvision", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    commit = _git_commit()
    return found if commit is None else found | {"git_commit": commit}


def _git_commit() -> str | None:
    """The commit of the checkout that this file belongs to, with ``-dirty`` if it was changed; None outside of one."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside the checkout of another project.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return commit if commit is None or not git("status", "--porcelain", "-uno") else f"{commit}-dirty"
