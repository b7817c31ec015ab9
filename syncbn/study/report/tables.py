"""The tables of a report, for the page and the terminal, and the CSV file of all runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from syncbn.study.analysis.evaluations import Kind, columns_of, evaluated, evaluated_settings
from syncbn.study.analysis.findings import Finding, findings_of
from syncbn.study.analysis.summary import Setting, Summary, by_badness, layer_means, score_of, summary_of
from syncbn.study.plan.grid import Cell, Study
from syncbn.study.report.format import (
    DASH,
    axis_word,
    candidate_words,
    capital,
    chosen_words,
    compact,
    contrast_place,
    contrast_words,
    p_value,
    panel_title,
    plural,
    same_runs,
    value_word,
)
from syncbn.study.report.units import Units
from syncbn.study.report.verdict import verdict
from syncbn.train.result import RunResult

TERMINAL_WIDTH = 80
SAME = "="
"""Stands before a mean of the same runs as all others in its row: the arm does not depend on what goes across."""
MAX_LAYERS = 24
"""Layers that a heat map shows; of more, evenly spaced ones with the first and the last."""
LEVELS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Divergences at which the colour of a heat map changes, the same on every page."""
_FIGURES = (
    *("steps", "samples", "seconds", "samples_per_second", "peak_memory_bytes", "parameters"),
    *("train_samples", "test_samples", "processes"),
)
"""Fields of a result in the CSV file, after its scores."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts. The first column holds names."""

    title: str = ""
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    """The arm of each row, whose mark stands before its name; empty without marks."""

    @property
    def has_gaps(self) -> bool:
        """Whether a number is not there somewhere, for which a note has to say why."""
        return any(cell == DASH for row in self.rows for cell in row)


class HeatCell(NamedTuple):
    """A number of a heat map; ``level`` is its place on the scale of colours, None without a number."""

    text: str
    level: int | None


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Divergence of batch statistics from the population's: layers by places of one arm, or by arms."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[HeatCell]]]

    @property
    def has_gaps(self) -> bool:
        return any(cell.text == DASH for _, row in self.rows for cell in row)


def contrasts_table(summary: Summary, findings: Sequence[Finding]) -> Table:
    """The planned contrasts, with differences in points or in the metric's own unit; effects come before p values.

    If the study tunes, the last two columns are what either side chose: its options are part of the difference.
    """
    study, units = summary.study, Units(summary.metric)
    places = [contrast_place(study, f.contrast) for f in findings]
    head = ["contrast", "verdict", "difference", "95 % interval", "p", "sign-flip p", "smallest effect"]
    head += ["test set error"] * summary.metric.of_samples
    head += ["chosen", "chosen against"] if study.tune is not None else []
    table = Table(title=places[0] if len(set(places)) == 1 else "", head=head)
    for place, f in zip(places, findings, strict=True):
        words = contrast_words(study, f.contrast)
        table.rows.append(
            [
                words if table.title or not place else f"{words}, {place}",
                f.verdict or _why_not(summary, f),
                units.difference(f.difference, signed=True),
                units.difference_interval(f.low, f.high, f.difference),
                p_value(f.p_no_worse if f.verdict == "no worse" else f.p),
                p_value(f.p_sign_flip),
                units.difference(f.smallest_effect),
                *[units.difference(f.test_set_error)] * summary.metric.of_samples,
                *(chosen_words(summary, f.contrast) if study.tune is not None else ()),
            ]
        )
    return table


def means_tables(summary: Summary) -> list[Table]:
    """Mean scores of the arms along the sweep, a table a panel; none where nothing goes across."""
    found: list[Table] = []
    if summary.across is None:
        return found
    for panel in summary.panels:
        head = [axis_word(summary.study, summary.across), *map(value_word, summary.values)]
        table = Table(title=panel_title(summary, panel), head=head)
        for arm in summary.study.arms:
            along = summary.along(arm.name, panel)
            if any(setting.runs or setting.failed for setting in along.values()):
                cells = [_mean_cell(along.get(i), summary) for i in range(len(summary.values))]
                if same_runs(along):
                    cells = [SAME + cell if i in along else cell for i, cell in enumerate(cells)]
                table.rows.append([arm.label, *cells])
                table.arms.append(arm.name)
        found += [table] if table.rows else []
    return found


