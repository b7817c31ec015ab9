"""The small figures of a report, several beside each other: learning curves, kinds of statistics, layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from syncbn.study.analysis.evaluations import FAMILIES, Evaluated
from syncbn.study.analysis.layers import HEAT, LayerMap
from syncbn.study.analysis.layout import across_label
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.report.figures import LINE_HEIGHT, across_axis, row_label
from syncbn.study.report.plots import (
    COLOURS,
    DASHED,
    INK,
    MUTED,
    NARROW,
    SMALL,
    SURFACE,
    TITLE_HEIGHT,
    Mark,
    error_axis,
    new_axes,
    put_title,
    shortened,
    style,
    whisker,
)

CURVE_POINTS = 40
"""Evaluations of a run that a learning curve shows at most."""
FAMILY_MARKS = {
    "running": Mark(colour=INK, marker="o", dash="solid"),
    "batch": Mark(colour=COLOURS[0], marker="s", dash=(0, (5, 2))),
    "population mean": Mark(colour=COLOURS[1], marker="^", dash=(0, (1.5, 1.5))),
    "population total": Mark(colour=COLOURS[2], marker="D", dash=(0, (6, 2, 1.5, 2))),
}
"""How each kind of statistics is drawn."""

Curve = dict[float, float]
"""Test error by epoch."""


def curve_figure(setting: Setting, reference: Setting | None, colour: str, limits: Sequence[float]) -> Figure:
    """One arm's test error over the epochs: a line a seed, and the reference's mean dashed."""
    with style():
        figure, axes = new_axes(SMALL, 132, 36, 6, 6, 34)
        error_axis(axes, limits, axis="y")
        if reference is not None and (curves := [curve for curve in curves_of(reference) if curve]):
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]
            axes.plot(epochs, means, color=INK, linewidth=1.2, linestyle=DASHED, zorder=5)
        width = 1.4 if len(setting.results) <= 4 else 0.9
        for curve in curves_of(setting):
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=width)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.set_xlabel("epoch", fontsize=10.5)
    return figure


def curves_of(setting: Setting) -> list[Curve]:
    """For each seed the test error at the epochs that were evaluated, thinned out where they are many."""
    found = []
    for result in setting.results:
        history = result.history if result is not None else []
        curve = {
            float(epoch): float(error)
            for entry in history
            if (epoch := entry.get("epoch")) is not None and (error := entry.get("test_error")) is not None
        }
        epochs = sorted(curve)
        every = math.ceil(len(epochs) / CURVE_POINTS) or 1
        found.append({epoch: curve[epoch] for epoch in reversed(epochs[::-1][::every])})  # the last one stays
    return found


def kinds_figure(
    summary: Summary, items: Sequence[tuple[int, Evaluated]], limits: Sequence[float], families: Sequence[str]
) -> Figure:
    """One arm's error along the sweep under each kind of statistics, the population's of the most samples."""
    layout = summary.layout
    with style():
        figure, axes = new_axes(NARROW, 200, 40, 12, 6 + TITLE_HEIGHT, 44)
        put_title(figure, items[0][1].setting.label)
        error_axis(axes, limits, axis="y")
        pixel = across_axis(axes, layout, NARROW - 52)
        axes.set_xlabel(across_label(summary.study, layout))
        used = [family for family in families if any(item.largest(family) for _, item in items)]
        for number, family in enumerate(used):
            mark, offset = FAMILY_MARKS[family], 5 * pixel * (number - (len(used) - 1) / 2)
            found = [(layout.positions[i] + offset, item.errors[k]) for i, item in items if (k := item.largest(family))]
            for x, error in found:
                whisker(axes, x, error.low, error.high, mark.colour)
            _series(axes, [x for x, _ in found], [error.mean for _, error in found], mark)
    return figure


def kinds_row_figure(items: Sequence[Evaluated], width: float, families: Sequence[str]) -> Figure:
    """Arms at one place under each kind of statistics: a row an arm."""
    with style():
        wrapped = [textwrap.wrap(item.setting.label, int((width - 34) / 7.4)) or [""] for item in items]
        row = 40 + LINE_HEIGHT * (max(map(len, wrapped)) - 1)
        unit, height = 40 / row, row * len(items) + 46
        figure, axes = new_axes(width, height, 10, 14, 4, 42)
        errors = [item.errors[kind].mean for item in items for f in families if (kind := item.largest(f)) is not None]
        error_axis(axes, errors, axis="x")
        axes.set_ylim(len(items) - 1 + 0.45 * unit, 0.45 * unit - 1)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("test error" + (" (log scale)" if axes.get_xscale() == "log" else ""))
        for place, item in enumerate(items):
            base = place + 0.12 * unit
            row_label(axes, place - 0.36 * unit, wrapped[place], row)
            axes.axhline(base, color=MUTED, linewidth=0.5, zorder=1)
            for number, family in enumerate(families):
                if (kind := item.largest(family)) is not None:
                    y = base + 0.1 * unit * (number - (len(families) - 1) / 2)
                    _series(axes, [item.errors[kind].mean], [y], FAMILY_MARKS[family], size=6.5)
    return figure


def samples_figure(item: Evaluated, limits: Sequence[float]) -> Figure:
    """One setting's error against the images that its population statistics are of, for both estimators."""
    with style():
        figure, axes = new_axes(NARROW, 190, 40, 12, 6 + TITLE_HEIGHT, 44)
        put_title(figure, item.setting.label)
        error_axis(axes, limits, axis="y")
        counts = sorted({n for f in FAMILIES for n, _ in item.series(f) if n})
        axes.set_xscale("log", base=2)
        axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("images that the statistics are of")
        for family, mark in FAMILY_MARKS.items():
            series = item.series(family)
            if family.startswith("population"):
                for n, error in series:
                    whisker(axes, n, error.low, error.high, mark.colour)
                _series(axes, [n for n, _ in series], [error.mean for _, error in series], mark)
            elif series:
                axes.axhline(series[0][1].mean, color=mark.colour, linewidth=1.2, linestyle=mark.dash, zorder=2)
    return figure


