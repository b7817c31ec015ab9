"""Training loops as users write them, for the tests of studies."""

from __future__ import annotations

import math
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional


def regression(setting):
    """Fits a small network to a plane; returns its errors on validation and test data."""
    torch.manual_seed(setting.seed)
    width = setting.options.get("width", 8)
    model = setting.normalize(nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.config.optimizer.lr)

    def draw(samples):
        x = torch.randn(samples, 3)
        return x, x.sum(1, keepdim=True)

    for step in range(1, 61):
        x, y = draw(setting.batch_size)
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            setting.report(step, error=loss)
    model.eval()
    with torch.no_grad():
        validation, test = (functional.mse_loss(model(x), y) for x, y in (draw(200), draw(200)))
    return {"error": test, "validation_error": validation.item()}


def distributed(setting):
    """As under a launcher: makes the process group, and checks that statistics are shared."""
    model = setting.normalize(nn.Sequential(nn.BatchNorm1d(3)))  # as in a framework that connects the processes later
    dist.init_process_group("gloo")
    torch.manual_seed(setting.seed + dist.get_rank())
    model(torch.randn(setting.batch_size, 3))
    means = [torch.zeros(3) for _ in range(dist.get_world_size())]
    dist.all_gather(means, model[0].running_mean)
    dist.destroy_process_group()
    return {"error": float((means[0] - means[1]).abs().max()), "size": setting.batch_size, "world": setting.processes}


def draws(setting):
    """A number from each of the generators that a user's code may draw from."""
    drawn = {"torch": torch.rand(()).item(), "numpy": np.random.rand(), "python": random.random()}  # noqa: NPY002
    return {"error": 0.5, **drawn}


def budgeted(setting):
    """An error that falls with the epochs, and with the learning rate towards 0.1."""
    epochs, lr = setting.config.budget.epochs, setting.config.optimizer.lr
    error = abs(math.log(lr / 0.1)) + 1 / epochs + 0.01 * setting.seed
    return {"error": error, "validation_error": error, "epochs": epochs}


def wrong_name(setting):
    return {"accuracy": 0.5}


def wrong_value(setting):
    return {"error": "small"}


def returns_a_number(setting):
    return 0.5


def diverges(setting):
    return {"error": float("nan")}


def raises(setting):
    raise RuntimeError("no luck today")


def norm_of_the_trainer(setting):
    setting.normalize(nn.Sequential(nn.BatchNorm1d(3)))
    return {"error": 0.0}


def without_validation(setting):
    return {"error": 0.5}


def resumes(setting):
    """The number of processes that are told that the run was begun before. The second one comes later."""
    time.sleep(dist_rank())
    dist.init_process_group("gloo")
    told = torch.tensor(float(setting.resume))
    dist.all_reduce(told)
    dist.destroy_process_group()
    return {"error": told}


def dist_rank():
    return int(os.environ.get("RANK", "0"))
