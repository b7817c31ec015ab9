"""The bench's one plot: each shape's time relative to torch's local layer, with the peers and the memory limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn.bench.bandwidth import Bandwidth
from syncbn.bench.report import limit_ratio
from syncbn.bench.shapes import DTYPES
from syncbn.bench.suites import SUITES, Measurement

# Okabe and Ito's colours, told apart by colour-blind readers too; ours are filled, the peers' open.
_STYLES: dict[str, dict[str, Any]] = {
    "SyncBatchNorm": {"color": "#0072B2", "marker": "o"},
    "BatchRenorm": {"color": "#009E73", "marker": "s"},
    "torch's SyncBatchNorm function": {"color": "#D55E00", "marker": "^", "markerfacecolor": "none"},
    "textbook": {"color": "#CC79A7", "marker": "v", "markerfacecolor": "none"},
    "textbook compiled": {"color": "#E69F00", "marker": "D", "markerfacecolor": "none"},
}
_SUITE = next(suite for suite in SUITES if suite.name == "alone")
_MEGABYTE = 1e6


def write_plot(path: Path, measurements: Sequence[Measurement], bandwidth: Bandwidth | None) -> str:
    """Write the SVG; what came of it, in a line."""
    found = [m for m in measurements if m.suite == _SUITE.name and _SUITE.baseline in m.timings]
    if not found:
        return "no plot: no shape was timed alone"
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    dtypes = [dtype for dtype in DTYPES if any(m.dtype == dtype for m in found)]
    formats = [last for last in (False, True) if any(m.shape.channels_last is last for m in found)]
    size = (0.6 + 4.6 * len(formats), 1.2 + 3.2 * len(dtypes))
    with matplotlib.rc_context({"svg.hashsalt": "bench", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(dtypes), len(formats), sharex=True, sharey=True, squeeze=False)
        for row, dtype in zip(axes, dtypes, strict=True):
            for ax, last in zip(row, formats, strict=True):
                chosen = [m for m in found if m.dtype == dtype and m.shape.channels_last is last]
                _panel(ax, chosen, bandwidth, f"{dtype}, {'channels_last' if last else 'default format'}")
            row[0].set_ylabel(f"time / {_SUITE.baseline}")
        for ax in axes[-1]:
            ax.set_xlabel("input, MB")
        entries = {
            label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})
    return f"plot: {path}"


def _panel(ax: Any, found: Sequence[Measurement], bandwidth: Bandwidth | None, title: str) -> None:
    ordered = sorted(found, key=lambda m: m.shape.elements)
    ax.axhline(1, color="0.6", linewidth=1)
    for name, style in _STYLES.items():
        timed = [m for m in ordered if name in m.timings]
        if timed:
            xs = [_megabytes(m) for m in timed]
            spreads = [m.ratio(name, _SUITE.baseline) for m in timed]
            errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            marks = {"linestyle": "none", "markersize": 4, "elinewidth": 0.7, **style}
            ax.errorbar(xs, [s.median for s in spreads], yerr=errors, label=name, **marks)
    limits = [(m, ratio) for m in ordered if (ratio := limit_ratio(m, _SUITE, bandwidth)) is not None]
    if limits:
        xs, ys = [_megabytes(m) for m, _ in limits], [ratio for _, ratio in limits]
        ax.plot(xs, ys, "_", color="black", markersize=9, label="memory limit (8 passes)")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, place: f"{value:g}")
        axis.set_minor_formatter(lambda value, place: f"{value:g}" if _leading_digit(value) in (2, 5) else "")
    ax.set_title(title, fontsize=9)
    ax.grid(True, color="0.92", linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _leading_digit(value: float) -> int:
    return int(f"{value:.0e}"[0])


def _megabytes(measurement: Measurement) -> float:
    return measurement.shape.elements * DTYPES[measurement.dtype].itemsize / _MEGABYTE
