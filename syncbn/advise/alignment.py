"""How close the gradient with small normalization batches is to that with a large one, at the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from syncbn.layers import BatchError, RowsError, SampleGroups
from syncbn.population import restored
from syncbn.train.batches import fetched, forward, loss_of
from syncbn.train.config import ConfigError, LocalError, require
from syncbn.train.data.samples import Key, batch_loader
from syncbn.train.state import Run


def gradient_alignment(run: Run, sizes: Sequence[int], samples: int, probes: int) -> dict[int, float | None]:
    """The cosine between the gradient with normalization batches of each size and that with large ones.

    A probe is a number of samples in the order of training, which is normalized in batches of each size, and as a
    whole. The gradients are those of the same samples at the same weights, so that normalization alone differs. They
    are added over the probes: what remains is their common direction, and not the noise of a single batch. The cosine
    is that of each weight (convolutions, linear layers), and the mean is taken: the gradient as a whole is that of its
    largest part, which is often the last layer's and depends on no statistics. Weights and buffers stay as they are.

    Args:
        run: a prepared run with a synchronized norm, on one process.
        sizes: normalization batch sizes: so many consecutive samples share a mean.
        samples: of a probe; see :func:`probe_length`.
        probes: from the beginning of the first epoch on; at most as many as the training set has.

    Returns:
        The cosine by size, of those that divide a probe into at least two: a size compared with itself would look
        harmless. None if a layer cannot normalize such a batch, because it has one value per channel.

    Raises:
        ConfigError: a gradient is not finite or zero everywhere, or the rows of a layer are not samples.
        LocalError: a probe as a whole cannot be normalized, or the task's data or code raised an error.
    """
    length = probe_length(run, samples)
    sizes = [size for size in sizes if length % size == 0 and length >= 2 * size]
    keys = list(_probes(run, length, probes))
    sums: dict[int, Tensor | None] = {}
    whole: Tensor | None = None
    run.model.train()
    with restored(run.model.buffers()):
        for probe, batch in zip(keys, fetched(run, batch_loader(run.data.train, keys, 0)), strict=True):
            gradient = _gradient(run, batch, len(probe), len(probe))
            whole = gradient if whole is None else whole + gradient
            for size in sizes:
                if sums.get(size, whole) is not None:
                    sums[size] = added_gradient(sums.get(size), run, batch, len(probe), size)
    assert whole is not None, "a training set has samples"
    return {size: None if found is None else _mean_cosine(run, found, whole) for size, found in sums.items()}


def _mean_cosine(run: Run, a: Tensor, b: Tensor) -> float:
    """The mean over the weights of the cosine of two flat gradients; a weight without any gradient does not count."""
    parameters = _trained(run)
    sizes = [parameter.numel() for parameter in parameters]
    cosines = [
        float(cosine_similarity(x.double(), y.double(), dim=0))
        for parameter, x, y in zip(parameters, a.split(sizes), b.split(sizes), strict=True)
        if parameter.dim() > 1 and bool(y.any())
    ]
    known = bool(cosines) and all(map(math.isfinite, cosines))
    expected = "a model whose weights get finite gradients; a smaller optimizer.lr may help"
    require(known, "task.name", run.task_name, expected)
    return fmean(cosines)


def _trained(run: Run) -> list[nn.Parameter]:
    return [parameter for parameter in run.model.parameters() if parameter.requires_grad]


def added_gradient(so_far: Tensor | None, run: Run, batch: tuple[Any, Any], samples: int, size: int) -> Tensor | None:
    """``so_far`` plus the gradient of a batch; None if a layer cannot normalize ``size`` of its samples."""
    try:
        gradient = _gradient(run, batch, samples, size)
    except LocalError as error:
        if isinstance(error.__cause__, RowsError):
            expected = f"a model whose layers all have samples as rows ({error.__cause__})"
            raise ConfigError("task.name", run.task_name, expected) from error
        if isinstance(error.__cause__, BatchError):  # one value per channel has no variance
            return None
        raise
    return gradient if so_far is None else so_far + gradient


def probe_length(run: Run, samples: int) -> int:
    """The samples of a probe: whole global batches, as many as the training set has.

    There are at least ``samples``, two global batches, and eight runs of one class: a probe of one class or two would
    be as bad a reference as a small batch.
    """
    c, available = run.config, len(run.data.train)
    least = max(samples, 2 * c.global_batch_size, 8 * c.data.class_skew)
    whole = min(-(-least // c.global_batch_size), available // c.global_batch_size) * c.global_batch_size
    return whole or available // c.per_gpu_batch_size * c.per_gpu_batch_size


def _probes(run: Run, length: int, probes: int) -> Iterator[list[Key]]:
    order = run.schedule.order(0)
    for start in range(0, min(probes, len(order) // length) * length, length):
        yield [(0, index) for index in order[start : start + length]]


def _gradient(run: Run, batch: tuple[Any, Any], samples: int, size: int) -> Tensor:
    """The gradient of a batch's loss with respect to all parameters, flat, with ``size`` samples to a mean."""
    number = -(-samples // size)
    index = None if number == 1 else torch.arange(samples, device=run.device) // size
    groups = SampleGroups(index=index, number=number, smallest=samples % size or size)
    for layer in run.norms:
        layer.sample_groups = groups
    torch.manual_seed(run.config.seed)  # dropout draws the same each time
    inputs, targets = batch
    per_gpu = run.config.per_gpu_batch_size
    sizes = [min(per_gpu, samples - start) for start in range(0, samples, per_gpu)]
    total, _ = loss_of(run, forward(run, run.wrapped, inputs, targets), targets, sizes)
    run.model.zero_grad()
    total.backward()  # autograd.grad does not go through reentrant checkpoints
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in _trained(run)]
    run.model.zero_grad()
    return torch.cat([(each.to_dense() if each.is_sparse else each).flatten() for each in gradients])
