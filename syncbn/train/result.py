"""The result of a run."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

ROUNDING = 1e-3
"""How far a fraction may lie beyond 0 and 1: the rounding of half precision, in which a user may have computed it."""


@dataclass(frozen=True)
class Metric:
    """What the runs of a task are compared by."""

    name: str
    """As the task's metrics name it."""
    higher_is_better: bool = False
    """Whether a higher value is the better one."""
    percent: bool = True
    """Whether values are fractions from 0 to 1, which are shown in percent. A value that may be negative, such as a
    correlation, is not: it is a number."""
    of_samples: bool = False
    """Whether a value is a fraction of the samples: it then moves in steps of 1 / samples."""

    @property
    def sign(self) -> int:
        """1 if the lower of two values is the better one, else -1."""
        return -1 if self.higher_is_better else 1

    def shown(self, value: float) -> str:
        """A value in words: "12.3 %", "0.0213"."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"

    def problem(self, value: float, name: str | None = None) -> str | None:
        """Why a finite value, under this name, is none of this metric, in words; None if it may be one."""
        outside = math.isfinite(value) and not -ROUNDING <= value <= 1 + ROUNDING
        if not (self.percent and outside):
            return None
        return f"{value:.6g} for {name or self.name!r}, which is in percent: expected a fraction from 0 to 1"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of one training run.

    Example:
        >>> from pathlib import Path
        >>> from syncbn.train import RunResult
        >>> def best_score(folder: Path) -> float:
        ...     result = RunResult.from_json(folder / "result.json")
        ...     return min(entry["test"][result.metric.name] for entry in result.history)
    """

    status: Literal["ok", "diverged"]
    """``diverged``: a training loss was not finite, and the run ended there; or the last test loss is not finite."""
    task: str
    """What was trained: the configuration's ``task.name``."""
    metric: Metric
    """The task's metric that arms are compared by."""
    test: dict[str, float | None] | None
    """The trained model's loss (``loss``) and metrics on the test set; None if the run diverged. A training loop of the
    user's has the metrics that it returned."""
    validation: dict[str, float | None] | None = None
    """The same on the validation set; None without one, or if the run diverged."""
    steps: int
    """Optimizer steps taken."""
    samples: int | None
    """Training samples seen. Numbers of samples and parameters are None for a training loop of the user's."""
    seconds: float
    """Training time without evaluations."""
    samples_per_second: float | None
    """``samples / seconds``."""
    parameters: int | None
    """Number of trainable parameters."""
    losses: list[float]
    """Mean training loss of each optimizer step."""
    history: list[dict[str, Any]]
    """One entry per evaluation: ``epoch``, ``step``, ``train_loss``, and ``test`` and ``validation`` as above."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The trained model on the test set with each kind of statistics. Each entry has ``statistics`` (``running``,
    ``batch`` or ``population``), ``estimator`` (``mean`` or ``total``, for the population variance), ``samples`` (of
    the population) and ``test``, as above, or None if it could not be computed. A norm without batch statistics has
    ``running`` only. Empty if the run diverged."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Divergence of each layer's batch statistics from the population's, in the order of the model, with the fields of
    :class:`syncbn.population.LayerDivergence`. Empty for a norm without batch statistics."""
    peak_memory_bytes: int | None = None
    """Peak memory of rank 0: allocated on a GPU, resident on a CPU; None if unknown."""
    train_samples: int | None
    """Number of training samples."""
    validation_samples: int | None
    """Number of validation samples."""
    test_samples: int | None
    """Number of test samples."""
    processes: int
    """Number of processes."""
    environment: dict[str, str]
    """Versions, device, git commit."""
    config: dict[str, Any]
    """The full configuration, as nested dictionaries."""

    @property
    def score(self) -> float:
        """The value of :attr:`metric` on the test set, NaN if the run diverged."""
        value = None if self.test is None else self.test[self.metric.name]
        return math.nan if value is None else value

    def to_json(self, path: Path) -> None:
        """Write the result atomically. Numbers that are not finite become null."""
        write_atomically(path, json.dumps(jsonable(asdict(self)), indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, path: Path) -> RunResult:
        """Read what :meth:`to_json` wrote. A null among the losses becomes NaN.

        Raises:
            ConfigError: the file is missing or damaged, or another version of the package wrote it.
        """
        from syncbn.train.config import ConfigError
        from syncbn.train.stored import read_json

        values = read_json(path, "result")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            expected = f"a result that this version of syncbn can read ({error}); move it away to run that run again"
            raise ConfigError("result", path, expected) from None

    @classmethod
    def from_dict(cls, values: Any) -> RunResult:
        """The result whose fields, as JSON has them, are ``values``. Raises ValueError if they are none."""
        from syncbn.train.result_content import wrong_field

        try:
            losses = [math.nan if loss is None else loss for loss in values["losses"]]
            result = cls(**{**values, "losses": losses, "metric": Metric(**values["metric"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if (wrong := wrong_field(result)) is not None:
            raise ValueError(f"its {wrong} is of another kind")
        return result


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
        with naming(path):
            yield unfinished
            unfinished.replace(path)
    finally:
        with suppress(OSError):  # of a read-only folder; the error itself says more
            unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the whole text or the old file."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name ``path``: one of a write, as to a full disk, names no file, or one of a passing name."""
    try:
        yield
    except OSError as error:
        passing = str(path.with_name(f".{path.name}"))
        if error.filename is not None and not str(error.filename).startswith(passing):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def environment(device: torch.device) -> dict[str, str]:
    """What may influence the numbers: versions, device, threads, git commit of the code."""
    import torch  # not above: the command line reads options and results without it

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    found = {"python": platform.python_version(), "device": name, "threads": str(torch.get_num_threads())}
    for package in ("syncbn", "torch", "torchvision", "timm", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    with suppress(OSError, subprocess.SubprocessError):
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # the package may lie in another project's checkout
        found["syncbn_commit"] = _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno") else "")
    return found


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
