"""What the experiments' figures share: panels with one legend of the arms, and lines with the spread of the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from syncbn.experiments.runs import Runs, Trace
from syncbn.study.plan.grid import Value
from syncbn.study.report.figures import add_legend, arm_marks, log_locator, new_figure
from syncbn.study.report.format import MINUS


def panels(runs: Runs, count: int, *, columns: int = 1, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes below a legend of all arms."""
    figure, axes = new_figure(count, columns, height)
    add_legend(figure, {arm.name: arm.label for arm in runs.study.arms}, arm_marks(runs.study))
    for each in axes:
        each.grid(axis="y")
    return figure, axes


def label_log_scales(figure: Figure) -> None:
    """Plain numbers at the ticks of logarithmic vertical axes, as a figure's text is not parsed for formulas."""
    for axes in figure.axes:
        if axes.get_yscale() == "log":
            start, end = axes.get_ylim()
            axes.yaxis.set_major_locator(log_locator(start, end, start, end))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
            axes.yaxis.set_minor_locator(NullLocator())


def log_axis(axes: Axes, values: Sequence[Value]) -> None:
    """A logarithmic horizontal axis, with a label at each value of an axis of the study."""
    numbers = [value for value in values if isinstance(value, int | float)]
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.minorticks_off()


def trace(axes: Axes, runs: Runs, arm: str, found: Trace, *, marked: bool = False) -> None:
    """The mean over the seeds as a line, and a band from the least to the greatest."""
    if not found.places:
        return
    mark = arm_marks(runs.study)[arm]
    axes.plot(found.places, found.mean, color=mark.colour, marker=mark.marker if marked else None, linewidth=1.5)
    low, high = np.nanmin(found.values, axis=1), np.nanmax(found.values, axis=1)
    axes.fill_between(found.places, low, high, color=mark.colour, alpha=0.15, linewidth=0)
