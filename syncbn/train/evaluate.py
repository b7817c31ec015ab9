"""Evaluations of a model, on all processes, with running, batch and population statistics.

Comparing these separates what small batches did to the training from what they did to the statistics that inference
uses (Wu and Johnson 2021, arXiv 2105.07576, sections 3 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.population import LayerDivergence, Population, batch_statistics
from syncbn.train.batches import described, fetched, forward, loss_of, metrics_of, predictions_of
from syncbn.train.config import LocalError
from syncbn.train.data.order import order_of
from syncbn.train.data.samples import Key, Keyed, batch_loader
from syncbn.train.schedule import batches_of
from syncbn.train.state import Run
from syncbn.train.task import Sum
from syncbn.train.tasks.named import TaskError, blamed
from syncbn.trees import leaves

Values = dict[str, float]
"""The loss (``loss``) and the metrics of a task, each divided over all samples; NaN where nothing was counted."""
Seen = Callable[[list[Key], Any, Any], None]
"""Called with the keys, outputs and targets of this process's part of each batch."""


def evaluate(run: Run, samples: Keyed, seen: Seen | None = None) -> Values:
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
        values, counted = _values(run, zip(parts, loaded, strict=True), seen)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    assert counted == len(samples), f"evaluated {counted} of {len(samples)} samples"
    name = run.task.metric.name
    if not math.isfinite(values["loss"]):
        values.setdefault(name, math.nan)  # a model that diverged has no metrics of the set
    if name not in values:
        raise TaskError(f"task {run.task_name}: its metric is {name!r}, but its metrics are {sorted(values)}")
    if math.isnan(values[name]) and math.isfinite(values["loss"]):
        raise TaskError(f"task {run.task_name}: metric {name!r} is NaN, expected a number, or a count above 0")
    problem = run.task.metric.problem(values[name])
    if problem is not None and math.isfinite(values["loss"]):
        raise TaskError(
            f"task {run.task_name}: got {problem}; for any other metric, the task's Metric has percent=False"
        )
    return values


class _Counted(NamedTuple):
    """What is known of a data set after its batches."""

    sums: dict[str, Tensor]
    """Totals and counts of the loss and the metrics."""
    samples: int
    predictions: dict[int, Any]
    """By the index of the sample, for the metrics of the whole set."""


@torch.no_grad()
def _values(
    run: Run, loaded: Iterable[tuple[list[Key], tuple[Any, Any]]], seen: Seen | None = None
) -> tuple[Values, int]:
    """As :func:`evaluate`, in the model's present mode, over this process's part of each batch; and the samples seen.

    In training mode the layers may communicate, so the model also gets empty parts. A last, smaller batch may then
    leave a logical GPU with one value per channel, which has no variance. Only the processes that share its statistics
    see the error, and the others have collectives to come. So all continue to the end; the loss is then NaN on all of
    them.
    """
    sums: dict[str, Tensor] = {"loss": torch.zeros(2, dtype=torch.float64, device=run.device)}
    samples = 0
    predictions: dict[int, Any] = {}
    training = any(module.training for module in run.model.modules())
    for keys, (inputs, targets) in loaded:
        if not (keys or training):
            continue
        samples += len(keys)
        try:
            outputs = forward(run, run.model, inputs, targets)
        except LocalError as error:
            if not training or isinstance(error, TaskError):
                raise
            sums["loss"] += math.nan
            continue
        if keys:
            if seen is not None:
                seen(keys, outputs, targets)
            total, count = loss_of(run, outputs, targets, [1] * len(keys))
            if total.isnan() and all(out.isfinite().all() for out in leaves(outputs)):
                problem = "loss() gave NaN for finite outputs, as a mean over nothing is"
                raise TaskError(f"task {run.task_name}: {problem}; return a Sum of totals and counts")
            found = {"loss": torch.stack((total.double(), torch.as_tensor(count, device=run.device).double()))}
            for name, pair in (found | metrics_of(run, outputs, targets)).items():
                sums[name] = sums[name] + pair if name in sums else pair
            of_samples = predictions_of(run, outputs, targets, len(keys)) or []
            predictions.update(zip((index for _, index in keys), of_samples, strict=False))
    counted = _added(run, _Counted(sums, samples, predictions))
    values = {name: Sum(*pair).mean() for name, pair in counted.sums.items()}
    return values | _of_set(run, counted.predictions, values), counted.samples


def _added(run: Run, counted: _Counted) -> _Counted:
    """The same over all processes. A process without samples may lack some names."""
    own = counted._replace(sums={name: pair.cpu() for name, pair in counted.sums.items()})
    everywhere: list[Any] = [own]
    if (processes := run.partition.placement.processes) > 1:
        everywhere = [None] * processes
        dist.all_gather_object(everywhere, own)
    added: dict[str, Tensor] = {}
    predictions: dict[int, Any] = {}
    for part in everywhere:
        predictions |= part.predictions
        for name, pair in part.sums.items():
            if name in added and added[name].shape != pair.shape:
                raise TaskError(f"task {run.task_name}: metrics() gave {name!r} different shapes on different batches")
            added[name] = added[name] + pair if name in added else pair
    return _Counted(added, sum(part.samples for part in everywhere), predictions)


def _of_set(run: Run, predictions: dict[int, Any], values: Values) -> Values:
    """The task's metrics of the whole set; none if its batches could not be evaluated."""
    if not predictions or not math.isfinite(values["loss"]):
        return {}
    with blamed(run.task_name, "metrics_of_set()"):
        found = run.task.metrics_of_set([predictions[index] for index in sorted(predictions)])
        if not isinstance(found, Mapping) or found.keys() & values.keys():
            expected = f"a dict of numbers, with other names than {sorted(values)}"
            raise TypeError(f"it returned {described(found)}, expected {expected}")
        return {str(name): float(value) for name, value in found.items()}


def evaluate_statistics(
    run: Run, final: Values, seen: Callable[[str], Seen] | None = None
) -> tuple[list[dict[str, Any]], list[LayerDivergence]]:
    """The entries of :attr:`RunResult.evaluations`, and the divergence of each layer over the largest population.

    ``final`` is the last evaluation on the test set, with running statistics that are the same on all processes.
    ``seen`` makes what is called with the batches of the further evaluations, for ``batch``, ``mean`` and ``total``.
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
            values, _ = _values(run, _loaded(run, test, [(0, i) for i in order]), seen and seen("batch"))
        # None if a last, smaller batch cannot be normalized.
        add("batch", None if math.isnan(values["loss"]) else values)
    layers: list[LayerDivergence] = []
    population = Population(run.model)
    for samples in _gather(run, population):
        layers = population.divergences()
        for estimator in ("mean", "total"):
            with population.used(estimator):
                values = evaluate(run, run.data.test, seen and seen(estimator))
                add("population", values, estimator, samples)
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
