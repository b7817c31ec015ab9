"""The main figure of a report: test error along the sweep, or of each arm at one place."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from syncbn.study.analysis.layout import Layout, across_label
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.grid import Point
from syncbn.study.report.plots import (
    DASHED,
    INK,
    MUTED,
    NARROW,
    SURFACE,
    TITLE_HEIGHT,
    Mark,
    error_axis,
    fraction_of,
    new_axes,
    put_title,
    style,
    whisker,
)
from syncbn.study.report.words import spread, value_word

LINE_HEIGHT = 13.0
"""Pixels of a line of a label."""
ROW = 46.0
"""Pixels of a row of a figure of arms whose label has one line."""
DODGE = 2.6
"""Pixels between the intervals of two arms at one place, where there is room."""


def arms_figure(
    settings: Sequence[Setting], marks: Mapping[str, Mark], width: float, limits: Sequence[float], title: str = ""
) -> Figure:
    """Test error of arms at one place: every seed a point, the mean a bar, the reference's a dashed line."""
    wrapped = [textwrap.wrap(s.label, _room(width, row_figures(s))) or [""] for s in settings]
    row = ROW + LINE_HEIGHT * (max(map(len, wrapped), default=1) - 1)
    with style():
        top = 4 + TITLE_HEIGHT * bool(title)
        figure, axes = new_axes(width, row * len(settings) + 42 + top, 10, 14, top, 42)
        put_title(figure, title)
        error_axis(axes, limits, axis="x")
        axes.set_ylim(len(settings) - 1 + 0.55 * ROW / row, 0.55 * ROW / row - 1)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("test error" + (" (log scale)" if axes.get_xscale() == "log" else ""))
        for place, (setting, lines) in enumerate(zip(settings, wrapped, strict=True)):
            if setting.reference and setting.finished:
                axes.axvline(setting.error.mean, color=MUTED, linewidth=1.0, linestyle=DASHED, zorder=1)
            _error_row(axes, place, setting, marks[setting.arm].colour, lines, row)
    return figure


def sweep_figure(
    summary: Summary, panel: Point, marks: Mapping[str, Mark], width: float, limits: Sequence[float]
) -> Figure:
    """Test error along the sweep: a line an arm with 95 % intervals, and its name at the line's end.

    An arm that the sweep does not touch is one level line with one interval, at the right.

    Args:
        summary, panel: what to draw.
        marks: of the arms.
        width: in pixels.
        limits: all that the upright axis has to hold, so that panels share it.
    """
    layout = summary.layout
    traces = [_trace(summary, arm.name, arm.label, panel) for arm in summary.study.arms]
    traces = [trace for trace in traces if any(setting.runs for _, setting in trace.settings)]
    label_width = 0.35 * width if width <= NARROW else 0.3 * width
    lines = [textwrap.wrap(trace.label, int(label_width / 6.4)) or [""] for trace in traces]
    needed = sum(LINE_HEIGHT * len(wrapped) + 3 for wrapped in lines)
    plot_height = max(needed, 220 if width <= NARROW else 300)
    title = summary.layout.title(panel)
    with style():
        top = 20 + TITLE_HEIGHT * bool(title)
        figure, axes = new_axes(width, plot_height + 46 + top, 40, label_width + 16, top, 46)
        put_title(figure, title)
        error_axis(axes, limits, axis="y")
        pixel = across_axis(axes, layout, width - 56 - label_width, room=0.7)
        dodges = _dodges(layout, traces, pixel)
        axes.set_xlabel(across_label(summary.study, layout))
        crosses = [trace for trace in traces if any(setting.diverged for _, setting in trace.settings)]
        if crosses:
            axes.text(0, 1.02, "diverged", transform=axes.transAxes, color=MUTED, fontsize=9.5, va="bottom")
        ends = []
        for number, trace in enumerate(traces):
            mark = marks[trace.arm]
            ends.append(
                _level(axes, trace, mark, dodges[number])
                if trace.constant
                else _line(axes, layout, trace, mark, dodges[number])
            )
            place = crosses.index(trace) - (len(crosses) - 1) / 2 if trace in crosses else 0.0
            _crosses(axes, layout, trace, mark, pixel * 7 * place)
        _names(axes, traces, lines, ends, marks, plot_height, pixel)
    return figure


def across_axis(axes: Axes, layout: Layout, pixels: float, room: float = 0.0) -> float:
    """Limits and ticks of the axis of the sweep, ``pixels`` wide; the size of a pixel in its unit.

    ``room`` is left free on the right, in the mean distance of two values.
    """
    places = layout.positions
    step = (places[-1] - places[0]) / (len(places) - 1) if len(places) > 1 else 1.0
    low, high = places[0] - 0.35 * step, places[-1] + (0.35 + room) * step
    axes.set_xlim(low, high)
    pixel = (high - low) / pixels
    words = [value_word(value) for value in layout.values]
    shown: list[int] = []
    for i in range(len(places) - 1, -1, -1):  # the smallest batch keeps its tick where there is no room for all
        wide = 6.2 * (len(words[i]) + len(words[shown[-1]])) / 2 + 3 if shown else 0.0
        if not shown or (places[shown[-1]] - places[i]) / pixel >= wide:
            shown.append(i)
    names = {places[i]: words[i] for i in shown}
    axes.xaxis.set_major_locator(FixedLocator(sorted(names)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(value, "")))
    return pixel


