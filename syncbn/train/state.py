"""What the parts of a run work on, and how it is prepared: data, model, optimizer, what a checkpoint brings back."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.layers import BatchRenorm, SmallBatchNorm
from syncbn.population import RunningStatistics
from syncbn.train.checkpoint import load_checkpoint
from syncbn.train.config import RunConfig
from syncbn.train.config_io import save_config
from syncbn.train.data.datasets import Data, Key, load_data
from syncbn.train.logical_gpus import Layout
from syncbn.train.metrics import MetricsLog, ProgressBar
from syncbn.train.norms.factory import adapt_convolutions, adapt_model, norm_factory
from syncbn.train.norms.moving_average import MovingAverageBatchNorm
from syncbn.train.optim import make_optimizer, make_scheduler
from syncbn.train.schedule import Schedule
from syncbn.train.tasks.models import build_model

# Losses stay on the device, and on their process, for this many steps; then one collective and one transfer for all.
FLUSH_STEPS = 20


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds besides weights and optimizer."""

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
    """What the parts of a run work on."""

    config: RunConfig
    layout: Layout
    accelerator: Any
    data: Data
    schedule: Schedule
    model: nn.Module
    wrapped: nn.Module
    """The model as accelerate prepared it (DDP, mixed precision)."""
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LambdaLR
    shared: RunningStatistics
    """The running statistics that the forward pass itself uses, and that are therefore shared after each."""
    metrics: MetricsLog
    bar: ProgressBar
    progress: Progress
    norms: list[SmallBatchNorm]
    """The model's layers that share statistics over samples."""
    windowed: list[MovingAverageBatchNorm]
    """Its layers that average them over past batches."""
    pending: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def tell_groups(self, samples: int) -> None:
        """Tell the layers which samples of the next global batch of ``samples`` share statistics."""
        groups = self.layout.groups(samples, self.device)
        for layer in self.norms:
            layer.sample_groups = groups
        for windowed in self.windowed:
            windowed.sample_groups = groups
            windowed.gradient_scale = self.gradient_scale

    def local(self, batch: list[Key]) -> list[Key]:
        """This process's share of a global batch."""
        positions = self.layout.local_range(len(batch))
        return batch[positions.start : positions.stop]

    @property
    def gradient_scale(self) -> float | Tensor:
        """What the loss is multiplied by before a backward pass: a float, or a () tensor on the device."""
        processes, scaler = float(self.layout.placement.processes), self.accelerator.scaler
        # Multiplied on the device, where the loss scale is: asking for its value would wait for the GPU.
        return processes if scaler is None else scaler.scale(torch.full((), processes, device=self.device))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.config.precision == "fp64" else torch.float32


def steps_of(config: RunConfig) -> int:
    """Optimizer steps of a run. Reads the data set."""
    return Schedule(config, load_data(config.data, config.seed).train.labels).total_steps


def prepare(config: RunConfig, layout: Layout, accelerator: Any, out: Path | None, resume: bool, progress: bool) -> Run:
    data = load_data(config.data, config.seed, accelerator.device)
    schedule = Schedule(config, data.train.labels)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        norm=norm_factory(config.norm, layout),
        adapt=partial(adapt_model, config=config.norm, layout=layout),
        finish=partial(adapt_convolutions, config=config.norm),
        in_channels=data.shape[0],
        num_classes=data.num_classes,
        image_size=data.shape[1],
    )
    for name, module in model.named_modules():
        if isinstance(module, SmallBatchNorm):
            module.qualified_name = name  # for its messages; conversion has set those of converted models
    if layout.placement.processes > 1 and layout.placement.rank == 0 and _drops(model):
        warnings.warn(
            "the model has dropout, which each process draws for itself: this run depends on the number of processes",
            stacklevel=2,
        )
    model.to(accelerator.device, torch.float64 if config.precision == "fp64" else torch.float32)
    optimizer = make_optimizer(config, model)
    scheduler = make_scheduler(config, optimizer, schedule.total_steps)
    state = load_checkpoint(out / "checkpoint", model, config) if out is not None and resume else None
    wrapped, prepared = accelerator.prepare(model, optimizer)
    done = Progress()
    if state is not None:
        prepared.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        done = Progress(**state["progress"])
    first = layout.placement.rank == 0
    if out is not None and first:
        save_config(config, out / "config.yaml")
    return Run(
        config=config,
        layout=layout,
        accelerator=accelerator,
        data=data,
        schedule=schedule,
        model=model,
        wrapped=wrapped,
        optimizer=prepared,
        scheduler=scheduler,
        shared=RunningStatistics(model, BatchRenorm),
        metrics=MetricsLog(out / "metrics.jsonl" if out is not None and first else None, done.step),
        bar=ProgressBar(schedule.total_steps, progress and first),
        progress=done,
        norms=[m for m in model.modules() if isinstance(m, SmallBatchNorm)],
        windowed=[m for m in model.modules() if isinstance(m, MovingAverageBatchNorm)],
    )


def _drops(model: nn.Module) -> bool:
    """Whether a module of the model drops at random (torch's dropouts, torchvision's StochasticDepth)."""
    return any(
        float(getattr(m, "p", 0.0)) > 0 and ("Dropout" in type(m).__name__ or "StochasticDepth" in type(m).__name__)
        for m in model.modules()
    )
