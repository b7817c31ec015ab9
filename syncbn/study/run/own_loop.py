"""A study over a training loop of the user's: one call of a function for each cell.

The study is what it is with the trainer: paired seeds, locks and records, workers, resumption, tuning, the report.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncbn.study.plan.grid import Study
from syncbn.study.run.jobs import TrainFunction
from syncbn.train import loop
from syncbn.train.config import RunConfig, config_to_dict, fits, load_config, require, save_config
from syncbn.train.data.generators import generators_kept, seed_generators
from syncbn.train.launch import launch, placement
from syncbn.train.lifeline import end_with_parent
from syncbn.train.logical_gpus import Partition
from syncbn.train.norms.factory import adapt_model
from syncbn.train.result import Metric, RunResult, environment, jsonable, naming
from syncbn.train.stored import json_lines
from syncbn.train.tasks.named import TaskError, blamed, find
from syncbn.train.tasks.source import digest_of

_NEEDS_TRAINER = ("nf", "frozen", "mabn")
"""Norms that also change the training loop."""
VALIDATION = "validation_"
"""Begins the name of a metric of the validation set."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run of a user's own training loop is given.

    A process trains :attr:`batch_size` samples in one forward pass: those of all its logical GPUs, one after the other.

    Example:
        >>> from torch import nn
        >>> from syncbn.study import Setting
        >>> from syncbn.train import RunConfig
        >>> setting = Setting(config=RunConfig(gpus=4, per_gpu_batch_size=2), out=None, resume=False)
        >>> model = setting.normalize(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        >>> setting.batch_size, model[1].ghost_batch_size  # each logical GPU is normalized by itself
        (8, 2)
    """

    config: RunConfig
    """The whole configuration, such as ``setting.config.optimizer.lr``."""
    out: Path | None
    """Folder of the run, for what it wants to write. It is the same when the run is resumed."""
    resume: bool
    """Whether the run was begun before and cut off: ``out`` may hold a checkpoint of the user's."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def options(self) -> dict[str, Any]:
        """The user's own options: ``task.options`` of the configuration."""
        return self.config.task.options

    @property
    def per_gpu_batch_size(self) -> int:
        return self.config.per_gpu_batch_size

    @property
    def processes(self) -> int:
        """Processes that train this run together: the study's ``processes``."""
        return placement().processes

    @property
    def batch_size(self) -> int:
        """Samples that this process trains in one forward pass."""
        return self.config.global_batch_size // self.processes

    @property
    def device(self) -> torch.device:
        """This process's device."""
        cuda = self.config.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")

    def normalize(self, model: nn.Module) -> nn.Module:
        """``model`` with the arm's normalization in place of its BatchNorm layers; the weights are kept.

        With several processes, a layer looks for the process group in its first forward pass.

        Raises:
            ConfigError: the norm needs the package's own trainer, or one process for each logical GPU.
        """
        c, norm = self.config, self.config.norm
        require(
            norm.name not in _NEEDS_TRAINER, "norm.name", norm.name, "a norm that does not change the training loop"
        )
        partition = Partition.of(c, placement())
        together = partition.hosted > 1
        spans_processes = norm.synchronized and partition.sync_group_size > partition.hosted
        even = not spans_processes or partition.sync_group_size % partition.hosted == 0
        require(even, "sync_group_size", c.sync_group_size, f"a multiple of the {partition.hosted} GPUs of a process")
        expected = f"one process for each of the {c.gpus} logical GPUs with norm.name {norm.name}: set `processes`"
        require(not together or norm.name != "renorm" or norm.sync, "gpus", c.gpus, expected)
        if norm.synchronized and together and partition.sync_group_size < partition.hosted:
            # Consecutive GPUs of one process are a longer ghost batch.
            whole = partition.hosted % partition.sync_group_size == 0 and norm.name == "sync"
            require(whole, "sync_group_size", c.sync_group_size, "a divisor of the logical GPUs of one process")
            size = c.per_gpu_batch_size * partition.sync_group_size
            norm = replace(norm, name="ghost", ghost_batch_size=size)
            partition = replace(partition, sync_group_size=1, ghost_batch_size=size)
        return adapt_model(model, norm, partition)

    def report(self, step: int, **metrics: float) -> None:
        """Record metrics of a step, for curves. The first process writes them."""
        if self.out is not None and placement().rank == 0:
            path = self.out / "metrics.jsonl"
            with naming(path), path.open("a") as file:
                values = {name: _number(value) for name, value in metrics.items()}
                line = json.dumps(jsonable({"step": step, **values}), allow_nan=False)
                file.write(f"\n{line}\n")  # a killed run may have left half a line


@dataclass(frozen=True, kw_only=True)
class OwnLoop:
    """Does a run by a function of the user's: called as ``train(config, out, resume=...)``, like the trainer.

    The function gets a :class:`Setting` and returns its metrics by name: those of the test set, and with the prefix
    ``validation_`` those of the validation set, which tuning chooses by.
    """

    run: str | Callable[[Setting], Mapping[str, float]]
    """``module:function``, or the function."""
    metric: Metric
    processes: int = 1
    tunes: bool = False
    """Whether the study tunes, for which the function has to return the validation metric."""

    def __call__(self, config: RunConfig, out: Path, resume: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        begun = (out / "begun").exists()
        (out / "begun").touch()
        resume = resume and begun
        if self.processes == 1:
            self.here(config, out, resume)
            return
        require(isinstance(self.run, str), "run", self.run, "module:function, if it is run in several processes")
        config.check_processes(self.processes)
        save_config(config, out / "config.yaml")
        words = [
            str(out / "config.yaml"),
            str(out),
            json.dumps({**vars(self), "metric": vars(self.metric)}),
            str(resume),
        ]
        launch(self.processes, words, out / "processes.log", module=__name__)

    def here(self, config: RunConfig, out: Path, resume: bool) -> None:
        """Call the function in this process, and write the result if it is the first of its launcher."""
        name = self.run if isinstance(self.run, str) else getattr(self.run, "__qualname__", repr(self.run))
        function = find(self.run, "run") if isinstance(self.run, str) else self.run
        first = placement().rank == 0
        started = time.monotonic()
        with torch.random.fork_rng(), generators_kept():  # the first keeps those of CUDA too
            seed_generators(config.seed)
            torch.manual_seed(config.seed)
            with blamed(name, "the function"):
                values = function(Setting(config=config, out=out, resume=resume))
        seconds = time.monotonic() - started
        if first:
            result = _result(self, name, _numbers(self, name, values), config, out, seconds)
            result.environment.update(digest_of(function))
            result.to_json(out / "result.json")


def _numbers(loop: OwnLoop, name: str, values: Any) -> dict[str, float]:
    """What the function returned, if it is what the study needs."""
    metric, validation = loop.metric, VALIDATION + loop.metric.name
    got = sorted(map(str, values)) if isinstance(values, Mapping) else repr(values)[:80]
    if not isinstance(values, Mapping) or metric.name not in values:
        raise TaskError(f"run {name}: returned {got}, expected a dict of metrics with {metric.name!r}")
    validated = any(str(key).startswith(VALIDATION) for key in values)
    if (loop.tunes or validated) and validation not in values:
        why = "which the study's tuning chooses by" if loop.tunes else "as there are other validation metrics"
        raise TaskError(f"run {name}: returned {got}, expected {validation!r} too, {why}")
    try:
        numbers = {str(key): _number(value) for key, value in values.items()}
    except (TypeError, ValueError) as error:
        raise TaskError(f"run {name}: returned {values!r}, expected numbers ({error})") from error
    for key in (metric.name, validation):
        if problem := metric.problem(numbers.get(key, math.nan), key):
            raise TaskError(f"run {name}: returned {problem}; for any other metric, the study says `percent: false`")
    return numbers


def _result(
    loop: OwnLoop, name: str, numbers: dict[str, float], config: RunConfig, out: Path, took: float
) -> RunResult:
    metric = loop.metric
    test: dict[str, float | None] = {}
    validation: dict[str, float | None] = {}
    for key, value in numbers.items():
        (validation if key.startswith(VALIDATION) else test)[key.removeprefix(VALIDATION)] = value
    diverged = not math.isfinite(numbers[metric.name])
    history = [{"epoch": None, "train_loss": None, "validation": None, **entry} for entry in _reported(out)]
    steps = max((entry["step"] for entry in history), default=0)
    return RunResult(
        status="diverged" if diverged else "ok",
        task=name,
        metric=metric,
        test=None if diverged else test,
        validation=validation or None,
        steps=steps,
        samples=None,
        seconds=took,
        samples_per_second=None,
        parameters=None,
        losses=[],
        history=history,
        train_samples=None,
        validation_samples=None,
        test_samples=None,
        processes=placement().processes,
        environment=environment(Setting(config=config, out=None, resume=False).device),
        config=config_to_dict(config),
    )


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _reported(out: Path) -> list[dict[str, Any]]:
    """What the run reported, by step; of a step that was reported twice, as after a kill, the last."""
    found: dict[int, dict[str, Any]] = {}
    for entry in json_lines(out / "metrics.jsonl"):
        values = {name: value for name, value in entry.items() if name != "step" and fits(value, float | None)}
        found[entry["step"]] = {"step": entry["step"], "test": values}
    return [found[step] for step in sorted(found)]


def train_function(study: Study) -> TrainFunction:
    """What does a run of a study."""
    if study.run is None:
        return loop.train
    assert study.metric is not None, "read with `run`"
    return OwnLoop(run=study.run, metric=study.metric, processes=study.processes, tunes=study.tune is not None)


def main(config: str, out: str, loop: str, resume: str) -> int:
    """What each process does that :class:`OwnLoop` launches."""
    end_with_parent(signal.SIGKILL)
    try:
        values = json.loads(loop)
        made = OwnLoop(**{**values, "metric": Metric(**values["metric"])})
        made.here(load_config(config), Path(out), resume=resume == "True")
    except ValueError as error:
        traceback.print_exc()
        print(f"syncbn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