def extent(settings: Sequence[Setting]) -> list[float]:
    """What an axis of errors has to hold for these settings: their means, and intervals that are not absurdly wide."""
    found = []
    for setting in settings:
        error = setting.error
        found.append(error.mean)
        # The interval of two far seeds may reach from -100 % to 200 %: an axis that held it would show nothing else.
        found += [end for end in (error.low, error.high) if error.mean / 2 < end < min(2 * error.mean, 1.0)]
    return found


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """One arm within a panel."""

    arm: str
    label: str
    settings: list[tuple[int, Setting]]
    constant: bool


def _trace(summary: Summary, arm: str, label: str, panel: Point) -> _Trace:
    settings = summary.across(arm, panel)
    constant = summary.constant(arm, panel) and len(settings) == len(summary.layout.values)
    return _Trace(arm=arm, label=label, settings=settings, constant=constant)


def _dodges(layout: Layout, traces: Sequence[_Trace], pixel: float) -> list[dict[int, float]]:
    """How far each trace's marks are moved sideways at each place, so that those at one place stand around it.

    Arms that do not vary have their marks at the right, apart from the others, where they are moved alike.
    """
    distance = (layout.positions[-1] - layout.positions[0]) / (len(layout.positions) - 1)
    found: list[dict[int, float]] = [{} for _ in traces]
    for constant in (False, True):
        members = [number for number, trace in enumerate(traces) if trace.constant == constant]
        step = min(DODGE * pixel, 0.6 * distance / len(members)) if members else 0.0
        for i in range(len(layout.positions)):
            here = [n for n in members if any(place == i and s.finished for place, s in traces[n].settings)]
            for rank, number in enumerate(here):
                found[number][i] = step * (rank - (len(here) - 1) / 2)
    return found


def _line(
    axes: Axes, layout: Layout, trace: _Trace, mark: Mark, dodge: Mapping[int, float]
) -> tuple[float, float] | None:
    """Draw an arm's line; where it ends, None if it has no finished run."""
    found = [(layout.positions[i] + dodge[i], setting.error) for i, setting in trace.settings if setting.finished]
    if not found:
        return None
    reference = trace.settings[0][1].reference
    x, y = [place for place, _ in found], [error.mean for _, error in found]
    for place, error in zip(x, (error for _, error in found), strict=True):
        whisker(axes, place, error.low, error.high, mark.colour)
    if reference and len(found) == 1:
        axes.axhline(y[0], color=mark.colour, linewidth=1.0, linestyle=DASHED, zorder=1)
    axes.plot(
        x,
        y,
        color=mark.colour,
        linewidth=2.0 if reference else 1.5,
        linestyle=mark.dash,
        marker=mark.marker,
        markersize=5.5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
        zorder=5 if reference else 4,
    )
    return x[-1], y[-1]


def _level(axes: Axes, trace: _Trace, mark: Mark, dodge: Mapping[int, float]) -> tuple[float, float] | None:
    """Draw an arm that does not vary: a level line, its marker and interval at the right."""
    setting = trace.settings[0][1]
    if not setting.finished:
        return None
    right = axes.get_xlim()[1]
    axes.axhline(setting.error.mean, color=mark.colour, linewidth=1.0, linestyle=mark.dash, zorder=2)
    middle = right - 0.5 * (right - axes.get_xticks()[-1])
    x = middle + dodge[trace.settings[0][0]]
    whisker(axes, x, setting.error.low, setting.error.high, mark.colour)
    axes.plot(
        x,
        setting.error.mean,
        color=mark.colour,
        marker=mark.marker,
        markersize=5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
        zorder=4,
    )
    return right, setting.error.mean


def _crosses(axes: Axes, layout: Layout, trace: _Trace, mark: Mark, offset: float) -> None:
    """A cross above the plot wherever a run diverged."""
    right = axes.get_xlim()[1]
    settings = trace.settings[-1:] if trace.constant else trace.settings
    places = [right - 6 * abs(offset) if trace.constant else layout.positions[i] for i, s in settings if s.diverged]
    if places:
        to_axes = axes.get_xaxis_transform()
        places = [place + offset for place in places]
        height = [1.035] * len(places)
        axes.plot(places, height, "x", color=mark.colour, markersize=5, transform=to_axes, clip_on=False, zorder=6)


