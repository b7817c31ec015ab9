"""The page of an experiment: the claim, what came out, whether they agree, and the figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from syncbn.experiments.checks import Agreement, Measured, measure
from syncbn.experiments.drawing import label_log_scales
from syncbn.experiments.experiment import Experiment
from syncbn.experiments.runs import Runs
from syncbn.study.plan.grid import study_cells
from syncbn.study.report.figures import save
from syncbn.study.report.format import joined, plural
from syncbn.study.report.report import template, versions_of, write_page
from syncbn.study.report.tables import Table
from syncbn.train.result import RunResult, write_atomically
from syncbn.train.yaml_file import yaml_text

WORDS: dict[Agreement, str] = {"agrees": "agrees", "disagrees": "does not agree", "open": "not decided"}


_VERBS: dict[Agreement, tuple[str, str]] = {
    "agrees": ("agrees", "agree"),
    "disagrees": ("does not agree", "do not agree"),
    "open": ("is not decided", "are not decided"),
}


def write_experiment(experiment: Experiment, results: Mapping[str, RunResult], out: Path, *, command: str) -> Path:
    """Write ``experiment.html``, ``figure.svg`` and ``checks.csv`` to ``out``; returns the page.

    Runs that are missing are left out.
    """
    cells = study_cells(experiment.study)
    runs = Runs(experiment.study, cells, results)
    found = [measure(check, runs) for check in experiment.checks]
    done = sum(cell.key in results for cell in cells)
    page = template("experiment.html.j2", "syncbn.experiments").render(
        experiment=experiment,
        verdict=verdict(found),
        table=checks_table(found),
        figure=save(out / "figure.svg", _drawn, experiment, runs) if done else "",
        done=done,
        cells=len(cells),
        seeds=len(experiment.study.seeds),
        versions=versions_of(results),
        base=yaml_text(experiment.study.base),
        command=command,
    )
    write_atomically(out / "checks.csv", checks_csv(found))
    write_page(out / "experiment.html", page)
    return out / "experiment.html"


def checks_table(found: Sequence[Measured]) -> Table:
    """A row for each check."""
    rows = [[m.check.text, m.check.expected, m.words, str(m.seeds), WORDS[m.agreement]] for m in found]
    return Table(title="", head=["The claim says", "expected", "measured (95 % interval)", "seeds", "here"], rows=rows)


def checks_csv(found: Sequence[Measured]) -> str:
    """A line for each check; mean and interval have all their digits, and are empty without seeds."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("check", "expected", "mean", "low", "high", "seeds", "agrees"))
    for m in found:
        numbers = ("", "", "") if not m.seeds else (m.mean, m.low, m.high)
        rows.writerow((m.check.text, m.check.expected, *numbers, m.seeds, WORDS[m.agreement]))
    return text.getvalue()


def verdict(found: Sequence[Measured]) -> str:
    """How many checks agree, do not agree, or are not decided."""
    counts = [(sum(m.agreement == kind for m in found), *words) for kind, words in _VERBS.items()]
    parts = [f"{count} {one if count == 1 else several}" for count, one, several in counts if count]
    return f"Of {plural(len(found), 'check')}, {joined(parts)}."


def _drawn(experiment: Experiment, runs: Runs) -> Figure:
    figure = experiment.figure(runs)
    label_log_scales(figure)
    return figure
