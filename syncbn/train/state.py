"""The state of a run while it trains, and its preparation: data, model, optimizer, checkpoint."""

from __future__ import annotations

import logging
import math
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from syncbn.layers import BatchRenorm, SmallBatchNorm
from syncbn.population import RunningStatistics
from syncbn.train.checkpoint import load_checkpoint, tidy
from syncbn.train.config import ConfigError, LocalError, RunConfig, RunWarning, require, save_config
from syncbn.train.data.datasets import Images
from syncbn.train.data.generators import generators_kept, seed_generators
from syncbn.train.data.order import derive_seed
from syncbn.train.data.samples import Key, Keyed, Samples
from syncbn.train.logical_gpus import Partition
from syncbn.train.metrics import MetricsLog, past_records, progress_bar
from syncbn.train.norms.factory import adapt_convolutions, adapt_model, norm_factory
from syncbn.train.norms.moving_average import MovingAverageBatchNorm
from syncbn.train.optim import lr_factor, make_optimizer
from syncbn.train.own_buffers import load_own_buffers
from syncbn.train.pauses import FLUSH_STEPS, Pace
from syncbn.train.schedule import Schedule, keys_beyond, total_steps
from syncbn.train.stopping import Noted
from syncbn.train.task import Datasets, Task
from syncbn.train.tasks.classification import Classification
from syncbn.train.tasks.named import blamed, check_task, load_task

_log = logging.getLogger("syncbn")


@dataclass
class Progress:
    """How far a run is. A checkpoint holds this besides weights and optimizer."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether a loss of the last steps is not finite; asked after every :data:`FLUSH_STEPS` steps of an epoch."""
        return any(not math.isfinite(loss) for loss in self.losses[-FLUSH_STEPS:])


@dataclass(frozen=True)
class Data:
    """The samples of a run."""

    train: Keyed
    validation: Keyed | None
    test: Keyed


