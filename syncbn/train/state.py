"""The state of a run while it trains, and its preparation: data, model, optimizer, checkpoint."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from syncbn.layers import BatchRenorm, SmallBatchNorm
from syncbn.population import RunningStatistics
from syncbn.train.checkpoint import load_checkpoint
from syncbn.train.config import RunConfig, save_config
from syncbn.train.data.datasets import Data, Key, load_data
from syncbn.train.logical_gpus import Partition
from syncbn.train.metrics import MetricsLog, progress_bar
from syncbn.train.norms.factory import adapt_convolutions, adapt_model, norm_factory
from syncbn.train.norms.moving_average import MovingAverageBatchNorm
from syncbn.train.optim import lr_factor, make_optimizer
from syncbn.train.schedule import Schedule
from syncbn.train.tasks.models import build_model

FLUSH_STEPS = 20
"""Steps for which losses stay on their device and process. Then one collective and one transfer fetch all of them."""


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
        return any(not math.isfinite(loss) for loss in self.losses[-FLUSH_STEPS:])


@dataclass
class Run:
    """The state of a run."""

    config: RunConfig
    partition: Partition
    accelerator: Any
    data: Data
    schedule: Schedule
    model: nn.Module
    wrapped: nn.Module  # the model as accelerate prepared it (DDP, mixed precision)
    optimizer: Any
    scheduler: LambdaLR
    shared: RunningStatistics  # those that training forwards read, and that are therefore averaged after each of them
    metrics: MetricsLog
    bar: Any  # rich's progress bar, or None
    progress: Progress
    pending: list[Tensor] = field(default_factory=list)  # losses that have not been fetched yet

    def __post_init__(self) -> None:
        self.device: torch.device = self.accelerator.device
        self.dtype = _dtype(self.config)
        self.norms = [m for m in self.model.modules() if isinstance(m, SmallBatchNorm)]
        self.windowed = [m for m in self.model.modules() if isinstance(m, MovingAverageBatchNorm)]

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

    def local(self, batch: list[Key]) -> list[Key]:
        """This process's share of a global batch."""
        positions = self.partition.local_range(len(batch))
        return batch[positions.start : positions.stop]


def prepare(
    config: RunConfig, partition: Partition, accelerator: Any, out: Path | None, resume: bool, progress: bool
) -> Run:
    """Everything a run needs, restored from the checkpoint in ``out`` if ``resume`` and there is one."""
    data = load_data(config.data, config.seed, accelerator.device)
    schedule = Schedule(config, data.train.labels)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        norm=norm_factory(config.norm, partition),
        adapt=partial(adapt_model, config=config.norm, partition=partition),
        finish=partial(adapt_convolutions, config=config.norm),
        in_channels=data.shape[0],
        num_classes=data.num_classes,
        image_size=data.shape[1],
    )
    for name, module in model.named_modules():
        if isinstance(module, SmallBatchNorm):
            module.qualified_name = name  # for error messages
    first = partition.placement.rank == 0
    if partition.placement.processes > 1 and first and _drops(model):
        own = "the model has dropout, which each process draws for itself"
        warnings.warn(f"{own}: this run depends on the number of processes", stacklevel=2)
    model.to(accelerator.device, _dtype(config))
    optimizer = make_optimizer(config, model)
    total = schedule.total_steps
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(config.optimizer, step, total))
    state = load_checkpoint(out / "checkpoint", model, config) if out is not None and resume else None
    wrapped, prepared = accelerator.prepare(model, optimizer)
    done = Progress()
    if state is not None:
        prepared.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        done = Progress(**state["progress"])
    if out is not None and first:
        save_config(config, out / "config.yaml")
    return Run(
        config=config,
        partition=partition,
        accelerator=accelerator,
        data=data,
        schedule=schedule,
        model=model,
        wrapped=wrapped,
        optimizer=prepared,
        scheduler=scheduler,
        shared=RunningStatistics(model, BatchRenorm),
        metrics=MetricsLog(out / "metrics.jsonl" if out is not None and first else None, done.step),
        bar=progress_bar(total) if progress and first else None,
        progress=done,
    )


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.float64 if config.precision == "fp64" else torch.float32


def _drops(model: nn.Module) -> bool:
    """Whether a module drops at random (torch's dropouts, torchvision's StochasticDepth)."""
    dropping = [m for m in model.modules() if re.search("Dropout|StochasticDepth", type(m).__name__)]
    return any(float(getattr(m, "p", 0.0)) > 0 for m in dropping)
