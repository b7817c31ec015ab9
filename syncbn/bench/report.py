"""What a run of the bench says and leaves behind: text, bench.json, bench.csv; bench.svg is :mod:`.plot`'s."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import syncbn
from syncbn.bench.bandwidth import Bandwidth
from syncbn.bench.correctness import tolerances
from syncbn.bench.figures import Figures
from syncbn.bench.peers import CONTENDERS
from syncbn.bench.rows import Results, Verdict
from syncbn.bench.shapes import DTYPES
from syncbn.bench.suites import LARGE_MEAN, SUITES, Measurement, Selection, Suite
from syncbn.bench.timing import Spread, geometric_mean_of_ratios

# -- text --------------------------------------------------------------------------------------------------------------


def summary(results: Results) -> list[str]:
    """Lines of text: for each suite and dtype the contenders' ratios, and what they cost besides time."""
    lines: list[str] = []
    for suite in SUITES:
        for dtype in DTYPES:
            found = [m for m in results.measurements if m.suite == suite.name and m.dtype == dtype]
            if found:
                lines += [*_suite_lines(suite, dtype, found, results.bandwidth), ""]
    for measurement in results.measurements:
        if measurement.suite == "large mean":
            lines += [*_large_mean_lines(measurement), ""]
    if results.bandwidth is not None:
        spread = Spread(*(value / 1e9 for value in results.bandwidth.bytes_per_second))
        lines.append(f"copy bandwidth of this machine, read and written: {spread} GB/s")
    return lines


def _suite_lines(suite: Suite, dtype: str, found: Sequence[Measurement], bandwidth: Bandwidth | None) -> Iterable[str]:
    yield f"{suite.title}, {dtype}, {len(found)} shapes: time / {suite.baseline}, geometric mean (quartiles)"
    names = [name for name in (*suite.needed, *suite.more) if any(name in m.timings for m in found)]
    width = max(map(len, [*names, "memory limit"]), default=0)
    for name in names:
        timed = [m for m in found if name in m.timings and suite.baseline in m.timings]
        if not timed:
            continue
        ratios = [m.ratio(name, suite.baseline) for m in timed]
        medians = [ratio.median for ratio in ratios]
        few = f", {len(timed)} of the shapes" if len(timed) < len(found) else ""
        text = f"{geometric_mean_of_ratios(ratios)!s:<22} {min(medians):.2f} to {max(medians):.2f}{few}"
        yield f"  {name:<{width}}  {text}{_network(name, timed)}"
        yield f"  {'':<{width}}  {_costs([m.figures[name] for m in timed if name in m.figures])}"
        wrong = [m for m in timed if name in m.wrong]
        if wrong:
            worst = max(max(m.errors[name].values()) for m in wrong)
            yield f"  {'':<{width}}  OFF on {len(wrong)} shapes, by up to {worst:.2g} of the largest element"
    limits = [ratio for m in found if (ratio := limit_ratio(m, suite, bandwidth)) is not None]
    if limits:
        limit = geometric_mean_of_ratios(Spread(ratio, ratio, ratio) for ratio in limits)
        yield f"  {'memory limit':<{width}}  {limit.median:.3g}, from the copy bandwidth; a cache may be faster"
    for name in (*suite.needed, *suite.more):
        reasons = {m.unavailable[name] for m in found if name in m.unavailable}
        if reasons and name not in names:
            yield f"  {name}: not measured: {'; '.join(sorted(reasons))}"


def _network(name: str, found: Sequence[Measurement]) -> str:
    """A whole ResNet-50's layers, where each of its shapes was timed."""
    sums = []
    for n in sorted({m.shape.size[0] for m in found if m.shape.family == "resnet50"}):
        layers = [m for m in found if m.shape.family == "resnet50" and m.shape.size[0] == n]
        default = [m for m in layers if not m.shape.channels_last]
        if sum(m.shape.layers for m in default) == 53:
            total = sum(m.shape.layers * m.timings[name].median for m in default)
            sums.append(f"N={n} {1e3 * total:.3g} ms")
    return f"; ResNet-50's 53 layers: {', '.join(sums)}" if sums else ""


def _costs(figures: Sequence[Figures]) -> str:
    """The figures over some shapes, each as the range of its values."""

    def between(values: list[float]) -> str:
        low, high = (f"{value:.4g}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    words = (
        ("saved_numbers", "numbers saved a channel and group"),
        ("collectives", "collectives"),
        ("kernels", "kernels"),
        ("operations", "operations"),
        ("host_synchronizations", "host synchronizations"),
    )
    parts = []
    for field, word in words:
        values = [value for figure in figures if (value := getattr(figure, field)) is not None]
        if values:
            parts.append(f"{between(values)} {word}")
    return ", ".join(parts) or "no figures"


