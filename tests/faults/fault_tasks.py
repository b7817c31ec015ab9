"""Tasks for command lines: data that take their time, or end a process that reads them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from task_cases import Sign
from torch.utils.data import Dataset

from syncbn.train import Datasets, Sum


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


class AtMoment(Sign):
    """:class:`Sign`, in which something happens once on one rank: ``at`` a moment that is the name of a method."""

    def __init__(self, at: str = "", rank: int = 1, mark: str = "", act: str = "die") -> None:
        super().__init__(validation=0)
        self.at, self.act = at, act
        self.here = at if os.environ.get("RANK", "0") == str(rank) and mark and not Path(mark).exists() else ""
        self.mark = Path(mark)

    def reach(self, moment: str) -> None:
        if moment != self.here:
            return
        self.mark.touch()
        if self.act == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        os.kill(os.getpid(), signal.SIGKILL)

    def model(self) -> torch.nn.Module:
        self.reach("model")
        model = super().model()
        model.register_state_dict_pre_hook(lambda *_: self.reach("checkpoint"))
        return model

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.reach("loss")
        return super().loss(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Sum]:
        self.reach("evaluation")
        return super().metrics(outputs, targets)


class Faulty(Sign):
    """:class:`Sign` on slow data."""

    def __init__(self, samples: int = 1600, seconds: float = 0.0, deadly: int | None = None, mark: str = "") -> None:
        super().__init__(validation=0)
        self.train_set = Slow(samples, seconds, deadly, mark)

    def data(self, seed: int) -> Datasets:
        return Datasets(train=self.train_set, test=Slow(16, 0.0))
