"""Learning curves: of a run's losses and evaluations, or of what a training loop of the user's reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from syncbn.study.analysis.summary import Setting
from syncbn.study.report.figures import Mark, add_legend, new_figure, score_axis
from syncbn.study.report.format import MINUS
from syncbn.train.result import Metric, RunResult

Curve = list[tuple[float, float]]
"""Points (optimizer step, value)."""
CURVE_POINTS, MAX_MARKS = 60, 12
"""Points of one curve at most, and points up to which they have marks."""
MAX_SEED_CURVES = 30
"""With more runs than this, the seeds are a band from the least to the greatest, not a line each."""
MAX_REPORTED = 4
"""Panels of reported metrics at most."""


def curves_figure(settings: Sequence[Setting], marks: Mapping[str, Mark], metric: Metric) -> Figure:
    """Training loss and test score against the optimizer step: means over the seeds, and the spread of the runs."""
    figure, (top, bottom) = new_figure(2, 1, 2.3)
    _draw(top, settings, marks, loss_curve, marked=False)
    _draw(bottom, settings, marks, score_curve)
    _loss_scale(top)
    top.set_ylabel("training loss")
    top.grid(axis="y")
    score_axis(bottom, _drawn(bottom), "y", metric)
    bottom.set_xlabel("optimizer step")
    bottom.sharex(top)
    add_legend(figure, {setting.arm: setting.label for setting in settings}, marks)
    return figure


def reported_figure(settings: Sequence[Setting], marks: Mapping[str, Mark], names: Sequence[str]) -> Figure:
    """What the runs reported, against their steps: a panel for each name."""
    figure, every = new_figure(len(names), 1, 2.3)
    for axes, name in zip(every, names, strict=True):
        _draw(axes, settings, marks, partial(reported_curve, name=name))
        axes.set_ylabel(name)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
        _loss_scale(axes)
        axes.grid(axis="y")
        axes.sharex(every[0])
    every[-1].set_xlabel("step")
    add_legend(figure, {setting.arm: setting.label for setting in settings}, marks)
    return figure


def reported_names(settings: Sequence[Setting]) -> list[str]:
    """What the runs reported more than once, the study's metric first, at most :data:`MAX_REPORTED` names."""
    runs = [run for setting in settings for run in setting.runs]
    metrics = [name for run in runs for name in (run.metric.name, f"validation_{run.metric.name}")]
    found = dict.fromkeys(name for run in runs for entry in run.history for name in entry["test"] or ())
    ordered = [name for name in dict.fromkeys(metrics) if name in found]
    curves = {n: [reported_curve(run, n) for run in runs] for n in dict.fromkeys([*ordered, *found])}
    return [name for name, each in curves.items() if max(map(len, each)) > 1][:MAX_REPORTED]


def loss_curve(run: RunResult) -> Curve:
    """(step, training loss), each point the mean over as many steps as leave at most ``CURVE_POINTS`` points."""
    size = math.ceil(len(run.losses) / CURVE_POINTS) or 1
    parts = [run.losses[start : start + size] for start in range(0, len(run.losses), size)]
    return [(min((i + 1) * size, len(run.losses)), sum(part) / len(part)) for i, part in enumerate(parts)]


def score_curve(run: RunResult) -> Curve:
    """(step, test score) of the evaluations during training, thinned out to ``CURVE_POINTS``; the last one stays."""
    return reported_curve(run, run.metric.name)


def reported_curve(run: RunResult, name: str) -> Curve:
    """(step, value) of what a run's history has under this name, thinned out in the same way."""
    found = [(entry["step"], (entry["test"] or {}).get(name)) for entry in run.history]
    kept = [(float(step), float(value)) for step, value in found if step is not None and value is not None]
    return kept[::-1][:: math.ceil(len(kept) / CURVE_POINTS) or 1][::-1]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all curves have."""
    return [(step, sum(values) / len(values)) for step, values in _shared(curves)]


def _shared(curves: Sequence[Curve]) -> list[tuple[float, list[float]]]:
    """The steps that all curves have, each with the curves' values."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(step, [table[step] for table in tables]) for step in steps]


def spread_words(settings: Sequence[Setting]) -> str:
    """How the single runs are drawn."""
    return "thin lines are single runs" if _few(settings) else "bands reach from the least to the greatest run"


def _few(settings: Sequence[Setting]) -> bool:
    return sum(len(setting.runs) for setting in settings) <= MAX_SEED_CURVES


def _draw(
    axes: Axes,
    settings: Sequence[Setting],
    marks: Mapping[str, Mark],
    curve_of: Callable[[RunResult], Curve],
    *,
    marked: bool = True,
) -> None:
    """A thick line for the mean of each setting's runs; for the runs thin lines, or a band if there are many."""
    few = _few(settings)
    for setting in settings:
        colour, marker = marks[setting.arm]
        whole = [curve_of(run) for run in setting.runs if run.status != "diverged"]
        if few:
            for run in setting.runs:
                axes.plot(*zip(*curve_of(run), strict=True), color=colour, linewidth=0.7, alpha=0.4)
        elif shared := _shared(whole):
            steps, values = zip(*shared, strict=True)
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.12, linewidth=0)
        mean = mean_curve(whole)
        # A run that was tested only once is one point, which a line without a marker does not show.
        marker = marker if marked and len(mean) <= MAX_MARKS else ""
        axes.plot(*zip(*mean, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=4.5)


def _drawn(axes: Axes) -> list[float]:
    """The values of all lines and bands."""
    bands = [y for band in axes.collections for path in band.get_paths() for y in np.asarray(path.vertices)[:, 1]]
    return [float(y) for line in axes.lines for y in np.ravel(line.get_ydata())] + list(map(float, bands))


def _loss_scale(axes: Axes) -> None:
    """A logarithmic scale for values above 0 that span more than a factor of 20."""
    values = [value for value in _drawn(axes) if math.isfinite(value)]
    if values and 0 < 20 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
