"""A ResNet of transformers with random weights, trained by its Trainer, in one process or in several.

Run: python examples/loops/transformers_trainer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import syncbn
from syncbn.study import Study


class Curve(TrainerCallback):
    def __init__(self, setting):
        self.setting = setting

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.setting.report(state.global_step, accuracy=metrics["eval_accuracy"])


def accuracy(found):
    return {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}


def run(setting):
    images, labels = load_digits(return_X_y=True)
    images = nn.functional.interpolate(torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, scale_factor=4)
    samples = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels.tolist(), strict=True)]
    budget = {"max_steps": setting.options.get("steps", 250), "learning_rate": setting.config.optimizer.lr}
    where = {"use_cpu": setting.device.type == "cpu", "ddp_broadcast_buffers": False, "seed": setting.seed}
    where["average_tokens_across_devices"] = False  # it would multiply the loss by the number of processes
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    steps = {"per_device_train_batch_size": setting.batch_size, "eval_strategy": "steps", "eval_steps": 50}
    arguments = TrainingArguments(str(setting.out), **budget, **where, **quiet, **steps)
    widths = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}
    model = setting.normalize(ResNetForImageClassification(ResNetConfig(layer_type="basic", **widths)))
    parts = {"train_dataset": samples[:1000], "eval_dataset": samples[1000:1397]}
    trainer = Trainer(model, arguments, compute_metrics=accuracy, callbacks=[Curve(setting)], **parts)
    trainer.train()
    syncbn.reconcile(model)  # local layers have followed the samples of their own process
    test = trainer.predict(samples[1397:]).metrics
    return {"accuracy": test["test_accuracy"], "validation_accuracy": trainer.evaluate()["eval_accuracy"]}


if __name__ == "__main__":
    arms = {n: {"overrides": {"norm": {"name": n}}, "reference": n == "batch"} for n in ("batch", "sync")}
    base = {"gpus": 4, "per_gpu_batch_size": 2, "device": "cpu", "optimizer": {"lr": 0.003}}
    study = Study(run=run, metric={"name": "accuracy", "higher_is_better": True}, base=base, arms=arms, seeds=range(3))
    study.run(tempfile.mkdtemp(), progress=False)
    print(study.compare().T)