def layers_figure(found: LayerMap) -> Figure:
    """A map of layers as a picture, for those who show it elsewhere; on the page it is a table."""
    with style():
        cell, left = (44.0, 18.0), 8 + 6.3 * max(len(row.layer) for row in found.rows)
        width = left + cell[0] * len(found.columns) + 10
        below = 32 if found.arm is not None else 24 + 6.3 * min(24, max(map(len, found.columns)))
        figure, axes = new_axes(width, cell[1] * len(found.rows) + 24 + below, left, 10, 24, below)
        axes.set_xlim(0, len(found.columns))
        axes.set_ylim(len(found.rows), 0)
        for y, row in enumerate(found.rows):
            for x, value in enumerate(row.cells):
                if value.level is None:
                    continue
                ground, ink = HEAT[value.level]
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=ground, edgecolor=SURFACE, linewidth=0.8))
                axes.text(x + 0.5, y + 0.5, value.text, color=ink, ha="center", va="center", fontsize=10)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_yticks([y + 0.5 for y in range(len(found.rows))], [row.layer for row in found.rows])
        names = [shortened(heading, 24) for heading in found.columns]
        axes.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=0 if found.arm is not None else 90)
        axes.set_xlabel(found.across)
        title = shortened(found.title, max(8, int((width - left) / 6.6)))
        axes.text(0, 1.0, title, transform=axes.transAxes, va="bottom", fontweight="bold")
    return figure


def used_families(items: Iterable[Evaluated]) -> list[str]:
    """The kinds of statistics that occur, in their order."""
    used = {kind.family for item in items for kind in item.errors}
    return [family for family in FAMILIES if family in used]


def _series(axes: Axes, x: Sequence[float], y: Sequence[float], mark: Mark, size: float = 5.0) -> None:
    axes.plot(
        x,
        y,
        color=mark.colour,
        linewidth=1.4,
        linestyle=mark.dash,
        marker=mark.marker,
        markersize=size,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
        zorder=4,
    )