def settings_table(summary: Summary) -> Table:
    """Every setting with mean, interval and each seed's score; a level arm's once."""
    units = Units(summary.metric)
    axes = [axis_word(summary.study, name) for name in summary.study.axes]
    head = ["arm", *axes, "norm. batch", "mean", "95 % interval", "SD", *(f"seed {s}" for s in summary.study.seeds)]
    table = Table(head=head)
    settings = list(summary.settings.values())
    same_runs_of: dict[tuple[str, tuple[str, ...]], list[Setting]] = {}
    for setting in settings if axes else by_badness(settings, summary.metric):
        same_runs_of.setdefault((setting.arm, setting.keys), []).append(setting)
    for setting, *others in same_runs_of.values():
        shared = [pair for pair in setting.point if all(pair in other.point for other in others)]
        places = [value_word(value) if (name, value) in shared else "all" for name, value in setting.point]
        size, score = setting.normalization_batch_size, setting.score
        mean = [_mean_cell(setting, summary), units.interval(score.low, score.high), units.spread(score.sd)]
        seeds = [_seed_cell(run, units) for run in setting.results]
        name = f"{setting.label} (reference)" if setting.reference else setting.label
        table.rows.append([name, *places, DASH if size is None else str(size), *mean, *seeds])
        table.arms.append(setting.arm)
    return table


def statistics_table(summary: Summary) -> Table | None:
    """Scores of the same weights with each kind of statistics, at one place; None without other kinds."""
    study, units = summary.study, Units(summary.metric)
    point = study.comparison_point()
    items = [item for (_, place), item in evaluated_settings(summary).items() if place == point]
    columns = columns_of([run for item in items for run in item.setting.runs])
    if not items:
        return None
    table = Table(head=["arm", *(_kind_word(name, kinds[0], study) for name, kinds in columns)])
    for item in items:
        known = [[item.scores[kind].mean for kind in kinds if kind in item.scores] for _, kinds in columns]
        table.rows.append([item.setting.label, *(units.value(means[0]) if means else DASH for means in known)])
        table.arms.append(item.setting.arm)
    return table


def cost_table(summary: Summary) -> Table:
    """What a run of each arm was and took: medians over the seeds, at one place; without columns that no run has."""
    seen = summary.study.samples_word
    figures = {
        "parameters": "parameters",
        "samples": f"{seen} seen",
        "steps": "steps",
        "seconds": "seconds",
        "samples_per_second": f"{seen}/s",
        "peak_memory_bytes": "memory, MiB",
    }
    settings = [setting for setting in summary.at(summary.study.comparison_point()) if setting.runs]
    table = Table(head=["arm"], rows=[[s.label] for s in settings], arms=[s.arm for s in settings])
    for name, heading in figures.items():
        # A user's training loop has few of them, and 0 steps if it reports none.
        known = [[value for run in s.runs if (value := getattr(run, name))] for s in settings]
        if any(known):
            table.head.append(heading)
            unit = 2**20 if name == "peak_memory_bytes" else 1
            for row, values in zip(table.rows, known, strict=True):
                row.append(_amount(median(values) / unit) if values else DASH)
    return table


def heat_maps(summary: Summary) -> list[HeatMap]:
    """The layers' divergence: a map an arm along the sweep, the reference's first; or one map with a column an arm."""
    found = []
    for title, columns in _layer_columns(summary):
        means = [layer_means(setting) for _, setting in columns]
        rows = []
        for layer in _layers(means):
            # Rounded as it is printed, so that colour and number agree.
            values = [round(column[layer].kl, 3) if layer in column else math.nan for column in means]
            rows.append((layer, [HeatCell(compact(value), heat_level(value)) for value in values]))
        found.append(HeatMap(title=title, columns=[heading for heading, _ in columns], rows=rows))
    return found


