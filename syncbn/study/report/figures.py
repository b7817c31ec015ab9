"""The figures of a report, drawn by matplotlib.

A figure is one column of a page: 440 units wide with text of 10 or 11 units. The page keeps it wide enough to be read:
on a telephone it scrolls in its box.
Place, marker and legend carry the meaning; colour helps.
"""

from __future__ import annotations

import colorsys
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Transform

from syncbn.study.analysis.evaluations import FAMILIES, Evaluated
from syncbn.study.analysis.findings import Finding
from syncbn.study.analysis.summary import Setting, Summary, by_badness
from syncbn.study.plan.grid import Point, Study
from syncbn.study.report.format import MINUS, axis_word, panel_title, same_runs, value_word
from syncbn.study.report.units import Units
from syncbn.train.result import Metric

WIDTH = 440
"""Width of a figure in units of 1/72 inch."""
SEED_SHIFT = 0.09
"""Distance of the seeds' points from the mean's mark, in the distance of two values of the axis."""
MAX_PANELS = 12
"""Panels of one figure at most."""
INK, MUTED, GRID = "#1c1e21", "#5f6770", "#d9dce0"
_COLOURS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933", "#332288", "#44aa99"),
    *("#a0522d", "#7a7a7a", "#ee3377", "#117733", "#6a51a3", "#b8860b"),
)
"""Okabe and Ito's colours without yellow and black, then darker ones of Tol's. Beyond these, a colour wheel."""
_GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "<": "◀", ">": "▶"}
_STYLE: Any = {
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a user's label is a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
}


class Mark(NamedTuple):
    """How an arm is drawn in every figure and table."""

    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        """The marker as a character, for tables."""
        return _GLYPHS[self.marker]


FAMILY_MARKS = dict(zip(FAMILIES, map(Mark, (INK, *_COLOURS[:3]), "os^D"), strict=True))
"""How each kind of statistics is drawn."""
_VERDICT_COLOURS = {"better": _COLOURS[2], "no worse": _COLOURS[2], "worse": _COLOURS[0]}


def arm_marks(study: Study) -> dict[str, Mark]:
    """A mark for each arm; no two share a colour. The reference is black."""
    others = [arm.name for arm in study.arms if not arm.reference]
    wheel = [to_hex(colorsys.hsv_to_rgb(i / max(1, len(others)), 0.9, 0.65)) for i in range(len(others))]
    colours = list(_COLOURS) if len(others) <= len(_COLOURS) else wheel
    markers = list(_GLYPHS)
    marks = {name: Mark(colours[i], markers[(i + 1) % len(markers)]) for i, name in enumerate(others)}
    return marks | {arm.name: Mark(INK, "o") for arm in study.arms if arm.reference}


def save(path: Path, draw: Callable[..., Figure], *what: Any) -> str:
    """Draw a figure and write it to ``path``, whole or not at all; returns the element for a page if it is SVG."""
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    svg = path.suffix == ".svg"
    # Of the ids that an SVG refers to: no two figures of a page share one, and a figure drawn again has the same.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": path.stem}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if svg else None
        draw(*what).savefig(draft, dpi=160, metadata=metadata)
    draft.replace(path)
    text = path.read_text(encoding="utf-8") if svg else ""
    return text[text.index("<svg") :] if svg else ""


def main_figure(summary: Summary, marks: Mapping[str, Mark]) -> Figure:
    """Test scores along the sweep, or of each arm where nothing goes across; a panel for each further place."""
    settings = [setting for setting in summary.settings.values() if setting.runs]
    panels = [panel for panel in summary.panels if any(summary.panel_of(s.point) == panel for s in settings)]
    rows = 0.55 * max(len(summary.study.arms), 3) + 0.4
    figure, every = new_figure(len(panels), 1, 3.9 if summary.across is not None else rows)
    for axes, panel in zip(every, panels, strict=True):
        if summary.across is None:
            _arm_rows(axes, by_badness([s for s in summary.at(panel) if s.runs], summary.metric), marks)
        else:
            _sweep(axes, summary, panel, marks)
        scores = [score for s in settings for score in s.scores]
        score_axis(axes, scores, "x" if summary.across is None else "y", summary.metric)
        axes.set_title(panel_title(summary, panel))
    if summary.across is not None:
        add_legend(figure, {s.arm: s.label for s in settings}, marks)
    return figure


