"""The optimizer steps of a run and their samples: a function of the configuration and the labels alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from syncbn.train.checks import require
from syncbn.train.config import RunConfig
from syncbn.train.data.datasets import Key
from syncbn.train.data.order import epoch_order


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: the global batches of its forward passes."""

    batches: list[list[Key]]

    @property
    def samples(self) -> int:
        return sum(map(len, self.batches))


@dataclass(frozen=True)
class Schedule:
    """The steps of a run."""

    config: RunConfig
    labels: Tensor  # int64 [n], of the training set

    def __post_init__(self) -> None:
        require(
            self.steps_per_epoch > 0,
            "per_gpu_batch_size",
            self.config.per_gpu_batch_size,
            f"an optimizer step of at most the {len(self.labels)} training images (it has "
            f"{self.config.step_batch_size}), or data.drop_last false",
        )

    @property
    def steps_per_epoch(self) -> int:
        n, size = len(self.labels), self.config.step_batch_size
        return n // size if self.config.data.drop_last else -(-n // size)

    @property
    def total_steps(self) -> int:
        budget = self.config.budget
        if budget.steps is not None:
            return budget.steps
        assert budget.epochs is not None, "checked by BudgetConfig"
        return budget.epochs * self.steps_per_epoch

    @property
    def epochs(self) -> int:
        """Epochs that are started; the last one may be incomplete if the budget is in steps."""
        return -(-self.total_steps // self.steps_per_epoch)

    def steps(self, epoch: int) -> Iterator[OptimizerStep]:
        """The steps of an epoch (counted from 0). The last batches may be smaller than a global batch."""
        c = self.config
        order = epoch_order(self.labels, c.data.class_skew, c.seed, epoch).tolist()
        count = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        for step in range(count):
            indices = order[step * c.step_batch_size : (step + 1) * c.step_batch_size]
            yield OptimizerStep(batches_of([(epoch, i) for i in indices], c.global_batch_size))


def batches_of(keys: list[Key], size: int) -> list[list[Key]]:
    """Consecutive batches of ``size`` keys; the last one may be smaller."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]
