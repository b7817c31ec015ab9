"""The report of a study: one self-contained page, the numbers as CSV, the figures as files of their own."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from syncbn.study.analysis.comparisons import ALPHA, Comparisons, comparison_lines, comparisons_of
from syncbn.study.analysis.layout import fixed_words
from syncbn.study.analysis.summary import Summary, summary_of
from syncbn.study.plan.grid import Cell, Study
from syncbn.study.report.answer import answer
from syncbn.study.report.plots import arm_marks
from syncbn.study.report.results_csv import write_csv
from syncbn.study.report.sections import (
    cost_section,
    curve_section,
    estimation_section,
    layer_section,
    main_section,
    samples_section,
)
from syncbn.study.report.tables import axis_headings, means_tables, print_numbers, table_lines
from syncbn.study.report.words import axis_word, between, coordinate, joined, percent, place_words, plural, value_word
from syncbn.study.run.status import Outcome
from syncbn.train.result import RunResult, write_atomically

TEMPLATE = "report.html.j2"
OPEN_LINES = 12
"""Lines of the table of all numbers up to which it is open from the start."""


def write_report(
    study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], out: Path, *, command: str
) -> Path:
    """Write ``report.html``, ``results.csv`` and the figures to ``out``.

    The main figure is ``error_by_arm`` or, along a sweep, ``error_by_nbs`` (``.svg`` and ``.png``); ``estimation.svg``,
    ``samples.svg`` and ``layers.svg`` are written where there is something in them.

    Args:
        study, cells: as they were run.
        outcomes: of :func:`syncbn.study.run.runner.run_cells`; cells without a result are shown as missing.
        out: the study's folder; its ``parity.json`` is read if it is there.
        command: what made it, for the page.

    Returns:
        The path of the page. It is one file that needs no network.
    """
    results = _results(outcomes)
    summary = summary_of(study, cells, results)
    comparisons = comparisons_of(summary)
    marks = arm_marks(study)
    failed = {key for key, outcome in outcomes.items() if outcome.state == "failed"}
    write_csv(study, cells, results, out / "results.csv", failed=failed)
    lines = table_lines(summary)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = importlib.resources.files("syncbn.study.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        study=study,
        marks=marks,
        answer=answer(summary, comparisons),
        main=main_section(summary, marks, out),
        compared=_compared(study, comparisons),
        estimation=estimation_section(summary, out),
        samples=samples_section(summary, out),
        layers=layer_section(summary, out),
        curves=curve_section(summary, comparisons, marks),
        costs=cost_section(summary, comparisons, out),
        headings=axis_headings(summary),
        means=means_tables(summary),
        lines=lines,
        across=axis_word(summary.layout.across) if summary.layout.across is not None else "",
        lines_open=len(lines) <= OPEN_LINES,
        lines_title=plural(len(lines), "setting"),
        repeat=_parity_words(out / "parity.json"),
        failures=[(o.job.label, o.message) for o in outcomes.values() if o.state == "failed"],
        methods=_methods(comparisons),
        plan=_plan(summary, comparisons),
        versions=_versions(results),
        base=_yaml(study.base, block=True),
        overrides=[(arm.name, arm.label, _yaml(arm.overrides), _only(arm.only)) for arm in study.arms],
        command=command,
    )
    write_atomically(out / "report.html", "\n".join(line for line in page.splitlines() if line.strip()) + "\n")
    return out / "report.html"


def print_table(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> None:
    """The table of the page and its answer, on the terminal."""
    summary = summary_of(study, cells, _results(outcomes))
    print_numbers(summary, answer(summary, comparisons_of(summary)))


def _parity_words(path: Path) -> str:
    return " ".join(json.loads(path.read_text())["lines"]) if path.exists() else ""


def _results(outcomes: Mapping[str, Outcome]) -> dict[str, RunResult]:
    return {key: outcome.result for key, outcome in outcomes.items() if outcome.result is not None}


def _compared(study: Study, comparisons: Comparisons) -> dict[str, Any] | None:
    """The section of the planned comparisons; None where there are none."""
    reference = comparisons.reference
    if reference is None or not any(setting.runs for setting in comparisons.settings) or not comparisons.lines:
        return None
    error = reference.error
    words = f"{reference.label}: {percent(error.mean)}"
    interval = between(error.low, error.high, error.mean)
    lost = f", {reference.diverged} of {plural(reference.diverged + reference.finished, 'run')} diverged"
    lost = lost if reference.diverged else ""
    partly = " (over all its runs; beside a difference, means are over the runs of the same seeds)"
    return {
        "place": place_words((name, value) for name, value in comparisons.point if len(study.axes[name]) > 1),
        "reference": words
        + (f" (95 % interval {interval})" if interval else "")
        + lost
        + partly * any(line.partly for line in comparisons.lines),
        "lines": comparison_lines(comparisons),
    }


def _methods(comparisons: Comparisons) -> str:
    """How intervals and tests were made, with their sources."""
    words = (
        "An interval of a mean is Student's t interval over the seeds, at 95 %; runs that diverged have no part in it"
        " and are counted instead."
    )
    if not comparisons.lines:
        return words
    family = len(comparisons.lines)
    words += (
        " A difference is the mean of the differences of runs with the same seed, its interval Student's as well. Its p"
        " is that of Fisher's two-sided sign-flip test (The Design of Experiments, 1935): the share of all ways to give"
        " the differences their signs whose mean is at least as far from zero. Test and interval are different methods"
        " (sign flips of the mean difference against Student's t), so with an outlier the one may show a difference"
        " where the other contains 0. Nothing is claimed of an arm before all planned runs of it and of the reference"
        " have a result."
    )
    if family > 1:
        words += (
            f" The {family} comparisons are corrected together by Holm's procedure (1979, Scandinavian Journal of"
            f" Statistics 6), so that the chance of any false claim among them is at most {100 * ALPHA:g} %; intervals"
            " are of each difference alone."
        )
    return words + (
        f" With {plural(family, 'comparison')}, {comparisons.needed} seeds are needed before the smallest p there can"
        f" be reaches {ALPHA:g}. Where a run of an arm or of the reference diverged, nothing is compared: the mean of"
        " the runs that survive would favour the arm that loses its worst ones."
    )


def _plan(summary: Summary, comparisons: Comparisons) -> list[tuple[str, str]]:
    """The axes with their values, what is fixed along them, what is compared, the seeds."""
    study = summary.study
    lines = [
        (f"{axis_word(name)} ({name})", ", ".join(value_word(value) for value in values))
        for name, values in study.axes.items()
    ]
    if study.sweep is not None:
        lines.append((f"{study.sweep.kind} sweep", fixed_words(study)))
    if comparisons.reference is not None and comparisons.lines:
        labels = [s.label for s in comparisons.settings if any(s is line.setting for line in comparisons.lines)]
        lines.append(("compared", f"{joined(labels)}, each with {comparisons.reference.label}"))
    return [*lines, ("seeds", ", ".join(map(str, study.seeds)))]


def _only(only: Mapping[str, Sequence[Any]]) -> str:
    """Where an arm is run, if not everywhere."""
    places = [joined([coordinate(name, value) for value in values]) for name, values in only.items()]
    return f"run only at {', '.join(places)}" if places else ""


def _yaml(values: Mapping[str, Any], block: bool = False) -> str:
    style = None if block else True
    text: str = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=style, width=1000)
    return text.strip() if values else "nothing"


def _versions(results: Mapping[str, RunResult]) -> list[tuple[str, str]]:
    """What the runs ran on: each property once, with all the values that occur."""
    found: dict[str, dict[str, None]] = {}
    for result in results.values():
        for name, value in result.environment.items():
            found.setdefault(name, {})[str(value)] = None
    return [(name, ", ".join(values)) for name, values in found.items()]
