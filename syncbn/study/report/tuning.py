"""What a study's settings chose in its tuning, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping

from syncbn.study.plan.grid import Place, Study
from syncbn.study.plan.tuning import Choice, choices_of, trial_cells
from syncbn.study.report.format import DASH, candidate_words, label_of, place_words
from syncbn.study.report.tables import Table
from syncbn.study.report.units import Units
from syncbn.train.result import RunResult


def choices_table(study: Study, results: Mapping[str, RunResult]) -> Table | None:
    """What each setting chose and what that cost; None without tuning. ``results`` by the cells' keys."""
    if study.tune is None:
        return None
    head = ["arm", "place", "chosen", "at the edge", "validation", "other candidates", "runs", "seconds"]
    table = Table(head=head)
    choices = choices_of(study, results)
    for place, choice in choices.items():
        runs = {cell.key: results[cell.key] for tried in choice.tried for cell in tried.cells}
        units = Units(next(iter(runs.values())).metric)
        row = [
            label_of(study, place.arm),
            place_words(study, place.point) or DASH,
            candidate_words(choice.chosen.candidate),
        ]
        row += [", ".join(choice.at_edge) or "no", units.value(choice.chosen.mean), _others(choice, units)]
        table.rows.append([*row, str(len(runs)), f"{sum(run.seconds for run in runs.values()):,.0f}"])
        table.arms.append(place.arm)
    waiting = dict.fromkeys(Place(cell.arm, cell.point) for cell in trial_cells(study))
    for place in [place for place in waiting if place not in choices]:
        table.rows.append([label_of(study, place.arm), place_words(study, place.point) or DASH, "not yet", *[DASH] * 5])
        table.arms.append(place.arm)
    return table


def _others(choice: Choice, units: Units) -> str:
    """The range of the other candidates' validation metric: "12.1 to 40.2, 1× diverged"."""
    means = [tried.mean for tried in choice.tried if tried is not choice.chosen]
    known = sorted(mean for mean in means if not math.isnan(mean))
    lost = len(means) - len(known)
    ends = list(dict.fromkeys(units.value(mean) for mean in (known[0], known[-1]))) if known else []
    words = [" to ".join(ends)] if ends else []
    return ", ".join([*words, *([f"{lost}× diverged"] if lost else [])]) or DASH
