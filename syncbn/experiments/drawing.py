"""What the experiments' figures share: panels with one legend of the arms, and lines with the spread of the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from syncbn.experiments.runs import Runs, Trace
from syncbn.study.plan.grid import Value
from syncbn.study.report.figures import add_legend, arm_marks, log_locator, new_figure
from syncbn.study.report.format import MINUS

WIDTH = 624
"""Width of a figure in units of 1/72 inch: that of a page's text."""


def panels(runs: Runs, count: int, *, columns: int = 3, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes side by side, in rows of ``columns``, above a legend of all arms."""
    figure, axes = new_figure(count, min(count, columns), height, WIDTH)
    add_legend(figure, {arm.name: arm.label for arm in runs.study.arms}, arm_marks(runs.study), columns=3)
    for each in axes:
        each.grid(axis="y")
    return figure, axes


def plain(value: float) -> str:
    """A number at a tick: 0.01, 1000, 1e4, 1e−8."""
    digits, _, power = (f"{value:.0e}" if value >= 1e4 else f"{value:g}").partition("e")
    return digits + (f"e{int(power)}".replace("-", MINUS) if power else "")


def label_log_scales(figure: Figure) -> None:
    """Plain numbers at the ticks of logarithmic axes, as a figure's text is not parsed for formulas."""
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        if axis.get_scale() == "log" and not isinstance(axis.get_major_locator(), FixedLocator):
            start, end = axis.get_view_interval()
            axis.set_major_locator(log_locator(start, end, start, end))
            axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
            axis.set_minor_locator(NullLocator())


def log_axis(axes: Axes, values: Sequence[Value]) -> None:
    """A logarithmic horizontal axis, with a label at each value of an axis of the study."""
    numbers = [value for value in values if isinstance(value, int | float)]
    axes.set_xscale("log")
    axes.set_xticks(numbers, [plain(number) for number in numbers])
    axes.minorticks_off()


def trace(axes: Axes, runs: Runs, arm: str, found: Trace, *, marked: bool = False) -> None:
    """The mean over the seeds as a line, and a band from the least to the greatest."""
    if not found.places:
        return
    mark = arm_marks(runs.study)[arm]
    axes.plot(found.places, found.mean, color=mark.colour, marker=mark.marker if marked else None, linewidth=1.5)
    low, high = np.nanmin(found.values, axis=1), np.nanmax(found.values, axis=1)
    axes.fill_between(found.places, low, high, color=mark.colour, alpha=0.15, linewidth=0)


def positive(found: Trace) -> Trace:
    """Without what has no place on a logarithmic axis."""
    values = np.where(found.values > 0, found.values, np.nan)
    rows = [i for i in range(len(found.places)) if np.isfinite(values[i]).any()]
    return Trace([found.places[i] for i in rows], values[rows])


def band(axes: Axes, runs: Runs, arm: str, low: Trace, high: Trace) -> None:
    """The means over the seeds of two quantities, and what lies between them."""
    colour = arm_marks(runs.study)[arm].colour
    axes.fill_between(low.places, low.mean, high.mean, color=colour, alpha=0.35, linewidth=0)
    for edge in (low, high):
        axes.plot(edge.places, edge.mean, color=colour, linewidth=0.8)
