"""``syncbn study plan``: the grid, what of it is done, and what the rest will cost, from a few timed steps."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from syncbn.study.plan.grid import Cell, Study, study_cells, unique_cells
from syncbn.study.plan.study_file import load_study
from syncbn.study.run.progress import duration
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import left_over
from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.loop import train
from syncbn.train.state import steps_of

FIRST_STEPS = 3
"""Optimizer steps of the short one of two timed trainings (see :func:`timed`)."""
MORE_SECONDS = 1.5
"""About how much longer the other training takes."""
MOST_STEPS = 60
"""Largest number of its steps; the smallest is twice ``FIRST_STEPS``."""


def plan_study(config: str, out: Path | None = None, workers: int | None = None) -> int:
    """Print a study's grid, what is done of it in ``out``, and an estimate of what the rest takes.

    Args:
        config: a study's YAML file, or the name of one that comes with the package.
        out: the study's folder; None takes everything as still to be done.
        workers: runs side by side; None is one for each core.

    Returns:
        0.

    Raises:
        ConfigError: a mistake in the study, or in the number of workers.
    """
    if workers is not None and workers < 1:
        raise ConfigError("workers", workers, "a positive integer")
    study = load_study(config)
    cells = study_cells(study)
    runs = unique_cells(cells)
    records = read_records(out) if out is not None else {}
    missing = [cell for cell in runs if cell.key not in records]
    print(f"{study.title}\n")
    _print_grid(study, cells)
    repeat = study.repeat_distributed
    print(f"\n{len(cells)} cells, {len(runs)} different runs: {len(runs) - len(missing)} done, {len(missing)} to do")
    if repeat is not None:
        print(f"and one repeated under {repeat.processes} processes: {repeat.arm}, seed {repeat.seed}")
    if note := left_over(study, cells, records):
        print(note)
    if missing:
        side = workers or len(os.sched_getaffinity(0))
        seconds = estimate(missing, lambda cell, cost: print(f"  {cell.label}: about {duration(cost)}", flush=True))
        print(
            f"a rough estimate, from a few timed steps: about {duration(seconds)} of training by one process; "
            f"with {side} side by side at best {duration(seconds / min(side, len(missing)))}. "
            "Evaluations and loading come on top."
        )
    return 0


def estimate(cells: Sequence[Cell], say: Callable[[Cell, float], None] = lambda cell, cost: None) -> float:
    """Seconds that the cells' training takes in one process: one cell of each setting is timed for a few steps.

    Raises:
        ConfigError: a cell cannot be run here (its data, its network, its device).
    """
    if cells:
        _train(cells[0].config, FIRST_STEPS)  # what a process loads and allocates once, no run's cost
    known: dict[tuple[object, ...], float] = {}
    total = 0.0
    for cell in cells:
        setting = (cell.arm, cell.point)
        if setting not in known:
            known[setting] = timed(cell.config)
            say(cell, known[setting])
        total += known[setting]
    return total


def timed(config: RunConfig) -> float:
    """Seconds that a run's training would take here in one process, from a few of its steps: a rough estimate.

    What a second, longer training takes beyond a first one counts, so that the first steps, which allocate, do not.
    """
    first = _train(config, FIRST_STEPS)
    more = round(MORE_SECONDS * FIRST_STEPS / first) if first > 0 else MOST_STEPS
    steps = min(max(FIRST_STEPS + more, 2 * FIRST_STEPS), MOST_STEPS)
    whole = _train(config, steps)
    each = (whole - first) / (steps - FIRST_STEPS)
    # On a noisy machine the difference may come out as nothing; then all the time counts, as a bound from above.
    return (each if each > 0 else whole / steps) * steps_of(config)


def _train(config: RunConfig, steps: int) -> float:
    """Seconds of a training of some steps, without checkpoints and with the one evaluation that every run ends with."""
    few = replace(
        config,
        budget=replace(config.budget, epochs=None, steps=steps, checkpoint_every=0),
        evaluation=replace(config.evaluation, batch=False, population_samples=[]),
    )
    with tempfile.TemporaryDirectory() as folder:
        return train(few, Path(folder) / "run").seconds


def _print_grid(study: Study, cells: Sequence[Cell]) -> None:
    for name, values in study.axes.items():
        print(f"{name}: {', '.join(map(str, values))}")
    print(f"seeds: {', '.join(map(str, study.seeds))}")
    per_arm = Counter(cell.arm for cell in cells)
    keys = {arm.name: len({cell.key for cell in cells if cell.arm == arm.name}) for arm in study.arms}
    for arm in study.arms:
        sizes = sorted({c.config.normalization_batch_size or 0 for c in cells if c.arm == arm.name})
        batch = "no batch statistics" if sizes == [0] else f"normalization batch {', '.join(map(str, sizes))}"
        shared = f" for {per_arm[arm.name]} cells" if keys[arm.name] < per_arm[arm.name] else ""
        runs = f"{keys[arm.name]} runs{shared}"
        print(f"  {arm.label}{' (reference)' if arm.reference else ''}: {runs}, {batch}")
