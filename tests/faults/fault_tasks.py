"""Tasks for command lines: data that take their time, or end a process that reads them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from task_cases import Sign
from torch.utils.data import Dataset

from syncbn.train import Datasets


class Slow(Dataset):
    """Items that take ``seconds`` each; the item ``deadly``, if there is one, kills its process once."""

    def __init__(self, samples: int, seconds: float, deadly: int | None = None, mark: str = "") -> None:
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
        self.seconds, self.deadly, self.mark = seconds, deadly, Path(mark)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.seconds)
        if index == self.deadly and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index], int(self.x[index].sum() > 0)


class Faulty(Sign):
    """:class:`Sign` on slow data."""

    def __init__(self, samples: int = 1600, seconds: float = 0.0, deadly: int | None = None, mark: str = "") -> None:
        super().__init__(validation=0)
        self.train_set = Slow(samples, seconds, deadly, mark)

    def data(self, seed: int) -> Datasets:
        return Datasets(train=self.train_set, test=Slow(16, 0.0))
