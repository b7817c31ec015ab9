"""Map-style datasets of a task, addressed by (epoch, index), and the loading of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from syncbn.train.data.generators import generators_kept, seed_generators
from syncbn.train.data.order import derive_seed
from syncbn.train.stopping import leave_signals_to_parent

Key = tuple[int, int]  # (epoch, index): a sample of the set in one epoch


class Keyed(Protocol):
    """A dataset that is fetched by lists of keys, a batch at a time."""

    held: bool
    """Whether it is in memory, so that loader processes would not help."""

    @property
    def labels(self) -> Tensor | None:
        """The class of each sample, int64 [n] on the CPU; None if samples have none."""

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Any, Any]:
        """The batch (inputs, targets) of these keys, of which there may be none."""


class Samples(Dataset[tuple[Any, Any]]):
    """A map-style dataset as a :class:`Keyed` one.

    What an item draws at random depends on its key and the run's seed alone, not on the process that fetches it.
    """

    held = False

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], tuple[Any, Any]] | None, seed: int, part: str
    ) -> None:
        self.dataset, self.collate, self.seed, self.part = dataset, collate or default_collate, seed, part

    @property
    def labels(self) -> Tensor | None:
        """The dataset's ``targets`` (torchvision's word) or ``labels``, if they are one class each sample."""
        for name in ("targets", "labels"):
            found = getattr(self.dataset, name, None)
            if isinstance(found, Tensor | np.ndarray | list | tuple) and len(found) == len(self):
                with suppress(TypeError, ValueError, RuntimeError):  # names of files or dictionaries, for example
                    labels = torch.as_tensor(found)
                    if labels.dtype == torch.int64 and labels.ndim == 1:
                        return labels.cpu()
        return None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Any, Any]:
        with generators_kept():
            if keys:
                return self._batch(keys)
            first = (0, 0)
            inputs, targets = _emptied(self._batch([first] * 2), self._batch([first] * 3))
            return inputs, targets

    def _batch(self, keys: Sequence[Key]) -> tuple[Any, Any]:
        items = []
        for epoch, index in keys:
            # Validation and test data are not those that the same indices of the training data would draw.
            seed_generators(derive_seed("sample", self.part, self.seed, epoch, index))
            items.append(self.dataset[index])
        batch = self.collate(items)
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TypeError(f"a batch is a {type(batch).__name__}, expected a pair (inputs, targets)")
        return batch[0], batch[1]


def _emptied(two: Any, three: Any) -> Any:
    """A batch without samples, from one of two and one of three: what has another length in them has the samples."""
    if isinstance(two, Tensor):
        return two[:0] if two.ndim and len(two) != len(three) else two
    if isinstance(two, Mapping):
        return {name: _emptied(two[name], three[name]) for name in two}
    if isinstance(two, list | tuple):
        if len(two) != len(three):
            return two[:0]
        parts = list(map(_emptied, two, three))
        return type(two)(*parts) if hasattr(two, "_fields") else type(two)(parts)
    return two


def batch_loader(samples: Keyed, batches: Iterable[list[Key]], workers: int) -> Iterator[tuple[Any, Any]]:
    """The batch (inputs, targets) of each list of keys, in order; ``workers`` processes load ahead what is not held."""
    if samples.held or workers == 0:
        return map(samples.__getitems__, batches)
    # __getitems__ returns a batch already. By default, a loader draws a number from the global generator.
    own: dict[str, Any] = {"collate_fn": _as_fetched, "generator": torch.Generator()}
    own["worker_init_fn"] = leave_signals_to_parent
    return iter(DataLoader(samples, batch_sampler=batches, num_workers=workers, **own))  # type: ignore[arg-type]


def _as_fetched(batch: Any) -> Any:
    return batch
