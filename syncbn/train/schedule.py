"""The optimizer steps of a run and their samples: a function of the configuration and the labels alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from syncbn.train.config import RunConfig, require
from syncbn.train.data.order import order_of
from syncbn.train.data.samples import Key


@dataclass(frozen=True)
class Schedule:
    """The steps of a run on ``samples`` training samples, which may have ``labels``, int64 [n]."""

    config: RunConfig
    samples: int
    labels: Tensor | None

    def __post_init__(self) -> None:
        c, n = self.config, self.samples
        skewed = "1, as the training data have no classes (an int64 tensor `targets` or `labels`, one for each sample)"
        require(c.data.class_skew == 1 or self.labels is not None, "data.class_skew", c.data.class_skew, skewed)
        size = f"an optimizer step of at most the {n} training samples (it has {c.step_batch_size})"
        expected = f"{size}, or data.drop_last false"
        require(self.steps_per_epoch > 0, "per_gpu_batch_size", c.per_gpu_batch_size, expected)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.config, self.samples)

    @property
    def total_steps(self) -> int:
        return total_steps(self.config, self.samples)

    @property
    def epochs(self) -> int:
        """Epochs that are started; the last one may be incomplete if the budget is in steps."""
        return -(-self.total_steps // self.steps_per_epoch)

    def order(self, epoch: int) -> list[int]:
        """The training samples in the order of an epoch."""
        c = self.config
        return order_of(self.samples, self.labels, c.data.class_skew, c.seed, epoch)

    def steps(self, epoch: int) -> Iterator[list[list[Key]]]:
        """The global batches of each optimizer step of an epoch (from 0). The last batches may be smaller."""
        c = self.config
        order = self.order(epoch)
        count = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        for step in range(count):
            indices = order[step * c.step_batch_size : (step + 1) * c.step_batch_size]
            yield batches_of([(epoch, i) for i in indices], c.global_batch_size)


def steps_per_epoch(config: RunConfig, samples: int) -> int:
    """The optimizer steps of an epoch of this many training samples."""
    size = config.step_batch_size
    return samples // size if config.data.drop_last else -(-samples // size)


def total_steps(config: RunConfig, samples: int) -> int:
    """The optimizer steps of a run on this many training samples."""
    budget = config.budget
    if budget.steps is not None:
        return budget.steps
    assert budget.epochs is not None, "checked by BudgetConfig"
    return budget.epochs * steps_per_epoch(config, samples)


def keys_beyond(config: RunConfig, steps: int) -> dict[str, int]:
    """The keys that count steps and lie beyond a run of ``steps`` optimizer steps, with their values.

    The learning rate then has no time after its warm-up, or a norm does not get to what it is for. Norms count updates
    of their statistics, of which an optimizer step has `accumulation_steps` or one.
    """
    norm = config.norm
    updates = steps * (config.accumulation_steps if norm.update_per == "forward" else 1)
    found = {"optimizer.warmup_steps": config.optimizer.warmup_steps} if config.optimizer.warmup_steps >= steps else {}
    if norm.name in ("renorm", "mabn") and norm.warmup_steps >= updates:
        found["norm.warmup_steps"] = norm.warmup_steps
    if norm.name == "mabn" and norm.window >= updates:
        found["norm.window"] = norm.window
    if norm.name == "renorm":
        ramps = {"norm.r_ramp_end": norm.r_ramp_end, "norm.d_ramp_end": norm.d_ramp_end}
        found |= {key: end for key, end in ramps.items() if end > updates}
    return found


def batches_of(keys: list[Key], size: int) -> list[list[Key]]:
    """Consecutive batches of ``size`` keys; the last one may be smaller."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]
