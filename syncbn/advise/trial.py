"""A short training of the recommended remedy and of the next cheaper one, to see whether the advice holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from syncbn.advise.remedies import Advice, Remedy
from syncbn.advise.words import name_of
from syncbn.train.config import RunConfig
from syncbn.train.loop import train
from syncbn.train.result import RunResult
from syncbn.train.task import Task

HELD_OUT = 0.2
"""Of the training images of a classification that holds none out: the test set chooses nothing."""


def nearest(found: Advice) -> list[Remedy]:
    """The recommended remedy and the next cheaper one; the two that share the most if none is recommended."""
    remedies = [remedy for remedy in found.remedies if remedy.alignment is not None]
    last = next((i for i, remedy in enumerate(remedies) if remedy is found.recommended), len(remedies) - 1)
    return remedies[max(last - 1, 0) : last + 1]


def try_nearest(config: RunConfig, found: Advice, steps: int, task: Task | None = None) -> Iterator[str]:
    """Train :func:`nearest` for some optimizer steps with the run's seed, in this process; a line for each.

    The score is that of the validation set, or the training loss if the task has none. One seed and a short training
    tell a collapse from a training, and no small difference.
    """
    data = config.data
    if config.task.name == "classification" and task is None and data.validation_fraction == 0:
        data = replace(data, validation_fraction=HELD_OUT)
    budget = replace(config.budget, epochs=None, steps=steps, select="last", patience=None, checkpoint_every=0)
    evaluation = replace(config.evaluation, batch=False, population_samples=[])
    gpus = found.remedies[-1].gpus
    for remedy in nearest(found):
        local = remedy.gpus == 1
        norm = replace(config.norm, name="batch" if local else "sync", sync=False, ghost_batch_size=None)
        tried = replace(
            config,
            norm=norm,
            sync_group_size=None if local else remedy.gpus,
            data=data,
            budget=budget,
            evaluation=evaluation,
        )
        yield f"{name_of(remedy, gpus)}, {steps} steps: {_score(train(tried, task=task))}"


def _score(result: RunResult) -> str:
    metric = result.metric
    if result.status != "ok":
        return "diverged"
    score = None if result.validation is None else result.validation[metric.name]
    if score is None:
        return f"training loss {result.history[-1]['train_loss']:.3g}"
    return f"validation {metric.name} {metric.shown(score)}"
