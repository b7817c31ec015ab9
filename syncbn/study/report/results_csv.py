"""The numbers of a study as a CSV file."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from syncbn.study.analysis.evaluations import columns_of, evaluated
from syncbn.study.plan.grid import Cell, Study
from syncbn.study.report.words import value_word

if TYPE_CHECKING:
    from syncbn.train.result import RunResult

_FIGURES = (
    "test_error",
    "test_loss",
    "steps",
    "samples",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
    "parameters",
    "processes",
)


def write_csv(
    study: Study,
    cells: Sequence[Cell],
    results: Mapping[str, RunResult],
    path: Path,
    *,
    failed: Collection[str] = (),
) -> None:
    """One line a cell, also for those without a result: place, status, figures, and the error of each evaluation.

    Errors are fractions; a figure that a run does not have is empty. ``failed`` are keys whose run broke off: their
    status is ``failed`` and not ``missing``. Cells of one key are one run, whose figures stand in each of their lines.
    """
    columns = columns_of(list(results.values()))
    labels = {arm.name: arm.label for arm in study.arms}
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # two study runs may end at once
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["arm", "label", *study.axes, "seed", "normalization_batch_size", "key", "status"]
        writer.writerow([*head, *_FIGURES, *(name for name, _ in columns)])
        for cell in cells:
            result = results.get(cell.key)
            place = [cell.arm, labels[cell.arm], *(value_word(value) for _, value in cell.point), cell.seed]
            status = ("failed" if cell.key in failed else "missing") if result is None else result.status
            figures = [getattr(result, name, None) for name in _FIGURES]
            found = [[evaluated(result, kind) for kind in kinds] for _, kinds in columns]
            errors = [next((error for error in tried if not math.isnan(error)), "") for tried in found]
            values = [*figures, *errors]
            writer.writerow([*place, cell.config.normalization_batch_size, cell.key, status, *values])
    draft.replace(path)
