"""Keys that count steps, such as a warm-up, and lie beyond the end of a study's runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from syncbn.study.plan.grid import Cell, unique_cells
from syncbn.train.config import RunConfig
from syncbn.train.data.datasets import training_size
from syncbn.train.result import RunResult
from syncbn.train.schedule import keys_beyond, total_steps
from syncbn.train.tasks.image_options import canvas_size


def beyond_lines(cells: Sequence[Cell], results: Mapping[str, RunResult]) -> list[str]:
    """One line for each arm with such keys: the keys, and the steps of the runs that end before.

    ``results`` are by the cells' keys. Runs whose number of training samples is not known are left out: those of a task
    of the user's that count epochs, before the first of them has ended.
    """
    runs = unique_cells(cells)
    samples = {_data_of(cell.config): results[cell.key].train_samples for cell in runs if cell.key in results}
    found: dict[str, list[tuple[Cell, int, dict[str, int]]]] = defaultdict(list)
    for cell in runs:
        steps = _steps(cell.config, samples)
        if steps is not None and (beyond := keys_beyond(cell.config, steps)):
            found[cell.arm].append((cell, steps, beyond))
    return [_line(arm, late, sum(cell.arm == arm for cell in runs)) for arm, late in found.items()]


def _line(arm: str, late: Sequence[tuple[Cell, int, dict[str, int]]], runs: int) -> str:
    keys: dict[str, set[int]] = defaultdict(set)
    for _, _, beyond in late:
        for key, value in beyond.items():
            keys[key].add(value)
    named = "; ".join(f"{key} {', '.join(map(str, sorted(values)))}" for key, values in keys.items())
    steps = sorted({number for _, number, _ in late})
    ends = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    short = "shorter runs of the tuning" if all(cell.rung for cell, _, _ in late) else f"{len(late)} of {runs} runs"
    which = "all runs" if len(late) == runs else short
    return f"arm {arm}: {named}: beyond the end of {which} at {ends}"


def _steps(config: RunConfig, samples: Mapping[str, int | None]) -> int | None:
    """The optimizer steps of a run, if they are known before it is done."""
    if config.budget.steps is not None:
        return config.budget.steps
    known = samples.get(_data_of(config))
    if known is None and config.task.name == "classification":
        known = training_size(config.data)
    elif known is None and config.task.name in ("segmentation", "detection"):
        known = canvas_size(config.task.options)
    return None if known is None else total_steps(config, known)


def _data_of(config: RunConfig) -> str:
    """What the training data depend on, but for the seed."""
    return repr((config.task, config.data))