@dataclass
class Run:
    """The state of a run."""

    config: RunConfig
    partition: Partition
    accelerator: Any
    task: Task
    task_name: str
    data: Data
    schedule: Schedule
    model: nn.Module
    wrapped: nn.Module  # the model as accelerate prepared it (DDP, mixed precision)
    optimizer: Any
    scheduler: LambdaLR
    shared: RunningStatistics  # those that training forwards read, and that are therefore averaged after each update
    metrics: MetricsLog
    bar: Any  # rich's progress bar, or None
    progress: Progress
    pending: list[Tensor] = field(default_factory=list)  # float64 (2,): totals and counts of losses not fetched yet
    best: dict[str, Tensor] | None = None  # weights and buffers of the best evaluation so far, on the CPU
    counts_samples: bool | None = None  # whether the loss is a mean over samples; None before the first batch
    pace: Pace = field(default_factory=Pace)
    noted: Noted = field(default_factory=Noted)  # the signal that stops the run

    def __post_init__(self) -> None:
        self.device: torch.device = self.accelerator.device
        self.dtype = _dtype(self.config)
        self.norms = [m for m in self.model.modules() if isinstance(m, SmallBatchNorm)]
        self.windowed = [m for m in self.model.modules() if isinstance(m, MovingAverageBatchNorm)]
        if self.progress.step:
            level = logging.INFO if self.partition.placement.rank == 0 else logging.DEBUG
            where = self.progress.step, self.schedule.total_steps
            _log.log(level, "the run goes on from step %d of %d", *where)

    def lr(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return learning_rate(self.scheduler, step)

    @property
    def averages_running(self) -> bool:
        """Whether training reads running statistics, which the processes then have to average after each update."""
        return self.config.norm.name == "renorm" and len(self.partition.ranks) < self.partition.placement.processes

    @property
    def gradient_scale(self) -> float | Tensor:
        """Factor on the loss before a backward pass: a float, or a () tensor on the device."""
        processes, scaler = float(self.partition.placement.processes), self.accelerator.scaler
        # Reading the loss scale on the host would wait for the GPU.
        return processes if scaler is None else scaler.scale(torch.full((), processes, device=self.device))

    def tell_groups(self, samples: int) -> None:
        """Tell the layers which samples of the next global batch of ``samples`` share statistics."""
        groups = self.partition.groups(samples, self.device)
        for layer in self.norms:
            layer.sample_groups = groups
        for windowed in self.windowed:
            windowed.sample_groups, windowed.gradient_scale = groups, self.gradient_scale

    def agree_on_counts(self, count: Tensor | int) -> None:
        """With the first batch, let all processes know whether the loss is a mean over samples on each of them."""
        here = isinstance(count, int)
        if self.counts_samples is None:
            flag = torch.tensor(int(here), device=self.device)
            if self.partition.placement.processes > 1:
                dist.all_reduce(flag, dist.ReduceOp.MIN)
            self.counts_samples = bool(flag)
        if self.counts_samples and not here:
            expected = "a task whose loss counts samples in every batch, as in the first one, or tensors in every batch"
            raise LocalError(f"task.name: got {self.task_name!r}, expected {expected}")

    def local(self, batch: list[Key]) -> list[Key]:
        """This process's share of a global batch."""
        positions = self.partition.local_range(len(batch))
        return batch[positions.start : positions.stop]


def prepare(
    config: RunConfig,
    partition: Partition,
    accelerator: Any,
    out: Path | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
    given: Task | None = None,
) -> Run:
    """Everything a run needs, restored from the checkpoint in ``out`` if ``resume`` and there is one.

    The task is ``given`` or that of the configuration.
    """
    name = config.task.name if given is None else type(given).__name__
    task = load_task(config, accelerator.device) if given is None else check_task(given, name)
    data = _load_data(task, name, config.seed)
    schedule = Schedule(config, len(data.train), data.train.labels)
    torch.manual_seed(config.seed)
    model = _build_model(task, name, config, partition)
    for layer, module in model.named_modules():
        if isinstance(module, SmallBatchNorm):
            module.qualified_name = layer  # for error messages
    first = partition.placement.rank == 0
    for remark in _remarks(config, partition, data, model) if first else ():
        warnings.warn(remark, RunWarning, stacklevel=2)
    model.to(accelerator.device, _dtype(config))
    optimizer = make_optimizer(config, model)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(config.optimizer, step, schedule.total_steps))
    state = (load_checkpoint(out / "checkpoint", model, config) if out is not None and resume else None) or {}
    wrapped, prepared = _wrapped(accelerator, model, optimizer)
    if state:
        for key, part in (("optimizer", prepared), ("scheduler", scheduler), ("scaler", accelerator.scaler)):
            if part is not None:
                part.load_state_dict(state[key])
        load_own_buffers(model, state.get("own_buffers", {}), partition.placement)
    if out is not None and first:
        tidy(out, state["progress"]["step"] if state else None)
        save_config(config, out / "config.yaml")
    done = Progress(**state.get("progress", {}))
    past = past_records(done.losses, done.history, schedule.steps_per_epoch, partial(learning_rate, scheduler))
    return Run(
        config=config,
        partition=partition,
        accelerator=accelerator,
        task=task,
        task_name=name,
        data=data,
        schedule=schedule,
        model=model,
        wrapped=wrapped,
        optimizer=prepared,
        scheduler=scheduler,
        shared=RunningStatistics(model, BatchRenorm),
        metrics=MetricsLog(out / "metrics.jsonl" if out is not None and first else None, past),
        bar=progress_bar(schedule.total_steps) if progress and first else None,
        progress=done,
        best=state.get("best"),
        counts_samples=state.get("counts_samples"),
    )


def learning_rate(scheduler: LambdaLR, step: int) -> float:
    """The learning rate of a step, from 0."""
    return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step))


def _load_data(task: Task, name: str, seed: int) -> Data:
    with blamed(name, "data()"), generators_kept():
        seed_generators(derive_seed("data", seed))  # a split that is drawn is the same on every process
        found = task.data(seed)
    require(isinstance(found, Datasets), "task.name", name, f"a task whose data() returns Datasets, not {type(found)}")
    sets: dict[str, Keyed | None] = {}
    for part in ("train", "validation", "test"):
        dataset = getattr(found, part)
        if dataset is not None and not isinstance(dataset, Images):
            map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
            require(map_style, "task.name", name, f"a task whose {part} data have a length and are indexed by numbers")
            dataset = Samples(dataset, found.collate, seed, part)
        empty = dataset is not None and len(dataset) == 0
        require(not empty, "task.name", name, f"a task whose {part} data are not empty")
        sets[part] = dataset
    lengths = [None if dataset is None else len(dataset) for dataset in sets.values()]
    if dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, lengths)
        same = all(each == lengths for each in everywhere)
        require(same, "task.name", name, f"a task whose data are as many on every process, not {everywhere}")
    train, test = sets["train"], sets["test"]
    if train is None or test is None:
        raise ConfigError("task.name", name, "a task with training and test data")
    return Data(train=train, validation=sets["validation"], test=test)


