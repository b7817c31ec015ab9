"""Optimizer and learning rate: functions of the configuration and the number of optimizer steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from syncbn.train.config import OptimizerConfig, RunConfig


def peak_lr(config: RunConfig) -> float:
    """The learning rate, scaled with the images per optimizer step.

    Linear scaling follows Goyal et al. 2017 (arXiv 1706.02677, section 2.1), square-root scaling Hoffer et al. 2017
    (arXiv 1705.08741, section 4).
    """
    optimizer = config.optimizer
    ratio = config.step_batch_size / optimizer.lr_reference_batch_size
    return optimizer.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optimizer.lr_scaling]


def lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """Factor on the peak learning rate at optimizer step ``step`` (from 0) of ``total``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if config.schedule == "one_cycle":
        return _one_cycle(step, total)
    if config.schedule == "step":
        return config.step_gamma ** sum(step >= m * total for m in config.step_milestones)
    return 1.0


def _one_cycle(step: int, total: int, rise: float = 0.3, start: float = 1 / 25, end: float = 1e-4 / 25) -> float:
    """Cosine from ``start`` to 1 over the fraction ``rise`` of the steps, then to ``end`` (Smith and Topin 2017, arXiv
    1708.07120). The defaults are those of ``torch.optim.lr_scheduler.OneCycleLR``; the momentum is constant."""
    peak = max(rise * total - 1, 1e-9)
    if step <= peak:
        low, high, t = start, 1.0, step / peak
    else:
        low, high, t = 1.0, end, min((step - peak) / max(total - 1 - peak, 1e-9), 1.0)
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * t))


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer. Parameters with one value per channel form a group that may have no weight decay.

    These are normalization parameters and biases, and also the lengths of weight normalization and the gains of scaled
    weight standardization, which have shape (C, 1, 1, 1).
    """
    c, lr = config.optimizer, peak_lr(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = [p for p in parameters if p.numel() == len(p)]
    others = [p for p in parameters if p.numel() != len(p)]
    decays = ((others, c.weight_decay), (flat, c.weight_decay if c.decay_norm_and_bias else 0.0))
    groups = [{"params": found, "weight_decay": decay} for found, decay in decays if found]
    if c.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=c.betas)
    return torch.optim.SGD(groups, lr=lr, momentum=c.momentum, nesterov=c.nesterov)
