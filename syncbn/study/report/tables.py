"""All numbers of a study as a table: on the page and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncbn.study.analysis.summary import Setting, Summary, by_badness
from syncbn.study.report.answer import Answer
from syncbn.study.report.figures import row_figures
from syncbn.study.report.words import DASH, SPACE, axis_word, between, percent, value_word

EVERYWHERE = "all"
"""The value of an axis that an arm is not touched by."""


@dataclass(frozen=True, kw_only=True)
class TableLine:
    """One setting, as the table shows it."""

    arm: str
    label: str
    reference: bool
    places: list[str]
    """Its value on each axis."""
    normalization_batch_size: str
    error: str
    """Mean and spread, and what became of the runs that are no part of it."""
    interval: str
    seeds: list[str]
    """One text a seed, in percent without the sign."""
    images_per_second: str


def axis_headings(summary: Summary) -> list[str]:
    """The columns of the axes."""
    return [axis_word(name) for name in summary.layout.names]


def table_lines(summary: Summary) -> list[TableLine]:
    """The settings in words: arm by arm along the axes; without axes, the worst first and the reference last.

    What is run once for a whole sweep has one line.
    """
    settings = list(summary.settings.values())
    if not summary.layout.names:
        return [_line(setting, []) for setting in by_badness(settings)]
    lines = []
    for setting in settings:
        panel = summary.layout.panel_of(setting.point)
        same = summary.constant(setting.arm, panel)
        if same and setting is not summary.across(setting.arm, panel)[0][1]:
            continue
        across = summary.layout.across if same else None
        lines.append(_line(setting, [EVERYWHERE if name == across else value_word(v) for name, v in setting.point]))
    return lines


@dataclass(frozen=True, kw_only=True)
class MeansRow:
    """An arm of a table of means."""

    arm: str
    label: str
    cells: list[str]
    """Mean error in percent, without the sign; how many runs diverged."""
    lowest: list[bool]
    """Whether the mean is the column's lowest."""


@dataclass(frozen=True, kw_only=True)
class MeansTable:
    """Mean errors of a panel: arms by what goes across."""

    title: str
    columns: list[str]
    rows: list[MeansRow]


def means_tables(summary: Summary) -> list[MeansTable]:
    """Mean errors at a glance, a table a panel; none where nothing goes across."""
    layout = summary.layout
    if layout.across is None:
        return []
    found = []
    for panel in layout.panels:
        every = [(arm, dict(summary.across(arm.name, panel))) for arm in summary.study.arms]
        lines = [(arm, line) for arm, line in every if any(setting.runs for setting in line.values())]
        lowest = [
            min((line[i].error.mean for _, line in lines if i in line and line[i].finished), default=math.nan)
            for i in range(len(layout.values))
        ]
        rows = [
            MeansRow(
                arm=arm.name,
                label=arm.label,
                cells=[_mean_cell(line.get(i)) for i in range(len(lowest))],
                lowest=[i in line and line[i].error.mean == low for i, low in enumerate(lowest)],
            )
            for arm, line in lines
        ]
        if rows:
            columns = [value_word(value) for value in layout.values]
            found.append(MeansTable(title=layout.title(panel), columns=columns, rows=rows))
    return found


def _mean_cell(setting: Setting | None) -> str:
    if setting is None or not setting.runs:
        return DASH
    words = percent(setting.error.mean).partition(SPACE)[0] if setting.finished else ""
    return words + (f"{' ' if words else ''}{setting.diverged}×" if setting.diverged else "")


def print_numbers(summary: Summary, answer: Answer) -> None:
    """The table of the page and its answer, on the terminal."""
    console = Console(width=None if Console().is_terminal else 120)
    for means in means_tables(summary):
        print_means(console, summary, means)
    if summary.layout.across is None:
        print_settings(console, summary)
    for words in (answer.headline, answer.support, answer.caveat):
        if words:
            console.print(Text(words))


def print_means(console: Console, summary: Summary, means: MeansTable) -> None:
    """Mean errors along the sweep."""
    title = f"{summary.study.title}: test error in %" + (f", {means.title}" if means.title else "")
    table = Table(title=Text(title), caption="k×: k runs diverged")
    table.add_column(Text(axis_word(summary.layout.across or "")))
    for heading in means.columns:
        table.add_column(Text(heading), justify="right")
    for row in means.rows:
        table.add_row(Text(row.label), *(Text(cell) for cell in row.cells))
    console.print(table)


def print_settings(console: Console, summary: Summary) -> None:
    """Each setting with its spread."""
    table = Table(title=Text(summary.study.title))
    headings = ["arm", *axis_headings(summary), "norm. batch", "test error", "95 % interval", "images/s"]
    for heading in headings:
        table.add_column(Text(heading), justify="left" if heading == "arm" else "right")
    for line in table_lines(summary):
        label = f"{line.label} (reference)" if line.reference else line.label
        words = [label, *line.places, line.normalization_batch_size, line.error, line.interval, line.images_per_second]
        table.add_row(*(Text(word) for word in words))  # not markup: a label may hold brackets
    console.print(table)


def _line(setting: Setting, places: Sequence[str]) -> TableLine:
    size, speed = setting.normalization_batch_size, setting.mean_of(lambda run: run.images_per_second)
    return TableLine(
        arm=setting.arm,
        label=setting.label,
        reference=setting.reference,
        places=list(places),
        normalization_batch_size=DASH if size is None else str(size),
        error=row_figures(setting),
        interval=between(setting.error.low, setting.error.high, setting.error.mean) or DASH,
        seeds=[_seed(setting, i) for i in range(len(setting.results))],
        images_per_second=DASH if speed != speed else f"{speed:,.0f}",
    )


def _seed(setting: Setting, index: int) -> str:
    result = setting.results[index]
    if result is None:
        return DASH
    return (
        "diverged"
        if result.status == "diverged" or result.test_error is None
        else percent(setting.errors[index]).partition(SPACE)[0]
    )
