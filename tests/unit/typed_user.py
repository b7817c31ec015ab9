"""What a user's typed file looks like; `test_typing.py` gives it to mypy. It is never run."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import syncbn


def remedied(model: nn.Sequential, batches: Iterable[Tensor]) -> nn.Sequential:
    converted: nn.Sequential = syncbn.convert(model, "sync", sync_group_size=8)
    converted = syncbn.convert(converted, "ghost", ghost_batch_size=8)
    converted = syncbn.convert(converted, syncbn.BatchRenorm, r_max=3.0)
    syncbn.update_population_statistics(converted, batches, where=lambda name, layer: "head" not in name)
    return syncbn.revert(converted)


class Block(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(features, activation="relu")
        self.ghost = syncbn.GhostBatchNorm(features, ghost_batch_size=8, remainder="smaller")
        self.renorm = syncbn.BatchRenorm(features, momentum=None, sync=True)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm.forward(x, residual=x, mask=x[:, 0] > 0)
        statistics: Tensor | None = self.norm.running_mean
        return normalized if statistics is None else normalized + statistics.view(1, -1)


block: Block = Block(4).to(torch.float64)
size: int | None = block.ghost.ghost_batch_size

# Mistakes that a type checker has to find: a comment that ignores nothing is an error too.
syncbn.SyncBatchNorm("64")  # type: ignore[arg-type]
syncbn.SyncBatchNorm(64, activation="tanh")  # type: ignore[arg-type]
syncbn.GhostBatchNorm(64)  # type: ignore[call-arg]
syncbn.convert("model", "sync")  # type: ignore[call-overload]
syncbn.convert(block, "sync", r_max=3.0)  # type: ignore[call-overload]
syncbn.convert(block, "ghost")  # type: ignore[call-overload]
syncbn.convert(block, "ghost", ghost_batch_size="8")  # type: ignore[call-overload]
syncbn.convert(block, syncbn.BatchRenorm, running_update="mean")  # type: ignore[call-overload]
syncbn.update_population_statistics(block, [], estimator="median")  # type: ignore[arg-type]
syncbn.BatchNormalisation(64)  # type: ignore[attr-defined]
