"""A LightningModule, trained by Lightning's Trainer, in one process or in several (`processes: 2` in a study's file).

Run: python examples/loops/lightning_module.py
"""

import tempfile

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.study import Study


class Digits(LightningModule):
    def __init__(self, setting):
        super().__init__()
        layers = [(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((1, 16), (16, 32))]
        network = nn.Sequential(*sum(layers, ()), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))
        self.setting, self.network = setting, setting.normalize(network)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.network.parameters(), self.setting.config.optimizer.lr)

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.setting.report(self.global_step, loss=loss)
        return loss

    def test_step(self, batch):
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)


def run(setting):
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    train = DataLoader(TensorDataset(images[:1397], labels[:1397]), setting.batch_size, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(images[1397:], labels[1397:]), 100)
    seed_everything(setting.seed, verbose=False)  # the order of several processes depends on it, not on torch's seed
    strategy = DDPStrategy(broadcast_buffers=False) if setting.processes > 1 else "auto"
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    where = {"accelerator": setting.device.type, "devices": setting.processes, "strategy": strategy}
    trainer, model = Trainer(max_steps=setting.options.get("steps", 250), **where, **quiet), Digits(setting)
    trainer.fit(model, train)
    syncbn.reconcile(model)  # local layers have followed the samples of their own process
    return trainer.test(model, test, verbose=False)[0]


if __name__ == "__main__":
    arms = {n: {"overrides": {"norm": {"name": n}}, "reference": n == "batch"} for n in ("batch", "sync")}
    base = {"gpus": 4, "per_gpu_batch_size": 2, "device": "cpu", "optimizer": {"lr": 0.003}}
    study = Study(run=run, metric={"name": "accuracy", "higher_is_better": True}, base=base, arms=arms, seeds=range(3))
    study.run(tempfile.mkdtemp(), progress=False)
    print(study.compare().T)
