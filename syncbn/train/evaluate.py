"""Evaluations of a model, on all processes, with running, batch and population statistics.

Comparing these separates what small batches did to the training from what they did to the statistics that inference
uses (Wu and Johnson 2021, arXiv 2105.07576, sections 3 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.population import LayerDivergence, Population, batch_statistics
from syncbn.train.batches import fetched, forward, leaves, loss_of, metrics_of
from syncbn.train.config import LocalError
from syncbn.train.data.order import order_of
from syncbn.train.data.samples import Key, Keyed, batch_loader
from syncbn.train.schedule import batches_of
from syncbn.train.state import Run
from syncbn.train.task import Sum
from syncbn.train.tasks.named import TaskError

Values = dict[str, float]
"""The loss (``loss``) and the metrics of a task, each divided over all samples; NaN where nothing was counted."""


def evaluate(run: Run, samples: Keyed) -> Values:
    """The loss and the metrics on a data set, in evaluation mode, over all processes."""
    size, workers = run.config.budget.eval_batch_size, run.config.data.workers
    rank, processes = run.partition.placement.rank, run.partition.placement.processes
    # This process's part of each batch: no padding, no sample twice. A part may be empty.
    parts = []
    for start in range(0, len(samples), size):
        n = min(size, len(samples) - start)
        parts.append([(0, start + i) for i in range(rank * n // processes, (rank + 1) * n // processes)])
    was_training = {module: module.training for module in run.model.modules()}
    run.model.eval()
    try:
        loaded = fetched(run, batch_loader(samples, parts, workers))
        values, counted = _values(run, zip(parts, loaded, strict=True))
    finally:
        for module, mode in was_training.items():
            module.training = mode
    assert counted == len(samples), f"evaluated {counted} of {len(samples)} samples"
    name = run.task.metric.name
    if name not in values:
        raise TaskError(f"task {run.task_name}: its metric is {name!r}, but metrics() returned {sorted(values)}")
    if math.isnan(values[name]) and math.isfinite(values["loss"]):
        raise TaskError(f"task {run.task_name}: metrics() gave NaN for {name!r}, expected a number, or a count above 0")
    return values


@torch.no_grad()
def _values(run: Run, loaded: Iterable[tuple[list[Key], tuple[Any, Any]]]) -> tuple[Values, int]:
    """As :func:`evaluate`, in the model's present mode, over this process's part of each batch; and the samples seen.

    In training mode the layers may communicate, so the model also gets empty parts. A last, smaller batch may then
    leave a logical GPU with one value per channel, which has no variance. Only the processes that share its statistics
    see the error, and the others have collectives to come. So all continue to the end; the loss is then NaN on all of
    them.
    """
    sums: dict[str, Tensor] = {"loss": torch.zeros(2, dtype=torch.float64, device=run.device)}
    counted = 0
    training = any(module.training for module in run.model.modules())
    for keys, (inputs, targets) in loaded:
        if not (keys or training):
            continue
        counted += len(keys)
        try:
            outputs = forward(run, run.model, inputs, targets)
        except LocalError as error:
            if not training or isinstance(error, TaskError):
                raise
            sums["loss"] += math.nan
            continue
        if keys:
            total, count = loss_of(run, outputs, targets, [1] * len(keys))
            if total.isnan() and all(out.isfinite().all() for out in leaves(outputs)):
                problem = "loss() gave NaN for finite outputs, as a mean over nothing is"
                raise TaskError(f"task {run.task_name}: {problem}; return a Sum of totals and counts")
            found = {"loss": torch.stack((total.double(), torch.as_tensor(count, device=run.device).double()))}
            for name, pair in (found | metrics_of(run, outputs, targets)).items():
                sums[name] = sums[name] + pair if name in sums else pair
    sums, counted = _added(run, sums, counted)
    return {name: Sum(*pair).mean() for name, pair in sums.items()}, counted


def _added(run: Run, sums: dict[str, Tensor], counted: int) -> tuple[dict[str, Tensor], int]:
    """Sums and numbers of samples over all processes. A process without samples may lack some names."""
    everywhere: list[Any] = [({name: pair.cpu() for name, pair in sums.items()}, counted)]
    if (processes := run.partition.placement.processes) > 1:
        own, everywhere = everywhere[0], [None] * processes
        dist.all_gather_object(everywhere, own)
    added: dict[str, Tensor] = {}
    for part, _ in everywhere:
        for name, pair in part.items():
            if name in added and added[name].shape != pair.shape:
                raise TaskError(f"task {run.task_name}: metrics() gave {name!r} different shapes on different batches")
            added[name] = added[name] + pair if name in added else pair
    return added, sum(number for _, number in everywhere)


def evaluate_statistics(run: Run, final: Values) -> tuple[list[dict[str, Any]], list[LayerDivergence]]:
    """The entries of :attr:`RunResult.evaluations`, and the divergence of each layer over the largest population.

    ``final`` is the last evaluation on the test set, with running statistics that are the same on all processes.
    """
    found: list[dict[str, Any]] = []

    def add(statistics: str, values: Values | None, estimator: str | None = None, samples: int | None = None) -> None:
        found.append({"statistics": statistics, "estimator": estimator, "samples": samples, "test": values})

    add("running", final)
    if not run.norms:
        return found, []
    # BatchRenorm pulls batch statistics to the running ones: evaluating with them would repeat the first entry.
    if run.config.evaluation.batch and run.config.norm.name != "renorm":
        # Ordered and cut as in training: under class skew, the statistics are then like those of the training.
        test, c = run.data.test, run.config
        order = order_of(len(test), test.labels, c.data.class_skew, c.seed, 0)
        with batch_statistics(run.model):
            values, _ = _values(run, _loaded(run, test, [(0, i) for i in order]))
        # None if a last, smaller batch cannot be normalized.
        add("batch", None if math.isnan(values["loss"]) else values)
    layers: list[LayerDivergence] = []
    population = Population(run.model)
    for samples in _gather(run, population):
        layers = population.divergences()
        for estimator in ("mean", "total"):
            with population.used(estimator):
                add("population", evaluate(run, run.data.test), estimator, samples)
    return found, layers


def _gather(run: Run, population: Population) -> Iterator[int]:
    """Gather population statistics over the numbers of samples in the configuration; yields each number when reached.

    The images are those of the epoch after the last one, in whole global batches, normalized as in training.
    """
    train, c = run.data.train, run.config
    size = min(c.global_batch_size, len(train))
    most = len(train) // size * size
    ends = sorted({min(-(-n // size) * size, most) for n in c.evaluation.population_samples})
    order = run.schedule.order(run.schedule.epochs)
    done = 0
    for end in ends:
        with population.observing(), torch.no_grad():
            for _, batch in _loaded(run, train, [(run.schedule.epochs, i) for i in order[done:end]]):
                forward(run, run.model, *batch)
        done = end
        yield end


def _loaded(run: Run, samples: Keyed, keys: list[Key]) -> Iterator[tuple[list[Key], tuple[Any, Any]]]:
    """This process's part of each global batch. The layers are told the batch's groups before it is yielded."""
    batches = batches_of(keys, run.config.global_batch_size)
    parts = [run.local(batch) for batch in batches]
    loaded = zip(parts, fetched(run, batch_loader(samples, parts, run.config.data.workers)), strict=True)
    for batch, part in zip(batches, loaded, strict=True):
        run.tell_groups(len(batch))
        yield part
