"""Batches of a task: trees of tensors on their way to the device, their loss and their metrics."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from syncbn.layers import BatchError, RowsError
from syncbn.train.config import ConfigError, LocalError
from syncbn.train.task import Sum
from syncbn.train.tasks.named import blamed
from syncbn.trees import leaves, tree_map

if TYPE_CHECKING:
    from syncbn.train.state import Run


_SIGNAL_S = 2.0
"""A connection breaks because a loader process is gone. Torch's handler of its signal, which comes within this time,
raises an error that names it."""
_TOO_FEW = re.compile(r"Expected more than 1 (value per channel|spatial element) when training, got input size")


def moved(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``tree`` on a device, its floating tensors in ``dtype``."""

    def move(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)

    return tree_map(move, tree)


def split(tree: Any, sizes: list[int]) -> list[Any]:
    """Consecutive parts of a tree, of these numbers of samples; all of its tensors have samples in dimension 0."""
    samples = sum(sizes)

    def check(x: Tensor) -> Tensor:
        if x.ndim == 0 or len(x) != samples:
            remedy = "return a Sum, and run one process for each logical GPU"
            raise TypeError(f"a scalar loss is of each logical GPU or sample, and {described(x)} has none; {remedy}")
        return x

    tree_map(check, tree)
    parts = []
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        parts.append(tree_map(lambda x, start=start, size=size: x[start : start + size], tree))  # type: ignore[misc]
    return parts


def fetched(run: Run, loaded: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The batches, on the run's device. An error of the task's data names the task."""
    while True:
        with blamed(run.task_name, "its data"):
            try:
                batch = next(loaded, None)
            except (ConnectionError, EOFError):
                time.sleep(_SIGNAL_S)
                raise
            except (ConfigError, RuntimeError) as error:
                # The DataLoader passes on a loader process's error as a RuntimeError whose text ends with the message.
                found = re.search(r"ConfigError: (.+)", f"{type(error).__name__}: {error}")
                if found is None:
                    raise
                raise LocalError(found[1]) from error
        if batch is None:
            return
        inputs, targets = (moved(tree, run.device, run.dtype) for tree in batch)
        yield inputs, targets


def forward(run: Run, model: nn.Module, inputs: Any, targets: Any) -> Any:
    """The model's outputs for a batch."""
    with blamed(run.task_name, "the model"):
        try:
            return run.task.outputs(model, inputs, targets)
        except ValueError as error:
            # Torch's norms, such as instance normalization, have no class of error for maps of one value.
            if not (isinstance(error, BatchError) or _TOO_FEW.match(str(error))):
                raise
            if isinstance(error, RowsError):
                raise LocalError(f"gpus: got {run.config.gpus}, expected as many processes: {error}") from error
            # For example a last batch that gives one logical GPU a single 1x1 map, which has no variance.
            got = f"per_gpu_batch_size: got {run.config.per_gpu_batch_size}"
            raise LocalError(f"{got}, expected batches that every layer can normalize: {error}") from error


def loss_of(run: Run, outputs: Any, targets: Any, sizes: list[int]) -> tuple[Tensor, Tensor | int]:
    """Total and count of a batch's loss, both scalars. An integer count is the number of samples.

    ``sizes`` are the samples of each part of the batch that a scalar loss is the mean of.
    """
    samples = sum(sizes)
    if samples == 0:  # a mean over nothing is NaN, but the backward pass is due on this process too
        differentiable = [out for out in leaves(outputs) if out.requires_grad]
        return sum((0 * torch.where(out.isfinite(), out, 0).sum() for out in differentiable), torch.zeros(())), 0
    with blamed(run.task_name, "loss()"):
        found = run.task.loss(outputs, targets)
        if isinstance(found, Sum):
            total, count = found.total, found.count
        elif isinstance(found, Tensor) and found.numel() == 1:
            total, count = found * samples, samples
            if len(sizes) > 1:
                parts = zip(split(outputs, sizes), split(targets, sizes), sizes, strict=True)
                total = torch.stack([n * _scalar(run.task.loss(*part)) for *part, n in parts]).sum()
        else:
            raise TypeError(f"it returned {described(found)}, expected a Sum or a scalar tensor")
        total = _scalar(total)
        if torch.is_grad_enabled() and not total.requires_grad:
            raise TypeError("it returned a tensor without gradient, expected one that is computed from the outputs")
        if isinstance(count, Tensor) or count != samples:
            return total, _scalar(torch.as_tensor(count)).detach().to(total.device)
    return total, samples


def metrics_of(run: Run, outputs: Any, targets: Any) -> dict[str, Tensor]:
    """Totals and counts of a batch's metrics: float64 (2,), or (2, K) for K classes, on the run's device."""
    with blamed(run.task_name, "metrics()"):
        found = run.task.metrics(outputs, targets)
        if not isinstance(found, Mapping) or "loss" in found:
            raise TypeError(f"it returned {described(found)}, expected a dict of Sums, none of them called 'loss'")
        return {str(name): _pair(str(name), value, run.device) for name, value in found.items()}


def predictions_of(run: Run, outputs: Any, targets: Any, samples: int) -> list[Any] | None:
    """What the metrics of the whole set need of each sample of a batch, on the CPU; None if the task has none."""
    with blamed(run.task_name, "predictions()"):
        found = run.task.predictions(outputs, targets)
        if found is None:
            return None
        if not isinstance(found, list | tuple | Tensor) or len(found) != samples:
            raise TypeError(f"it returned {described(found)}, expected a list of {samples}, one entry for each sample")
        # Of a view of the batch, the whole batch would travel.
        return [tree_map(lambda x: x.detach().cpu().clone(), each) for each in found]


def _pair(name: str, value: Any, device: torch.device) -> Tensor:
    if not isinstance(value, Sum):
        raise TypeError(f"{name!r} is {described(value)}, expected a Sum")
    total, count = (torch.as_tensor(part).detach().to(device, torch.float64) for part in (value.total, value.count))
    if total.shape != count.shape or total.ndim > 1:
        shapes = f"{tuple(total.shape)} and {tuple(count.shape)}"
        raise ValueError(f"total and count of {name!r} have shapes {shapes}, expected () or one number for each class")
    return torch.stack((total, count))


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"it returned {described(value)}, expected a scalar tensor")
    return value.reshape(())


def described(value: Any) -> str:
    """What a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}"[:80] if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