def _large_mean_lines(measurement: Measurement) -> Iterable[str]:
    limit = tolerances(torch.float32, 1)["output"]
    yield f"errors at mean {LARGE_MEAN:g}, std 1, float32, of the largest element (ours: at most {limit:.1g})"
    for name, errors in measurement.errors.items():
        text = ", ".join(f"{tensor} {error:.1e}" for tensor, error in errors.items())
        yield f"  {name}: {text}{' OFF' if name in measurement.wrong else ''}"


def limit_ratio(measurement: Measurement, suite: Suite, bandwidth: Bandwidth | None) -> float | None:
    """The memory limit's time over that of the suite's baseline; of suites whose baseline is one layer's step."""
    if bandwidth is None or suite.baseline != "nn.BatchNorm" or suite.baseline not in measurement.timings:
        return None
    limit = bandwidth.seconds(measurement.shape, DTYPES[measurement.dtype])
    return limit / measurement.timings[suite.baseline].median


# -- files -------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {
        "syncbn": syncbn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    try:
        found["triton"] = __import__("triton").__version__
    except ImportError:
        found["triton"] = None
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def as_json(
    selection: Selection, results: Results, verdicts: Sequence[Verdict], more: dict[str, Any]
) -> dict[str, Any]:
    """Everything, samples included, as plain data. Times are in seconds, sizes in bytes."""
    bandwidth = results.bandwidth
    return {
        "machine": machine(),
        "selection": asdict(selection),
        "copy_bandwidth": None if bandwidth is None else _plain_bandwidth(bandwidth),
        "table": [_plain_verdict(verdict) for verdict in verdicts],
        "measurements": [_plain_measurement(measurement, bandwidth) for measurement in results.measurements],
        **more,
    }


def _plain_bandwidth(bandwidth: Bandwidth) -> dict[str, Any]:
    return {"bytes_per_second": bandwidth.bytes_per_second._asdict(), "tensor_bytes": bandwidth.tensor_bytes}


def _plain_verdict(verdict: Verdict) -> dict[str, Any]:
    figure = verdict.figure
    return {
        "row": verdict.row.name,
        "limit": verdict.row.limit,
        "at_least": verdict.row.at_least,
        "measured": None if figure is None else figure.value._asdict(),
        "verdict": verdict.word,
        "note": verdict.reason if figure is None else figure.detail,
    }


def _plain_measurement(measurement: Measurement, bandwidth: Bandwidth | None) -> dict[str, Any]:
    shape = measurement.shape
    limit = None if bandwidth is None else bandwidth.seconds(shape, DTYPES[measurement.dtype])
    contenders: dict[str, Any] = {}
    for name, errors in measurement.errors.items():
        timing, figures = measurement.timings.get(name), measurement.figures.get(name)
        contenders[name] = {
            "ours": CONTENDERS[name].ours,
            "errors": errors,
            "within_tolerance": name not in measurement.wrong,
            "seconds": None if timing is None else timing.spread._asdict(),
            "samples": [] if timing is None else list(timing.samples),
            "calls": None if timing is None else timing.calls,
            "figures": None if figures is None else asdict(figures),
        }
    return {
        "suite": measurement.suite,
        "shape": {**asdict(shape), "label": shape.label},
        "dtype": measurement.dtype,
        "memory_limit_seconds": limit,
        "contenders": contenders,
        "unavailable": measurement.unavailable,
    }


def csv_rows(results: Results) -> list[dict[str, Any]]:
    """A row for each shape and contender: ratio to the suite's baseline first."""
    baselines = {suite.name: suite.baseline for suite in SUITES}
    rows = []
    for measurement in results.measurements:
        baseline = baselines.get(measurement.suite, "")
        for name, timing in measurement.timings.items():
            ratio = measurement.ratio(name, baseline) if baseline in measurement.timings else None
            seconds, shape = timing.spread, measurement.shape
            limit = None
            if results.bandwidth is not None:
                limit = results.bandwidth.seconds(shape, DTYPES[measurement.dtype])
            rows.append(
                {
                    "suite": measurement.suite,
                    "family": shape.family,
                    "size": "x".join(map(str, shape.size)),
                    "layers": shape.layers,
                    "channels_last": shape.channels_last,
                    "dtype": measurement.dtype,
                    "contender": name,
                    "baseline": baseline,
                    "ratio": None if ratio is None else ratio.median,
                    "ratio_low": None if ratio is None else ratio.low,
                    "ratio_high": None if ratio is None else ratio.high,
                    "seconds": seconds.median,
                    "seconds_low": seconds.low,
                    "seconds_high": seconds.high,
                    "of_copy_bandwidth": None if limit is None else limit / seconds.median,
                    "largest_error": max(measurement.errors[name].values()),
                    **asdict(measurement.figures.get(name, Figures())),
                }
            )
    return rows


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["suite"])
        writer.writeheader()
        writer.writerows(rows)
