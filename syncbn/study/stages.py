"""The two stages of a study: the runs from which its settings choose, if it tunes, and its own runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from syncbn.study.plan.grid import Cell, Place, Study, study_cells
from syncbn.study.plan.tuning import choices_of, trial_cells
from syncbn.study.run.records import read_records
from syncbn.study.run.status import Outcome
from syncbn.train.result import RunResult

RunCells = Callable[[Sequence[Cell], Path], dict[str, Outcome]]
"""Does the cells that have no record yet, such as :func:`syncbn.study.run.runner.run_cells`."""


def stages(study: Study, results: Mapping[str, RunResult]) -> tuple[list[Cell], list[Cell]]:
    """The tuning's cells, and the study's with what these chose.

    A cell whose setting has not chosen has a key that no record has: what it will be is not known. ``results`` are by
    the cells' keys.
    """
    choices = {place: choice.chosen.candidate for place, choice in choices_of(study, results).items()}
    trials = trial_cells(study)
    open_places = {Place(cell.arm, cell.point) for cell in trials} - choices.keys()
    cells = [
        replace(cell, key=f"undecided-{cell.key}") if Place(cell.arm, cell.point) in open_places else cell
        for cell in study_cells(study, choices=choices)
    ]
    return trials, cells


def recorded_stages(study: Study, out: Path | None) -> tuple[list[Cell], list[Cell]]:
    """The same from the records in a study's folder."""
    records = read_records(out) if out is not None else {}
    return stages(study, {key: record.result for key, record in records.items()})


def run_stages(study: Study, out: Path, run: RunCells) -> tuple[list[Cell], dict[str, Outcome]]:
    """Run the tuning, then the settings that have chosen; returns the study's cells, and the outcomes of all runs."""
    trials = trial_cells(study)
    outcomes = run(trials, out) if trials else {}
    _, cells = recorded_stages(study, out)
    ready = [cell for cell in cells if not cell.key.startswith("undecided-")]
    return cells, outcomes | (run(ready, out) if ready else {})
