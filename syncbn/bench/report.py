"""The report of a run: text, bench.json and CSV files."""

from __future__ import annotations

import csv
import json
import os
import platform
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import syncbn
from syncbn.bench.bandwidth import Bandwidth
from syncbn.bench.correctness import NAMES, tolerances
from syncbn.bench.costs import Costs
from syncbn.bench.growth import LINKS, GrowthRow
from syncbn.bench.peers import CONTENDERS
from syncbn.bench.rows import BenchResults, JudgedRow
from syncbn.bench.shapes import DTYPES
from syncbn.bench.steps import StepResults, StepTime
from syncbn.bench.suites import LARGE_MEAN, SUITES, Measurement, Selection, Suite
from syncbn.bench.timing import Spread, geometric_mean_of_ratios

WIDTH = 100

# -- text --------------------------------------------------------------------------------------------------------------


def summary(results: BenchResults) -> list[str]:
    """Lines of text: for each suite and dtype the contenders' ratios and costs; then errors and bandwidth."""
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
        lines.append(f"copy bandwidth of this machine, bytes read plus bytes written: {spread} GB/s")
    return lines


def _suite_lines(suite: Suite, dtype: str, found: Sequence[Measurement], bandwidth: Bandwidth | None) -> Iterable[str]:
    yield f"{suite.title}, {dtype}, {len(found)} shapes"
    yield f"  time / {suite.baseline}: geometric mean (quartiles), lowest to highest median"
    for name in (*suite.needed, *suite.more):
        timed = [m for m in found if name in m.timings and suite.baseline in m.timings]
        if timed:
            yield from _contender_lines(name, suite.baseline, timed, len(found))
        elif reasons := {m.unavailable[name] for m in found if name in m.unavailable}:
            yield from _wrapped(f"{name}: not measured: {'; '.join(sorted(reasons))}", 2)
    if bandwidth is not None and suite.baseline == "nn.BatchNorm":
        timed = [m for m in found if suite.baseline in m.timings]
        ratios = [_memory_limit(m, bandwidth) / m.timings[suite.baseline].median for m in timed]
        if ratios:
            limit = geometric_mean_of_ratios(Spread(value, value, value) for value in ratios)
            yield f"  {'memory limit':<33} {limit.median:.3g} from the copy bandwidth; cached data can be faster"


def _contender_lines(name: str, baseline: str, timed: Sequence[Measurement], shapes: int) -> Iterable[str]:
    ratios = [m.ratio(name, baseline) for m in timed]
    medians = [ratio.median for ratio in ratios]
    few = f", {len(timed)} of the shapes" if len(timed) < shapes else ""
    between = f"{min(medians):.2f} to {max(medians):.2f}{few}"
    yield f"  {name:<33} {geometric_mean_of_ratios(ratios)!s:<20} {between}"
    yield from _wrapped(_costs([m.costs[name] for m in timed if name in m.costs]), 6)
    if sums := _resnet50_sums(name, timed):
        yield f"      the 53 layers of ResNet-50: {sums}"
    if wrong := [max(m.errors[name].values()) for m in timed if name in m.wrong]:
        yield f"      OFF on {len(wrong)} shapes, by up to {max(wrong):.2g} of the largest element"


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _resnet50_sums(name: str, found: Sequence[Measurement]) -> str:
    """The times of all layers of ResNet-50, for the batch sizes at which each of its shapes was timed."""
    sums = []
    contiguous = [m for m in found if m.shape.family == "resnet50" and not m.shape.channels_last]
    for n in sorted({m.shape.size[0] for m in contiguous}):
        layers = [m for m in contiguous if m.shape.size[0] == n]
        if sum(m.shape.layers for m in layers) == 53:
            total = sum(m.shape.layers * m.timings[name].median for m in layers)
            sums.append(f"{1e3 * total:.3g} ms at N={n}")
    return ", ".join(sums)


def _costs(found: Sequence[Costs]) -> str:
    """The range of each cost over some shapes."""
    words = {
        "saved_numbers": "numbers saved per channel and group",
        "collectives": "collectives",
        "kernels": "kernels",
        "operations": "operations",
        "host_synchronizations": "host synchronizations",
    }
    parts = []
    for field, word in words.items():
        values = [value for costs in found if (value := getattr(costs, field)) is not None]
        if values:
            ends = dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values)))
            parts.append(f"{' to '.join(ends)} {word}")
    return ", ".join(parts) or "costs not measured"


