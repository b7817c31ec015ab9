"""A training loop of two ranks that goes wrong as its argument says: ``torchrun hanging_loop.py FAULT``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=90))
first, fault = dist.get_rank() == 0, sys.argv[1]
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
net = syncbn.convert(net, "sync")
images = torch.randn(4, 3, 8, 8)


def step() -> Tensor:
    loss: Tensor = net(images).square().mean()
    loss.backward()
    return loss.detach()


def evaluate() -> None:
    net.eval()
    net(images)
    dist.all_reduce(torch.zeros(1))


with syncbn.watchdog(timeout=5, silence=5):
    for _ in range(3):
        step()
    if fault == "eval" and not first:
        evaluate()
    elif fault == "train_alone" and not first:
        time.sleep(60)
    elif fault == "uneven":
        for _ in syncbn.uneven([images] * 4):
            time.sleep(0 if first else 60)
    elif fault == "batch_fewer" and not first:
        dist.barrier()
    elif fault == "stopped" and not first:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "suspended":
        subprocess.Popen(["sh", "-c", f"sleep 9; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "other_layer" and not first:
        net[1] = net[4]
    elif fault == "skipped":
        if not first:
            net[1].eval()
        with torch.no_grad():
            for _ in range(40):
                net(images)
    elif fault == "slow":
        time.sleep(0 if first else 3)
    elif fault == "error" and not first:
        raise KeyError("a mistake of the user's")
    for _ in range(40):
        step()
dist.barrier()  # a rank that ends closes the connections that others may still read from
dist.destroy_process_group()
print("done")