def effective_table(summary: Summary) -> Table | None:
    """How many independent values a batch is worth in each layer, for the arms of the first heat map."""
    for title, columns in _layer_columns(summary)[:1]:
        means = [layer_means(setting) for _, setting in columns]
        table = Table(title=title, head=["layer", *(heading for heading, _ in columns)])
        for layer in _layers(means):
            known = [column.get(layer) for column in means]
            worth = [f"{compact(mean.effective)} of {compact(mean.count)}" if mean else DASH for mean in known]
            table.rows.append([layer, *worth])
        return table
    return None


def heat_level(value: float) -> int | None:
    """The place of a divergence on the scale of colours."""
    return None if math.isnan(value) else sum(value >= level for level in LEVELS)


def print_table(
    study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult], failed: Collection[str] = ()
) -> None:
    """Print the verdict, the planned contrasts and the mean scores, 80 columns wide unless the terminal is wider."""
    summary = summary_of(study, cells, results, failed)
    units, findings = Units(summary.metric), findings_of(summary)
    out = console()
    out.print(Text(study.title, style="bold"))
    out.print(Text(verdict(summary, findings)))
    contrasts = contrasts_table(summary, findings)
    if contrasts.rows:
        rows = [_with_choices(row, study)[:5] for row in contrasts.rows]
        title = f"Planned contrasts, {units.differences}" + (f", at {contrasts.title}" if contrasts.title else "")
        print_rich(out, Table(title=title, head=contrasts.head[:5], rows=rows))
    for means in means_tables(summary):
        title = f"Mean {units.heading}" + (f", {means.title}" if means.title else "")
        rows = [[row[0], *(cell.replace(" ", "\n") for cell in row[1:])] for row in means.rows]
        print_rich(out, Table(title=title, head=means.head, rows=rows))
    if summary.across is None:
        settings = settings_table(summary)
        last = settings.head.index("SD")
        rows = [row[:last] for row in settings.rows]
        print_rich(out, Table(title=capital(units.heading), head=settings.head[:last], rows=rows))
    out.print(Text(f"k×: k runs diverged, {SAME}: the same runs in the whole row, {DASH}: not run"))


def runs_csv(
    study: Study,
    cells: Sequence[Cell],
    results: Mapping[str, RunResult],
    *,
    failed: Collection[str] = (),
    running: Collection[str] = (),
) -> str:
    """One line a run: place, state, scores, figures, and the metric in each evaluation, as the task gives them.

    A run that stands at several places of its arm (it does not depend on an axis) has one line, ``level`` is ``yes``,
    and the axes on which its places differ are empty. A figure that a run does not have is empty. ``tuned`` is what a
    run's setting chose, if the study tunes.
    ``results`` are by the cells' keys; ``failed`` and ``running`` are keys whose run failed or is going on.
    """
    summary = summary_of(study, cells, results)
    metric, columns = summary.metric.name, columns_of(list(results.values()))
    scores, figures = _score_columns(study, metric, list(results.values())), _figure_columns(study)
    labels = {arm.name: arm.label for arm in study.arms}
    places: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.arm, cell.key), []).append(cell)
    text = io.StringIO()
    writer = csv.writer(text)
    axes = [*study.axes, *(["tuned"] if study.tune else [])]
    head = ["arm", "label", *axes, "level", "seed", "normalization_batch_size", "key", "status"]
    writer.writerow([*head, *scores, *figures, *(f"{metric}_{name}" for name, _ in columns)])
    for (arm, key), same in places.items():
        cell, result = same[0], results.get(key)
        points_of = [dict(each.point) for each in same]
        at = ["" if len({p[axis] for p in points_of}) > 1 else value_word(points_of[0][axis]) for axis in study.axes]
        state = "failed" if key in failed else "running" if key in running else "missing"
        if result is not None:
            state = "diverged" if result.status == "diverged" else "done"
        tried = [[evaluated(result, kind) for kind in kinds] for _, kinds in columns]
        found = [(getattr(result, part, None) or {}).get(name) for part, name in scores.values()]
        found += [next((score for score in each if not math.isnan(score)), None) for each in tried]
        found[len(scores) : len(scores)] = [getattr(result, name, None) for name in figures.values()]
        at += [candidate_words(cell.candidate)] if study.tune else []
        place = [arm, labels[arm], *at, "yes" if len(same) > 1 else "no", cell.seed]
        writer.writerow([*place, cell.config.normalization_batch_size, key, state, *found])
    return text.getvalue()