def main_figure_name(summary: Summary) -> str:
    """Name of the main figure's files, by the metric and by what its horizontal axis is."""
    sweep, across = summary.study.sweep, summary.across
    by = "arm" if across is None else across.rpartition(".")[2]
    metric = re.sub(r"\W", "_", summary.metric.name)  # a name such as "mAP@0.5" or "bits/pixel" is a user's
    return f"{metric}_by_nbs" if sweep is not None and across == sweep.vary else f"{metric}_by_{by}"


def forest_figure(findings: Sequence[Finding], labels: Sequence[str]) -> Figure:
    """The planned contrasts: each difference with its interval, and one small point for each seed."""
    names = [textwrap.fill(label, 27) for label in labels]
    height = sum(0.2 * name.count("\n") + 0.42 for name in names) + 0.6
    figure, (axes,) = new_figure(1, 1, height)
    axes.axvline(0, color=MUTED, linewidth=1)
    metric = findings[0].metric
    unit = 100 if metric.percent else 1
    for row, finding in enumerate(findings):
        colour = _VERDICT_COLOURS.get(finding.verdict or "", MUTED)
        seeds = [unit * (first - second) for _, first, second in finding.pairs]
        axes.plot(seeds, [row + 0.22] * len(seeds), "o", color=colour, markersize=3, alpha=0.6)
        if not math.isnan(finding.low):
            axes.plot([unit * finding.low, unit * finding.high], [row, row], color=colour, linewidth=2)
        axes.plot(unit * finding.difference, row, "s", color=colour, markersize=7)
        if finding.margin is not None:
            axes.plot(metric.sign * unit * finding.margin, row, "|", color=INK, markersize=14)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    words, points = Units(metric), ", points" if metric.percent else ""
    axes.set_xlabel(f"difference in {words.name}{points} ({words.better}: the first is better)", loc="right")
    sizes = [abs(100 * finding.difference) for finding in findings]
    if metric.percent and max(sizes) > 20 and min(sizes) < 2:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_locator(FixedLocator([-30, -5, -1, 0, 1, 5, 30]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
    return figure


def statistics_figure(summary: Summary, items: Sequence[Evaluated]) -> Figure:
    """Test scores of the same weights with each kind of statistics: a panel an arm along the sweep, or a row an arm."""
    scores = [item.scores[kind].mean for item in items for f in FAMILIES if (kind := item.largest(f)) is not None]
    if summary.across is None:
        figure, (axes,) = new_figure(1, 1, 0.5 * len(items) + 0.6)
        _statistics_rows(axes, items)
        score_axis(axes, scores, "x", summary.metric)
    else:
        shown = [list(series) for _, series in groupby(items, key=lambda item: item.setting.arm)][:MAX_PANELS]
        figure, every = new_figure(len(shown), 2, 1.9)
        for axes, series in zip(every, shown, strict=True):
            _statistics_panel(axes, summary, series)
            score_axis(axes, scores, "y", summary.metric)
            axes.set_title(textwrap.shorten(series[0].setting.label, 27, placeholder="…"), fontsize=10)
            axes.set_ylabel("")
    used = [family for family in FAMILIES if any(item.largest(family) for item in items)]
    add_legend(figure, {family: FAMILIES[family] for family in used}, FAMILY_MARKS)
    return figure


def score_axis(axes: Axes, scores: Sequence[float], which: Literal["x", "y"], metric: Metric) -> None:
    """Scale, limits and ticks of an axis of scores.

    It is logarithmic if lower scores are better and they span more than a factor of 4: what is close to 0, the best
    there is, is then still told apart.
    """
    found = [score for score in scores if math.isfinite(score)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    logarithmic = not metric.higher_is_better and low > 0 and high > 4 * low
    margin = 0.08 * (high - low) or (0.01 if metric.percent else 0.01 * abs(high) or 0.01)
    limits = (low - margin, high + margin)
    if logarithmic:
        limits = (low / 1.25, min(high * 1.25, 1.02) if metric.percent else high * 1.25)
    label = Units(metric).name + (" (log scale)" if logarithmic else "")
    axes.set(**{f"{which}scale": "log" if logarithmic else "linear", f"{which}lim": limits, f"{which}label": label})
    line = axes.xaxis if which == "x" else axes.yaxis
    line.set_major_locator(log_locator(low, high, *limits) if logarithmic else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    line.set_minor_locator(NullLocator())
    shown = "{:.3g} %" if metric.percent else "{:g}"
    unit = 100 if metric.percent else 1
    line.set_major_formatter(FuncFormatter(lambda value, _: shown.format(unit * value).replace("-", MINUS)))
    axes.grid(axis=which)


def log_locator(low: float, high: float, start: float, end: float) -> Locator:
    """About seven labels from ``start`` to ``end`` for scores from ``low`` to ``high``: more would touch each other."""
    if high > 1e5 * low:
        return LogLocator(numticks=7)
    bases = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 200 * low else (1, 3)
    powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
    return FixedLocator([tick for power in powers for base in bases if start <= (tick := base * 10.0**power) <= end])


def new_figure(count: int, columns: int, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in columns, each ``height`` inches high; ``width`` in units of 1/72 inch."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width / 72, rows * height), facecolor="white", layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def add_legend(figure: Figure, labels: Mapping[str, str], marks: Mapping[str, Mark], columns: int = 2) -> None:
    """A legend of the arms below all panels, for which the figure grows."""
    lines = [Line2D([], [], color=marks[name].colour, marker=marks[name].marker, linewidth=1.5) for name in labels]
    names = [textwrap.fill(label, 30) for label in labels.values()]
    figure.legend(lines, names, loc="outside lower left", ncols=columns)
    width, height = figure.get_size_inches()
    lines_of = [name.count("\n") + 1 for name in names]
    rows = sum(max(lines_of[i : i + columns]) for i in range(0, len(names), columns))
    figure.set_size_inches(width, height + 0.21 * rows + 0.1)


def _arm_rows(axes: Axes, settings: Sequence[Setting], marks: Mapping[str, Mark]) -> None:
    """A row an arm: a point a seed, a bar at the mean, and a thin line through the runs of each seed."""
    seeds = len(settings[0].scores)
    shifts = [0.34 * (j / (seeds - 1) - 0.5) if seeds > 1 else 0.0 for j in range(seeds)]
    for j, shift in enumerate(shifts):
        places = [row + shift for row in range(len(settings))]
        axes.plot([setting.scores[j] for setting in settings], places, color=MUTED, linewidth=0.6, alpha=0.6)
    for row, setting in enumerate(settings):
        colour, marker = marks[setting.arm]
        axes.plot(setting.scores, [row + shift for shift in shifts], marker, color=colour, linestyle="none", alpha=0.85)
        axes.plot([setting.score.mean] * 2, [row - 0.34, row + 0.34], color=colour, linewidth=2.4)
        gone = [row + s for s, run in zip(shifts, setting.results, strict=True) if run and run.status == "diverged"]
        _crosses(axes, [1.02] * len(gone), gone, colour, axes.get_yaxis_transform())
    axes.set_yticks(range(len(settings)), [textwrap.fill(setting.label, 22) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)


def _sweep(axes: Axes, summary: Summary, panel: Point, marks: Mapping[str, Mark]) -> None:
    """Lines over the sweep; arms that it does not change are a column of points each, at the right."""
    traces = {arm.name: summary.along(arm.name, panel) for arm in summary.study.arms}
    traces = {arm: along for arm, along in traces.items() if any(setting.runs for setting in along.values())}
    level = [arm for arm, along in traces.items() if same_runs(along)]
    varied = [arm for arm in traces if arm not in level]
    right = len(summary.values) - 0.1
    step = min(0.017 * (right + 2 * bool(level)), 0.8 / max(1, len(varied)))  # about a marker's width
    unit = min(0.34, 2.4 / max(1, len(level)))
    for arm, along in traces.items():
        settings = list(along.values())
        if arm in level:
            places, settings = [right + unit * level.index(arm)], settings[:1]
        else:
            places = [i + step * (varied.index(arm) - (len(varied) - 1) / 2) for i in along]
        _trace(axes, places, settings, marks[arm])
    ticks = {float(i): value_word(value) for i, value in enumerate(summary.values)}
    if level:
        axes.axvline(right - 0.5 * (right - len(summary.values) + 1), color=GRID, linewidth=1.5)
        ticks[right + unit * (len(level) - 1) / 2] = "unaffected"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(-0.6, right + unit * (len(level) - 0.3) if level else len(summary.values) - 0.4)
    axes.set_xlabel(axis_word(summary.study, summary.across or ""))
    if any(setting.diverged for along in traces.values() for setting in along.values()):
        axes.text(0, 1.015, "diverged ×", transform=axes.transAxes, color=MUTED, fontsize=10, va="bottom", ha="right")


def _trace(axes: Axes, places: Sequence[float], settings: Sequence[Setting], mark: Mark) -> None:
    """One arm: thin lines (or small points beside the mean, at a single place) for the seeds, marks at the means."""
    shape, beside = (".", [places[0] + SEED_SHIFT]) if len(places) == 1 else ("-", places)
    for scores in zip(*(setting.scores for setting in settings), strict=True):
        axes.plot(beside, scores, shape, color=mark.colour, linewidth=0.6, alpha=0.5, markersize=4)
    means = [setting.score.mean for setting in settings]
    axes.plot(places, means, color=mark.colour, marker=mark.marker, linewidth=1.8, markeredgecolor="white", zorder=4)
    lost = [place for place, setting in zip(places, settings, strict=True) if setting.diverged]
    _crosses(axes, lost, [1.03] * len(lost), mark.colour, axes.get_xaxis_transform())


def _crosses(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, transform: Transform) -> None:
    """Crosses for diverged runs, beside the axes; the layout does not make room for them."""
    (line,) = axes.plot(x, y, "x", color=colour, transform=transform, clip_on=False)
    line.set_in_layout(False)


def _statistics_rows(axes: Axes, items: Sequence[Evaluated]) -> None:
    for row, item in enumerate(items):
        axes.axhline(row, color=GRID, linewidth=0.8)
        for number, (family, mark) in enumerate(FAMILY_MARKS.items()):
            if (kind := item.largest(family)) is not None:
                place = row + 0.19 * (number - 1.5)
                axes.plot(item.scores[kind].mean, place, mark.marker, color=mark.colour, markersize=6)
    axes.set_yticks(range(len(items)), [textwrap.fill(item.setting.label, 22) for item in items])
    axes.set_ylim(len(items) - 0.45, -0.55)
    axes.spines["left"].set_visible(False)


def _statistics_panel(axes: Axes, summary: Summary, items: Sequence[Evaluated]) -> None:
    values = summary.values
    where = {item.setting.point: values.index(dict(item.setting.point)[summary.across or ""]) for item in items}
    for number, (family, mark) in enumerate(FAMILY_MARKS.items()):
        found = [(where[item.setting.point], item.scores[k].mean) for item in items if (k := item.largest(family))]
        if found:
            places = [i + 0.12 * (number - 1.5) for i, _ in found]
            means = [mean for _, mean in found]
            axes.plot(places, means, color=mark.colour, marker=mark.marker, linewidth=1.2, markersize=4.5)
    axes.set_xticks(range(len(values)), [value_word(value) for value in values], fontsize=10)
    axes.tick_params(axis="y", labelsize=10)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xlabel(axis_word(summary.study, summary.across or ""), fontsize=10)