def _names(
    axes: Axes,
    traces: Sequence[_Trace],
    lines: Sequence[Sequence[str]],
    ends: Sequence[tuple[float, float] | None],
    marks: Mapping[str, Mark],
    height: float,
    pixel: float,
) -> None:
    """The arms' names at the right, moved apart as far as they need, each tied to the end of its line."""
    right = axes.get_xlim()[1]
    # A line that never finished is named at the top, where its crosses are.
    wanted = [height if end is None else height * fraction_of(axes, end[1]) for end in ends]
    sizes = [LINE_HEIGHT * len(wrapped) + 3 for wrapped in lines]
    for trace, wrapped, end, place in zip(traces, lines, ends, spread_out(wanted, sizes, height), strict=True):
        mark, setting = marks[trace.arm], trace.settings[0][1]
        y = place / height
        label = right + 16 * pixel, y
        to_axes = axes.get_xaxis_transform()
        if end is not None:
            x = [end[0], right + 1 * pixel, label[0] - 6 * pixel]
            level = fraction_of(axes, end[1])
            colour = MUTED if mark.colour == INK else mark.colour
            axes.plot(x, [level, level, y], color=colour, linewidth=0.6, transform=to_axes, clip_on=False, zorder=1)
        marker = mark.marker if end is not None else "x"
        axes.plot(label[0], y, marker, color=mark.colour, markersize=4.5, transform=to_axes, clip_on=False)
        weight = "bold" if setting.reference else "normal"
        for number, text in enumerate(wrapped):
            shift = (len(wrapped) - 1) / 2 - number
            axes.text(
                label[0] + 6 * pixel,
                y + shift * LINE_HEIGHT / height,
                text,
                transform=to_axes,
                va="center_baseline",
                fontweight=weight,
            )


def spread_out(wanted: Sequence[float], sizes: Sequence[float], height: float) -> list[float]:
    """Centres near ``wanted`` for boxes of these sizes, in the same order, that do not overlap within 0 to ``height``.

    Boxes that touch are moved as one, by the mean of what they want: the least squares solution (isotonic regression).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, list[int]]] = []  # bottom of a group of touching boxes, its members
    for i in order:
        group = [i]
        while True:
            below = [sum(sizes[j] for j in group[:k]) + sizes[member] / 2 for k, member in enumerate(group)]
            bottom = sum(wanted[j] - b for j, b in zip(group, below, strict=True)) / len(group)
            bottom = max(0.0, min(bottom, height - sum(sizes[j] for j in group)))
            if not groups or groups[-1][0] + sum(sizes[j] for j in groups[-1][1]) <= bottom + 1e-9:
                break
            group = groups.pop()[1] + group
        groups.append((bottom, group))
    found = [0.0] * len(wanted)
    for bottom, group in groups:
        for i in group:
            found[i] = bottom + sizes[i] / 2
            bottom += sizes[i]
    return found


def row_label(axes: Axes, place: float, lines: Sequence[str], row: float, figures: str = "") -> None:
    """An arm's name in the lines above ``place``, where a unit is ``row`` pixels high, and its figures at the right."""
    # On a ground of the page's colour: the reference's line would strike the names out.
    ground = {"facecolor": SURFACE, "edgecolor": "none", "pad": 1.5}
    to_axes = axes.get_yaxis_transform()
    for number, text in enumerate(lines):
        y = place - LINE_HEIGHT * (len(lines) - 1 - number) / row
        axes.text(0.0, y, text, transform=to_axes, va="center", fontweight="bold", bbox=ground)
    if figures:
        axes.text(1.0, place, figures, transform=to_axes, ha="right", va="center", bbox=ground)


def _room(width: float, figures: str) -> int:
    """Characters of a bold label that fit beside these figures."""
    return max(12, int((width - 34 - 6.2 * len(figures)) / 7.4))


def _error_row(axes: Axes, place: int, setting: Setting, colour: str, lines: Sequence[str], row: float) -> None:
    count, unit = len(setting.errors), ROW / row
    offsets = [0.0] if count == 1 else [0.16 * unit * (2 * i / (count - 1) - 1) for i in range(count)]
    base = place + 0.14 * unit
    to_axes = axes.get_yaxis_transform()
    row_label(axes, place - 0.3 * unit, lines, row, row_figures(setting))
    finished = [error for error in setting.errors if not math.isnan(error)]
    if finished:
        axes.plot([min(finished), max(finished)], [base, base], color=colour, linewidth=1.2, zorder=2)
        axes.plot(
            [setting.error.mean] * 2, [base - 0.23 * unit, base + 0.23 * unit], color=colour, linewidth=2.6, zorder=3
        )
    for error, offset, result in zip(setting.errors, offsets, setting.results, strict=True):
        if not math.isnan(error):
            axes.plot(error, base + offset, "o", markersize=6.0, color=colour, markeredgecolor=SURFACE, zorder=4)
        elif result is not None:  # diverged: a cross at the end of the scale
            axes.plot(0.985, base + offset, "x", markersize=6.0, color=colour, transform=to_axes, clip_on=False)


def row_figures(setting: Setting) -> str:
    """A setting's mean and spread, and what became of its other runs."""
    words = [spread(setting.error.mean, setting.error.sd)] if setting.finished else []
    if setting.diverged:
        words.append(f"{setting.diverged} of {setting.diverged + setting.finished} diverged")
    if setting.missing:
        words.append(f"{setting.missing} missing")
    return ", ".join(words)
