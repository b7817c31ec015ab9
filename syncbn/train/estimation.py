"""Three evaluations of a trained model: they tell what small batches did to the training from what they did to the
estimate of the statistics that inference uses (Wu and Johnson 2021, arXiv 2105.07576, sections 3 and 5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from syncbn.population import LayerDivergence, Population, batch_statistics
from syncbn.train.data.datasets import Images, Key, batch_loader
from syncbn.train.data.order import epoch_order
from syncbn.train.evaluate import count_errors, evaluate
from syncbn.train.state import Run

Entry = dict[str, Any]


def evaluate_statistics(run: Run, final: Entry) -> tuple[list[Entry], list[LayerDivergence]]:
    """Evaluate the trained model under each kind of statistics.

    Args:
        run: a run that has ended, its running statistics the same on all processes.
        final: its last evaluation, which is that with running statistics.

    Returns:
        The entries of :attr:`RunResult.evaluations`, and each layer's divergence, measured on the largest population.
    """
    found = [_entry("running", final["test_error"], final["test_loss"])]
    if not run.norms:
        return found, []
    wanted = run.config.evaluation
    # Renormalized, a batch is brought back to the running statistics: that would be no second opinion.
    if wanted.batch and run.config.norm.name != "renorm":
        found.append(_entry("batch", *_with_batch_statistics(run)))
    layers: list[LayerDivergence] = []
    population = Population(run.model)
    for samples in _gather(run, population):
        layers = population.divergences()
        for estimator in ("mean", "total"):
            with population.used(estimator):
                error, loss, _ = _evaluate(run)
            found.append(_entry("population", error, loss, estimator, samples))
    return found, layers


def _entry(
    statistics: str, error: float | None, loss: float | None, estimator: str | None = None, samples: int | None = None
) -> Entry:
    values = {"statistics": statistics, "estimator": estimator, "samples": samples}
    return values | {"test_error": error, "test_loss": loss}


def _evaluate(run: Run) -> tuple[float, float, int]:
    size, workers = run.config.budget.eval_batch_size, run.config.data.workers
    return evaluate(run.model, run.data.test, size, run.layout.placement, run.device, run.dtype, workers)


def _with_batch_statistics(run: Run) -> tuple[float | None, float | None]:
    """Error and loss with the test batches' own statistics; None where a last, smaller batch cannot be normalized.

    The test images come in the training's kind of order and in its batches: under class skew the statistics that a
    batch brings are then those that the model was trained with.
    """
    test, c = run.data.test, run.config
    order = epoch_order(test.labels, c.data.class_skew, c.seed, 0).tolist()
    batches = list(_cut(run, [(0, i) for i in order]))
    with batch_statistics(run.model):
        loaded = _loaded(run, test, batches)
        error, loss, count = count_errors(run.model, loaded, run.layout.placement, run.device, run.dtype)
    return (error, loss) if count else (None, None)


def _gather(run: Run, population: Population) -> Iterator[int]:
    """Gather population statistics over the numbers of samples asked for; yields each number once it is reached.

    The images are those of the epoch after the last, augmented, in whole global batches of the training's kind, so
    that a normalization batch is what it was in training; a number is rounded up to whole batches.
    """
    train, c = run.data.train, run.config
    size = min(c.global_batch_size, len(train))
    most = len(train) // size * size
    ends = sorted({min(-(-n // size) * size, most) for n in c.evaluation.population_samples})
    order = epoch_order(train.labels, c.data.class_skew, c.seed, run.schedule.epochs).tolist()
    done = 0
    for end in ends:
        keys = [(run.schedule.epochs, i) for i in order[done:end]]
        with population.observing(), torch.no_grad():
            for x, _ in _loaded(run, train, list(_cut(run, keys))):
                run.model(x.to(run.device, run.dtype))
        done = end
        yield end


def _loaded(run: Run, images: Images, batches: list[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch, of which the layers have been told just before."""
    local = [run.local(batch) for batch in batches]
    for batch, loaded in zip(batches, batch_loader(images, local, run.config.data.workers), strict=True):
        run.tell_groups(len(batch))
        yield loaded


def _cut(run: Run, keys: list[Key]) -> Iterator[list[Key]]:
    size = run.config.global_batch_size
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
