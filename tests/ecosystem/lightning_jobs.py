"""Trainings by Lightning's Trainer, and the same on one process without Lightning, in float64."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncbn

BATCH = 8
EPOCHS = 2
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).double()


def samples() -> tuple[Tensor, Tensor]:
    """Three batches; odd samples, which the second of two processes has, are brighter."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3 * BATCH, 1, 6, 6, dtype=torch.float64, generator=generator)
    images += (torch.arange(len(images)) % 2).view(-1, 1, 1, 1)
    return images, torch.randint(3, (len(images),), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def alone(kind: str | None, options: dict[str, Any], processes: int = 1) -> dict[str, Tensor]:
    """The trained state of one process with the whole batch, whose samples are those of each rank in turn.

    Without a kind, the layers are torch's.
    """
    model, (images, labels) = network(), samples()
    if kind is not None:
        syncbn.convert(model, kind, **options)
    optimizer = optimizer_of(model)
    for _ in range(EPOCHS):
        for batch in torch.arange(len(images)).split(BATCH):
            order = torch.cat([batch[rank::processes] for rank in range(processes)])
            loss = cross_entropy(model(images[order]), labels[order])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def module_of(package: Any) -> Any:
    """A LightningModule of one of the two packages. It notes the class of its layers in each step."""

    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.seen = network(), set()

        def training_step(self, batch: Any) -> Tensor:
            self.seen |= {type(self.network[1]).__name__, type(self.network[4]).__name__}
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.network)

        def on_train_epoch_end(self) -> None:
            syncbn.reconcile(self)

    return Classifier()


def trained(
    processes: int, strategy: str, role: str, kind: str, options: dict[str, Any], package: str = "lightning.pytorch"
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The state after training, and the classes of the layers in training and after it."""
    lightning = importlib.import_module(package)
    from syncbn.integrations.lightning import ConvertBatchNorm

    if strategy == "ddp":
        strategy = lightning.strategies.DDPStrategy(broadcast_buffers=False)
    given = {role: [ConvertBatchNorm(kind, **options)]}
    where = {"accelerator": "cpu", "devices": processes, "strategy": strategy, "use_distributed_sampler": False}
    trainer, module = lightning.Trainer(max_epochs=EPOCHS, **where, **given, **QUIET), module_of(lightning)
    data = TensorDataset(*samples())
    in_order = DistributedSampler(data, processes, int(os.environ["RANK"]), shuffle=False)  # Lightning's own shuffles
    trainer.fit(module, DataLoader(data, BATCH // processes, sampler=in_order))
    assert trainer.world_size == processes
    after = [type(module.network[1]).__name__, type(module.network[4]).__name__]
    return module.network.state_dict(), sorted(module.seen), after
