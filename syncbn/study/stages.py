"""The stages of a study: the runs from which its settings choose, if it tunes, rung by rung, and then its own runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from syncbn.study.plan.folder import save_study
from syncbn.study.plan.grid import Cell, Place, Study, study_cells, unique_cells
from syncbn.study.plan.tuning import UNDECIDED, tunings_of
from syncbn.study.run.jobs import study_jobs
from syncbn.study.run.logs import failure
from syncbn.study.run.records import read_records
from syncbn.study.run.status import Outcome
from syncbn.train.result import RunResult

RunCells = Callable[[Sequence[Cell], Path], dict[str, Outcome]]
"""Does the cells that have no record yet, such as :func:`syncbn.study.run.runner.run_cells`."""


def stages(study: Study, results: Mapping[str, RunResult]) -> tuple[list[Cell], list[Cell]]:
    """The tuning's cells, and the study's with what these chose.

    What a cell of a later rung will be, or one whose setting has not chosen, is not known: it has a key that no record
    has. ``results`` are by the cells' keys.
    """
    tunings = tunings_of(study, results)
    trials = [cell for tuning in tunings.values() for cell in (*tuning.cells, *tuning.undecided)]
    choices = {place: tuning.choice.chosen.candidate for place, tuning in tunings.items() if tuning.choice is not None}
    open_places = tunings.keys() - choices.keys()
    cells = [
        replace(cell, key=UNDECIDED + cell.key) if Place(cell.arm, cell.point) in open_places else cell
        for cell in study_cells(study, choices=choices)
    ]
    return trials, cells


def recorded_stages(study: Study, out: Path | None) -> tuple[list[Cell], list[Cell]]:
    """The same from the records in a study's folder."""
    records = read_records(out) if out is not None else {}
    return stages(study, {key: record.result for key, record in records.items()})


def run_stages(study: Study, out: Path, run: RunCells) -> tuple[list[Cell], dict[str, Outcome]]:
    """Run the tuning, then the settings that have chosen; returns the study's cells, and the outcomes of all runs.

    The rungs of the tuning follow one another. A run that failed leaves its setting without a choice; the others go on.
    What failed before is tried again when nothing else is left: under a launcher, a failure ends all processes. If runs
    were left because the first ones failed alike, nothing more is run.
    """
    save_study(study, out)
    trials, cells = recorded_stages(study, out)
    failed = {job.key for job in study_jobs(_known([*trials, *cells]), out) if failure(job.log) is not None}
    outcomes: dict[str, Outcome] = {}
    for later in (failed, set[str]()):
        while ready := _left(trials, outcomes, later):
            outcomes |= run(ready, out)
            trials, cells = recorded_stages(study, out)
            if any(outcome.state == "missing" for outcome in outcomes.values()):
                return cells, outcomes
        if ready := _left(cells, outcomes, later):
            outcomes |= run(ready, out)
            if any(outcome.state == "missing" for outcome in outcomes.values()):
                break
    return cells, outcomes


def left_words(study: Study, outcomes: Mapping[str, Outcome], out: Path) -> str:
    """How many runs are left, where the first ones failed alike and nothing more was run."""
    tried = {key for key, outcome in outcomes.items() if outcome.state != "missing"}
    trials, cells = recorded_stages(study, out)
    left = sum(cell.key not in tried for cell in unique_cells([*trials, *cells]))
    return f"the first runs failed alike and none is done, so the other {left} were not done"


def _known(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of which it is known what they are."""
    return [cell for cell in cells if not cell.key.startswith(UNDECIDED)]


def _left(cells: Sequence[Cell], outcomes: Mapping[str, Outcome], later: Collection[str]) -> list[Cell]:
    return [cell for cell in _known(cells) if cell.key not in outcomes and cell.key not in later]
