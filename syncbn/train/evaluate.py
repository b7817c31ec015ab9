"""Evaluations of a model on the test set, on all processes, with running, batch and population statistics.

Comparing these separates what small batches did to the training from what they did to the statistics that inference
uses (Wu and Johnson 2021, arXiv 2105.07576, sections 3 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncbn.population import LayerDivergence, Population, batch_statistics
from syncbn.train.data.datasets import Images, Key, batch_loader
from syncbn.train.data.order import epoch_order
from syncbn.train.schedule import batches_of
from syncbn.train.state import Run


def evaluate(run: Run) -> tuple[float, float, int]:
    """Error (fraction wrong), mean cross entropy and number of test images, in evaluation mode, over all processes."""
    test, size, workers = run.data.test, run.config.budget.eval_batch_size, run.config.data.workers
    rank, processes = run.partition.placement.rank, run.partition.placement.processes
    # This process's part of each batch: no padding, no image twice. A part may be empty.
    parts = []
    for start in range(0, len(test), size):
        n = min(size, len(test) - start)
        parts.append([(0, start + i) for i in range(rank * n // processes, (rank + 1) * n // processes)])
    was_training = {module: module.training for module in run.model.modules()}
    run.model.eval()
    try:
        error, loss, count = _count_errors(run, batch_loader(test, parts, workers))
    finally:
        for module, mode in was_training.items():
            module.training = mode
    assert count == len(test), f"counted {count} of {len(test)} test images"
    return error, loss, count


@torch.no_grad()
def _count_errors(run: Run, loaded: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, int]:
    """As :func:`evaluate`, in the model's present mode, over this process's part of each batch.

    In training mode the layers may communicate, so the model also gets empty parts. A last, smaller batch may then
    leave a logical GPU with one value per channel, which has no variance. Only the processes that share its statistics
    see the error, and the others have collectives to come. So all continue to the end; the figures are then NaN and the
    count 0 on all of them.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)  # wrong, loss, count
    training = any(module.training for module in run.model.modules())
    for x, y in loaded:
        if not (len(y) or training):
            continue
        try:
            logits = run.model(x.to(run.device, run.dtype))
        except ValueError:
            if not training:
                raise
            totals += math.nan
        else:
            logits, y = logits.to(torch.float64), y.to(run.device)
            wrong = (logits.argmax(1) != y).sum().to(torch.float64)
            loss = F.cross_entropy(logits, y, reduction="sum")
            totals += torch.stack((wrong, loss, torch.full_like(loss, len(y))))
    if run.partition.placement.processes > 1:
        dist.all_reduce(totals)
    all_wrong, all_loss, count = totals.tolist()
    return (math.nan, math.nan, 0) if math.isnan(count) else (all_wrong / count, all_loss / count, int(count))


def evaluate_statistics(run: Run, final: dict[str, Any]) -> tuple[list[dict[str, Any]], list[LayerDivergence]]:
    """The entries of :attr:`RunResult.evaluations`, and the divergence of each layer over the largest population.

    ``final`` is the last evaluation of the run, with running statistics that are the same on all processes.
    """
    found: list[dict[str, Any]] = []

    def add(statistics: str, error: Any, loss: Any, estimator: str | None = None, samples: int | None = None) -> None:
        kind = {"statistics": statistics, "estimator": estimator, "samples": samples}
        found.append({**kind, "test_error": error, "test_loss": loss})

    add("running", final["test_error"], final["test_loss"])
    if not run.norms:
        return found, []
    # BatchRenorm pulls batch statistics to the running ones: evaluating with them would repeat the first entry.
    if run.config.evaluation.batch and run.config.norm.name != "renorm":
        # Ordered and cut as in training: under class skew, the statistics are then like those of the training.
        order = epoch_order(run.data.test.labels, run.config.data.class_skew, run.config.seed, 0).tolist()
        with batch_statistics(run.model):
            error, loss, count = _count_errors(run, _loaded(run, run.data.test, [(0, i) for i in order]))
        # None if a last, smaller batch cannot be normalized.
        add("batch", error if count else None, loss if count else None)
    layers: list[LayerDivergence] = []
    population = Population(run.model)
    for samples in _gather(run, population):
        layers = population.divergences()
        for estimator in ("mean", "total"):
            with population.used(estimator):
                error, loss, _ = evaluate(run)
            add("population", error, loss, estimator, samples)
    return found, layers


def _gather(run: Run, population: Population) -> Iterator[int]:
    """Gather population statistics over the numbers of samples in the configuration; yields each number when reached.

    The images are those of the epoch after the last one, in whole global batches, normalized as in training.
    """
    train, c = run.data.train, run.config
    size = min(c.global_batch_size, len(train))
    most = len(train) // size * size
    ends = sorted({min(-(-n // size) * size, most) for n in c.evaluation.population_samples})
    order = epoch_order(train.labels, c.data.class_skew, c.seed, run.schedule.epochs).tolist()
    done = 0
    for end in ends:
        with population.observing(), torch.no_grad():
            for x, _ in _loaded(run, train, [(run.schedule.epochs, i) for i in order[done:end]]):
                run.model(x.to(run.device, run.dtype))
        done = end
        yield end


def _loaded(run: Run, images: Images, keys: list[Key]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of each global batch. The layers are told the batch's groups before it is yielded."""
    batches = batches_of(keys, run.config.global_batch_size)
    parts = batch_loader(images, [run.local(batch) for batch in batches], run.config.data.workers)
    for batch, loaded in zip(batches, parts, strict=True):
        run.tell_groups(len(batch))
        yield loaded