def _large_mean_lines(measurement: Measurement) -> Iterable[str]:
    limit = tolerances(torch.float32, 1)["output"]
    yield f"errors at mean {LARGE_MEAN:g}, std 1, float32, of the largest element (ours: at most {limit:.1g})"
    yield f"  {'':<33}" + "".join(f" {name.replace('grad_', 'd_'):>10}" for name in NAMES)
    for name, errors in measurement.errors.items():
        numbers = "".join(f" {error:>10.1e}" for error in errors.values())
        yield f"  {name:<33}{numbers}{' OFF' if name in measurement.wrong else ''}"


def _memory_limit(measurement: Measurement, bandwidth: Bandwidth) -> float:
    """The least seconds of a step."""
    return bandwidth.seconds(measurement.shape, DTYPES[measurement.dtype])


# -- files -------------------------------------------------------------------------------------------------------------


def write_files(
    out: Path,
    selection: Selection,
    results: BenchResults,
    judged: Sequence[JudgedRow],
    steps: StepResults,
    growth: Sequence[GrowthRow],
) -> None:
    """Write bench.json with everything, and bench.csv, steps.csv and growth.csv with a row per time."""
    content = {
        "machine": machine(),
        "selection": asdict(selection),
        "copy_bandwidth": None if results.bandwidth is None else _plain_bandwidth(results.bandwidth),
        "table": [_plain_row(found) for found in judged],
        "measurements": [_plain_measurement(m, results.bandwidth) for m in results.measurements],
    }
    step_rows = [_step_row(time) for time in steps.times]
    growth_rows = [row._asdict() for row in growth]
    if step_rows:
        content["steps"] = {"times": step_rows, "checks": steps.checks, "skipped": steps.skipped}
    if growth_rows:
        content["growth"] = {"links": [link._asdict() for link in LINKS], "rows": growth_rows}
    (out / "bench.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    for name, rows in (("bench", csv_rows(results)), ("steps", step_rows), ("growth", growth_rows)):
        if rows:
            with (out / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def machine() -> dict[str, Any]:
    """What the measurements depend on: versions, processor, GPU."""
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


def _plain_bandwidth(bandwidth: Bandwidth) -> dict[str, Any]:
    return {"bytes_per_second": bandwidth.bytes_per_second._asdict(), "tensor_bytes": bandwidth.tensor_bytes}


def _plain_row(judged: JudgedRow) -> dict[str, Any]:
    return {
        "row": judged.row.name,
        "limit": judged.row.limit,
        "at_least": judged.row.at_least,
        "measured": None if judged.measured is None else judged.measured.value._asdict(),
        "verdict": judged.word,
        "note": judged.note,
    }


def _plain_measurement(measurement: Measurement, bandwidth: Bandwidth | None) -> dict[str, Any]:
    contenders: dict[str, Any] = {}
    for name, errors in measurement.errors.items():
        timing, costs = measurement.timings.get(name), measurement.costs.get(name)
        contenders[name] = {
            "ours": CONTENDERS[name].ours,
            "errors": errors,
            "within_tolerance": name not in measurement.wrong,
            "seconds": None if timing is None else timing.spread._asdict(),
            "samples": [] if timing is None else list(timing.samples),
            "calls": None if timing is None else timing.calls,
            "costs": None if costs is None else asdict(costs),
        }
    return {
        "suite": measurement.suite,
        "shape": {**asdict(measurement.shape), "label": measurement.shape.label},
        "dtype": measurement.dtype,
        "memory_limit_seconds": None if bandwidth is None else _memory_limit(measurement, bandwidth),
        "contenders": contenders,
        "unavailable": measurement.unavailable,
    }


def csv_rows(results: BenchResults) -> list[dict[str, Any]]:
    """A row for each shape, dtype and contender."""
    baselines = {suite.name: suite.baseline for suite in SUITES}
    rows = []
    for measurement in results.measurements:
        baseline, shape = baselines.get(measurement.suite, ""), measurement.shape
        for name, timing in measurement.timings.items():
            ratio = measurement.ratio(name, baseline) if baseline in measurement.timings else None
            limit = None if results.bandwidth is None else _memory_limit(measurement, results.bandwidth)
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
                    **_columns("ratio", ratio),
                    **_columns("seconds", timing.spread),
                    "of_copy_bandwidth": None if limit is None else limit / timing.median,
                    "largest_error": max(measurement.errors[name].values()),
                    **asdict(measurement.costs.get(name, Costs())),
                }
            )
    return rows


def _step_row(time: StepTime) -> dict[str, Any]:
    row = time._asdict()
    ratio, seconds = row.pop("ratio"), row.pop("seconds")
    return row | _columns("ratio", ratio) | _columns("ms", Spread(*(1e3 * value for value in seconds)))


def _columns(name: str, spread: Spread | None) -> dict[str, float | None]:
    median, low, high = (None, None, None) if spread is None else spread
    return {name: median, f"{name}_low": low, f"{name}_high": high}
