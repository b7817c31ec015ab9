"""Evaluation on all processes, every test image exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.train.data.datasets import Images, Key, batch_loader
from syncbn.train.logical_gpus import Placement


def shares(samples: int, batch_size: int, placement: Placement) -> Iterator[list[Key]]:
    """This process's keys of each evaluation batch: nothing padded, nothing twice, some lists perhaps empty."""
    rank, processes = placement.rank, placement.processes
    for start in range(0, samples, batch_size):
        n = min(batch_size, samples - start)
        first, last = start + rank * n // processes, start + (rank + 1) * n // processes
        yield [(0, i) for i in range(first, last)]


def evaluate(
    model: nn.Module,
    images: Images,
    batch_size: int,
    placement: Placement,
    device: torch.device,
    dtype: torch.dtype,
    workers: int = 0,
) -> tuple[float, float, int]:
    """Error (fraction wrong), mean cross entropy, and the number of images counted, over all processes.

    The model is put into evaluation mode for the time; a test image is in exactly one process's share. ``workers`` is
    the number of loader processes for images that are not held in memory.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        loaded = batch_loader(images, shares(len(images), batch_size, placement), workers)
        error, loss, count = count_errors(model, loaded, placement, device, dtype)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    assert count == len(images), f"counted {count} of {len(images)} test images"
    return error, loss, count


@torch.no_grad()
def count_errors(
    model: nn.Module,
    loaded: Iterable[tuple[Tensor, Tensor]],
    placement: Placement,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float, int]:
    """As :func:`evaluate`, in the model's present mode, over this process's images and labels of each batch.

    An empty share is not shown to the model in evaluation mode; in training mode its layers may wait for it. In that
    mode a last, smaller batch may leave some logical GPU with one value a channel, which has no variance. Only the
    processes that share statistics with that GPU find this, and the others have collectives to come, so all go on to
    the end, and the figures are NaN, and the count 0, on all of them.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # wrong, loss, count
    training = any(module.training for module in model.modules())
    for x, y in loaded:
        if not (len(y) or training):
            continue
        try:
            logits = model(x.to(device, dtype))
        except ValueError:
            if not training:
                raise
            totals += math.nan
        else:
            totals += _batch_totals(logits, y.to(device))
    if placement.processes > 1:
        dist.all_reduce(totals)
    wrong, loss, count = totals.tolist()
    return (math.nan, math.nan, 0) if math.isnan(count) else (wrong / count, loss / count, int(count))


def _batch_totals(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(torch.float64)
    wrong = (logits.argmax(1) != labels).sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((wrong.to(torch.float64), loss, torch.full_like(loss, len(labels))))