def _remarks(config: RunConfig, partition: Partition, data: Data, model: nn.Module) -> list[str]:
    """What the user may not have meant."""
    steps = total_steps(config, len(data.train))
    beyond = ", ".join(f"{key} {value}" for key, value in keys_beyond(config, steps).items())
    late = [f"{beyond}: beyond the end of the run at step {steps}"] if beyond else []
    own = _own_to_processes(model) if partition.placement.processes > 1 else []
    depends = [f"the model has {what}: this run depends on the number of processes" for what in own]
    return [*_small_data(config, data), *_few_of_classes(data), *late, *depends]


def _small_data(config: RunConfig, data: Data) -> list[str]:
    """Whether no step of the run is as large as its configuration says."""
    n, size = len(data.train), config.step_batch_size
    if size <= n:
        return []
    filled = -(-n // config.per_gpu_batch_size)
    idle = f", and {config.gpus - filled} of the {config.gpus} logical GPUs have none of them" * (filled < config.gpus)
    step = f"an optimizer step has {size} samples, but there are only {n} training samples"
    return [f"per_gpu_batch_size: {step}: each epoch is one smaller step{idle}"]


def _few_of_classes(data: Data) -> list[str]:
    """Which sets are too small to have a sample of each class of the training set."""
    labels, found = data.train.labels, []
    classes = 0 if labels is None else len(labels.unique())
    for part, samples in (("validation", data.validation), ("test", data.test)):
        if samples is not None and len(samples) < classes:
            fewer = f"fewer than the {classes} classes of the training set"
            found.append(f"the {part} set has {len(samples)} samples, {fewer}")
    return found


def _wrapped(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """The model and the optimizer as accelerate has prepared them for the processes and the precision."""
    with warnings.catch_warnings():  # of a new name of torch's, which accelerate 1.x does not pass on
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped, prepared = accelerator.prepare(model, optimizer)
    return wrapped, prepared


def _build_model(task: Task, name: str, config: RunConfig, partition: Partition) -> nn.Module:
    adapt = partial(adapt_model, config=config.norm, partition=partition)
    if isinstance(task, Classification):
        finish = partial(adapt_convolutions, config=config.norm)
        with blamed(name, "the network"):  # of a size that no memory holds, for one
            return task.normalized_model(norm_factory(config.norm, partition), adapt, finish)
    with blamed(name, "model()"), generators_kept():
        seed_generators(config.seed)
        model = task.model()
    require(isinstance(model, nn.Module), "task.name", name, f"a task whose model() is a Module, not {model!r}")
    normalized = any(isinstance(module, _BatchNorm) for module in model.modules())
    require(normalized, "task.name", name, "a task whose model has BatchNorm layers, which the run replaces")
    return adapt(model)


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.float64 if config.precision == "fp64" else torch.float32


def _own_to_processes(model: nn.Module) -> list[str]:
    """What each process of a run has for itself."""
    found = ["dropout, which each process draws for itself"] if _drops(model) else []
    norms = (_BatchNorm, MovingAverageBatchNorm)
    others = [name for name, m in model.named_modules() if not isinstance(m, norms) and _moves(m)]
    return found + ([f"buffers of its own ({others[0]}), which each process changes for itself"] if others else [])


def _moves(module: nn.Module) -> bool:
    """Whether a module of the user's has floating buffers, which its forward pass may change."""
    own = [buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
    return bool(own) and not type(module).__module__.startswith(("torch.", "torchvision.", "timm.", "syncbn."))


def _drops(model: nn.Module) -> bool:
    """Whether a module drops at random (torch's dropouts, torchvision's StochasticDepth, timm's DropPath)."""
    dropping = [m for m in model.modules() if re.search("Drop|StochasticDepth", type(m).__name__)]
    rates = [getattr(m, name, 0.0) for m in dropping for name in ("p", "drop_prob")]
    # Some of timm's models drop in a function, at a rate that is an attribute of the model.
    rates += [getattr(m, "drop_rate", 0.0) for m in model.modules() if type(m).__module__.startswith("timm.")]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
