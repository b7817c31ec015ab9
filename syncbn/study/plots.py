"""The figures of a study's report, for colour-blind readers too: place and labels carry the meaning, colour helps."""

from __future__ import annotations

import html
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from syncbn.study.summary import SPACE, Row, spread

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, without its yellow and black, which vanish on light and dark pages."""
INK, MUTED, GRID, SURFACE = "#1c1e21", "#636b74", "#d9dce0", "#fdfdfd"
_PAGE_COLOURS = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}


def arm_colours(names: Sequence[str], reference: str | None) -> dict[str, str]:
    """A colour for each arm by its place in the study, so that it keeps it in any order; the reference is grey."""
    others = [name for name in names if name != reference]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return colours | ({reference: MUTED} if reference is not None else {})


def error_figure(rows: Sequence[Row], colours: dict[str, str]) -> Figure:
    """Test error of each arm: every seed a point, the mean a bar, the reference a dashed line."""
    with _style():
        height = 0.62 * len(rows) + 0.72
        figure = Figure(figsize=(6.0, height), facecolor="none")
        axes = figure.add_axes((0.025, 0.56 / height, 0.95, 1 - 0.66 / height), facecolor="none")
        errors = [error for row in rows for error in row.errors if not math.isnan(error)]
        _error_axis(axes, errors, axis="x")
        axes.set_ylim(len(rows) - 0.45, -0.62)
        axes.yaxis.set_major_locator(NullLocator())
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("test error" + (" (log scale)" if axes.get_xscale() == "log" else ""))
        for place, row in enumerate(rows):
            if row.reference and row.finished:
                axes.axvline(row.mean, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            _error_row(axes, place, row, colours[row.name])
    return figure


def curve_figure(row: Row, reference: Row | None, colour: str, limits: tuple[float, float]) -> Figure:
    """One arm's test error over the epochs: a line a seed, and the reference's mean dashed in grey."""
    with _style():
        figure = Figure(figsize=(2.5, 1.9), facecolor="none")
        axes = figure.add_axes((0.2, 0.22, 0.76, 0.74), facecolor="none")
        _error_axis(axes, list(limits), axis="y")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if reference is not None:
            curves = [curve for curve in _curves(reference) if curve]
            epochs = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]
            axes.plot(epochs, means, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        for curve in _curves(row):
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=1.4, marker="o", markersize=2.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("epoch")
    return figure


def curve_limits(rows: Sequence[Row]) -> tuple[float, float] | None:
    """Smallest and largest test error in any arm's history, the common axis of all panels; None without any."""
    errors = [error for row in rows for curve in _curves(row) for error in curve.values()]
    return (min(errors), max(errors)) if errors else None


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with the endings .svg and .png, each whole or not at all."""
    with _style():
        for ending in ("svg", "png"):
            draft = path.with_name(f".{path.name}.{os.getpid()}.{ending}")
            metadata = {"Date": None} if ending == "svg" else {}
            figure.savefig(draft, format=ending, dpi=200, facecolor=SURFACE, metadata=metadata)
            draft.replace(path.with_suffix(f".{ending}"))


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """A figure as an SVG element of a page: in the page's colours and font, its ids made unique by ``prefix``."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'\bhref="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    for colour, on_page in _PAGE_COLOURS.items():
        svg = svg.replace(colour, on_page)
    label = html.escape(description)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _error_row(axes: Axes, place: int, row: Row, colour: str) -> None:
    count = len(row.errors)
    offsets = [0.0] if count == 1 else [0.16 * (2 * i / (count - 1) - 1) for i in range(count)]
    base = place + 0.14
    to_axes = axes.get_yaxis_transform()
    # On a ground of the page's colour: the reference's line would strike the names out.
    ground = {"facecolor": SURFACE, "edgecolor": "none", "pad": 1.5}
    axes.text(0.0, place - 0.3, row.label, transform=to_axes, va="center", fontweight="bold", bbox=ground)
    axes.text(1.0, place - 0.3, _figures(row), transform=to_axes, ha="right", va="center", bbox=ground)
    if row.finished:
        axes.plot([row.low, row.high], [base, base], color=colour, linewidth=1.2, zorder=2)
        axes.plot([row.mean] * 2, [base - 0.23, base + 0.23], color=colour, linewidth=2.6, zorder=3)
    for error, offset, result in zip(row.errors, offsets, row.results, strict=True):
        if not math.isnan(error):
            axes.plot(error, base + offset, "o", markersize=6.0, color=colour, markeredgecolor=SURFACE, zorder=4)
        elif result is not None:  # diverged: a cross at the end of the scale
            axes.plot(0.985, base + offset, "x", markersize=6.0, color=colour, transform=to_axes, clip_on=False)


def _figures(row: Row) -> str:
    words = [spread(row.mean, row.sd)] if row.finished else []
    if row.diverged:
        words.append(f"{row.diverged} of {row.diverged + row.finished} diverged")
    if row.missing:
        words.append(f"{row.missing} missing")
    return ", ".join(words)


def _curves(row: Row) -> list[dict[float, float]]:
    """For each seed the test error at each epoch that was evaluated."""
    return [
        {
            float(epoch): float(error)
            for entry in (result.history if result is not None else [])
            if (epoch := entry.get("epoch")) is not None and (error := entry.get("test_error")) is not None
        }
        for result in row.results
    ]


def _error_axis(axes: Axes, errors: Sequence[float], axis: str) -> None:
    """Scale, limits and percentages of an axis of errors (fractions): logarithmic where they span it and exceed 0."""
    low, high = (min(errors), max(errors)) if errors else (0.0, 1.0)
    logarithmic = low > 0 and high > 4 * low
    if logarithmic:
        limits = low / 1.3, high * 1.3
        ticks = [base * 10.0**power for power in range(-6, 1) for base in (1, 2, 5)]
    else:
        margin = 0.08 * (high - low) or 0.01
        limits = max(low - margin, -0.02 * high), high + margin
        ticks = list(MaxNLocator(5).tick_values(*limits))
    horizontal = axis == "x"
    line = axes.xaxis if horizontal else axes.yaxis
    (axes.set_xscale if horizontal else axes.set_yscale)("log" if logarithmic else "linear")
    (axes.set_xlim if horizontal else axes.set_ylim)(*limits)
    line.set_major_locator(FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]]))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}{SPACE}%"))
    axes.grid(axis="x" if horizontal else "y", color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


@contextmanager
def _style() -> Iterator[None]:
    settings: Any = {
        "font.size": 10.5,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 9.5,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": INK,
        "text.parse_math": False,  # labels are the user's; a dollar sign is a dollar sign
        "svg.fonttype": "none",
        "svg.hashsalt": "syncbn",
    }
    with matplotlib.rc_context(settings):
        yield
