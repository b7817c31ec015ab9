"""What is trained on when: a function of the configuration and the labels, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.data.datasets import Key
from syncbn.train.data.order import epoch_order


@dataclass(frozen=True)
class Step:
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
        if self.steps_per_epoch == 0:
            raise ConfigError(
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
        """Epochs begun; the last may be cut short by the number of steps."""
        return -(-self.total_steps // self.steps_per_epoch)

    def steps(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch (from 0). A batch holds at most a global batch, and the last ones may hold less."""
        c = self.config
        order = epoch_order(self.labels, c.data.class_skew, c.seed, epoch).tolist()
        count = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        for step in range(count):
            indices = order[step * c.step_batch_size : (step + 1) * c.step_batch_size]
            keys = [(epoch, i) for i in indices]
            size = c.global_batch_size
            yield Step([keys[i : i + size] for i in range(0, len(keys), size)])