def _score_columns(study: Study, metric: str, results: Sequence[RunResult]) -> dict[str, tuple[str, str]]:
    """The columns of scores: for each the part of the data and the name, the task's metric and the loss first."""
    known = [name for result in results for name, value in (result.test or {}).items() if value is not None]
    names = dict.fromkeys([metric, *(["loss"] if "loss" in known or study.run is None else []), *known])
    validated = any(result.validation for result in results)
    pairs = [*(("test", name) for name in names), *[("validation", metric)] * validated]
    return {f"{part}_{name}": (part, name) for part, name in pairs}


def _figure_columns(study: Study) -> dict[str, str]:
    """The columns of further figures, and which field of a result each holds; "samples" are those seen in training."""
    words = study.samples_word
    return {name if name == "samples" else name.replace("samples", words): name for name in _FIGURES}


def console() -> Console:
    """Where tables are printed: 80 columns wide unless the terminal is wider."""
    found = Console()
    return found if found.is_terminal else Console(width=TERMINAL_WIDTH)


def print_rich(out: Console, table: Table) -> None:
    """Print a table."""
    shown = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(table.head):
        side: Literal["left", "right"] = "left" if number == 0 or heading == "verdict" else "right"
        shown.add_column(Text(heading), justify=side, overflow="fold", min_width=4 if number else 18)
    for row in table.rows:
        shown.add_row(*map(Text, row))  # Text, not markup: a label may hold brackets
    out.print(shown)


def _with_choices(row: list[str], study: Study) -> list[str]:
    """A contrast with what its sides chose below its name: a terminal has no room for more columns."""
    return row if study.tune is None else [f"{row[0]}\n({row[-2]} against {row[-1]})", *row[1:]]


def _why_not(summary: Summary, finding: Finding) -> str:
    """Why a contrast has no verdict."""
    settings = [summary.settings[place.arm, place.point] for place in finding.contrast.places]
    failed = len({key for setting in settings for key in setting.failed})
    if any(setting.failed_trials for setting in settings):
        return "tuning failed"
    return f"{plural(failed, 'run')} failed" if failed else f"{plural(finding.missing, 'run')} missing"


def _mean_cell(setting: Setting | None, summary: Summary) -> str:
    if setting is not None and not setting.runs and setting.failed:
        return f"{len(setting.failed)} failed"
    if setting is None or not setting.runs:
        return DASH
    words = [Units(summary.metric).value(setting.score.mean)] if setting.finished else []
    return " ".join([*words, *[f"{setting.diverged}×"] * (setting.diverged > 0)])


def _amount(value: float) -> str:
    return f"{value:,.{int(value < 10)}f}"


def _seed_cell(run: RunResult | None, units: Units) -> str:
    if run is None:
        return DASH
    score = score_of(run)
    return "diverged" if math.isnan(score) else units.value(score)


def _kind_word(name: str, kind: Kind, study: Study) -> str:
    if kind.statistics != "population":
        return {"running": "running", "batch": "test batch"}.get(kind.statistics, kind.statistics)
    size = name.partition(f"_{kind.estimator}_")[2].replace("_", " ")
    return f"population, {size} {study.samples_word}, {kind.estimator}"


def _layer_columns(summary: Summary) -> list[tuple[str, list[tuple[str, Setting]]]]:
    """A title for each heat map, and its settings with their headings."""
    point = summary.study.comparison_point()
    if summary.across is None:
        here = [(setting.label, setting) for setting in summary.at(point) if layer_means(setting)]
        return [("", here)] if here else []
    found = []
    for arm in sorted(summary.study.arms, key=lambda arm: not arm.reference):
        settings = summary.along(arm.name, summary.panel_of(point))
        along = [(value_word(summary.values[i]), setting) for i, setting in settings.items() if layer_means(setting)]
        found += [(arm.label, along)] if along else []
    return found


def _layers(columns: Sequence[Mapping[str, object]]) -> list[str]:
    layers = list(dict.fromkeys(layer for column in columns for layer in column))
    if len(layers) <= MAX_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]
