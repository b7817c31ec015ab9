"""The report of a run: text, bench.json and CSV files."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch

import syncbn
from syncbn.bench.compiled import COMPILED_SUITES
from syncbn.bench.correctness import NAMES, tolerances
from syncbn.bench.costs import Bandwidth, Costs
from syncbn.bench.growth import LINKS, GrowthRow
from syncbn.bench.problem import DTYPES
from syncbn.bench.rows import BenchResults, JudgedRow
from syncbn.bench.steps import STEP_SUITES
from syncbn.bench.suites import LARGE_MEAN, SUITES, Measurement, Selection, Suite
from syncbn.bench.timing import Spread, geometric_mean_of_ratios
from syncbn.kernels import dispatch as kernels
from syncbn.kernels.cpu.library import wanted

WIDTH = 100
ALL_SUITES = (*SUITES, *STEP_SUITES, *COMPILED_SUITES)


def heading(results: BenchResults) -> str:
    """The processor or GPU, the instruction set, and the versions, in one line."""
    found = results.machine
    return f"{found['processor']}, {found['instructions']}, torch {found['torch']}, syncbn {found['syncbn']}"


def summary(results: BenchResults) -> list[str]:
    """Lines of text: for each suite and dtype the contenders' ratios and costs; then errors and bandwidth."""
    lines: list[str] = []
    for suite in ALL_SUITES:
        for dtype in DTYPES:
            found = [m for m in results.measurements if m.suite == suite.name and m.dtype == dtype]
            for together in [[m] for m in found] if suite.separate else [found] if found else []:
                lines += [*_suite_lines(suite, dtype, together, results.bandwidth), ""]
    for measurement in results.measurements:
        if measurement.suite == "large mean":
            lines += [*_large_mean_lines(measurement), ""]
    if results.step_checks:
        lines.append("training steps that must be equal, in float64: largest difference of loss and gradients")
        lines += [*(f"  {what}: {difference:.1e}" for what, difference in results.step_checks.items()), ""]
    if results.bandwidth is not None:
        spread = Spread(*(value / 1e9 for value in results.bandwidth.bytes_per_second))
        lines.append(f"copy bandwidth of this machine, bytes read plus bytes written: {spread} GB/s")
    return lines


def _suite_lines(suite: Suite, dtype: str, found: Sequence[Measurement], bandwidth: Bandwidth | None) -> Iterable[str]:
    yield f"{suite.title}: {found[0].shape.label if suite.separate else f'{len(found)} shapes'}, {dtype}"
    mean = "median (quartiles), time" if suite.separate else "geometric mean (quartiles), lowest to highest median"
    yield f"  time / {suite.baseline}: {mean}"
    for name in (*suite.needed, *suite.more):
        timed = [m for m in found if name in m.timings and suite.baseline in m.timings]
        if timed:
            yield from _contender_lines(name, suite.baseline, timed, len(found))
        elif reasons := {m.unavailable[name] for m in found if name in m.unavailable}:
            yield from _wrapped(f"{name}: not measured: {'; '.join(sorted(reasons))}", 2)
    if bandwidth is not None and suite.baseline == "nn.BatchNorm":
        times = [(m, m.timings[suite.baseline].median) for m in found if suite.baseline in m.timings]
        if times:
            limit = statistics.geometric_mean(m.memory_limit(bandwidth) / seconds for m, seconds in times)
            yield f"  {'memory limit':<33} {limit:.3g} from the copy bandwidth; cached data can be faster"


def _contender_lines(name: str, baseline: str, timed: Sequence[Measurement], shapes: int) -> Iterable[str]:
    ratios = [m.ratio(name, baseline) for m in timed]
    medians = [ratio.median for ratio in ratios]
    few = f", {len(timed)} of the shapes" if len(timed) < shapes else ""
    between = f"{min(medians):.2f} to {max(medians):.2f}{few}"
    if shapes == 1:
        between = f"{1e3 * timed[0].timings[name].median:.3g} ms"
    yield f"  {name:<33} {geometric_mean_of_ratios(ratios)!s:<22} {between}"
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
    return ", ".join(parts)


def _large_mean_lines(measurement: Measurement) -> Iterable[str]:
    limit = tolerances(torch.float32, 1)["output"]
    yield f"errors at mean {LARGE_MEAN:g}, std 1, float32, of the largest element (ours: at most {limit:.1g})"
    yield f"  {'':<33}" + "".join(f" {name.replace('grad_', 'd_'):>10}" for name in NAMES)
    for name, errors in measurement.errors.items():
        numbers = "".join(f" {error:>10.1e}" for error in errors.values())
        yield f"  {name:<33}{numbers}{' OFF' if name in measurement.wrong else ''}"


def write_files(
    out: Path,
    selection: Selection,
    runs: Sequence[tuple[BenchResults, Sequence[JudgedRow]]],
    growth: Sequence[GrowthRow],
) -> None:
    """Write bench.json with everything, bench.csv with a row per time, and growth.csv."""
    content = {
        "selection": selection,
        "runs": [_run_content(results, judged) for results, judged in runs],
        "growth": {"links": LINKS, "rows": growth},
    }
    (out / "bench.json").write_text(json.dumps(_plain(content), indent=1) + "\n")
    _write_csv(out / "bench.csv", [row for results, _ in runs for row in csv_rows(results)])
    _write_csv(out / "growth.csv", [row._asdict() for row in growth])


def _run_content(results: BenchResults, judged: Sequence[JudgedRow]) -> dict[str, Any]:
    """A run with one instruction set."""
    return {
        "machine": results.machine,
        "copy_bandwidth": results.bandwidth,
        "table": [
            {"row": j.row.name, "bound": j.row.bound, "measured": j.value, "verdict": j.word, "note": j.note}
            for j in judged
        ],
        "measurements": [_plain(m) | {"label": m.shape.label, "wrong": m.wrong} for m in results.measurements],
        "step_checks": results.step_checks,
    }


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, and other tuples as lists, for JSON."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def machine(device: str) -> dict[str, Any]:
    """What the measurements depend on: versions, processor, instruction set, GPU."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    with open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), None)
    return {
        "syncbn": syncbn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": gpu.name if gpu is not None and device == "cuda" else cpu or platform.machine(),
        "instructions": _instructions() if device == "cpu" else "CUDA",
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu and gpu.name,
        "gpu_bytes": gpu and gpu.total_memory,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
    }


def _instructions() -> str:
    """The instruction set of this package's kernels on the CPU, and torch's if it is another one."""
    ours = wanted() if kernels.cpu() is not kernels.REFERENCE else "no compiled kernels"
    torchs = torch.backends.cpu.get_cpu_capability().lower()
    return ours if ours == torchs else f"{ours} (torch: {torchs})"


def csv_rows(results: BenchResults) -> Iterator[dict[str, Any]]:
    """A row for each shape, dtype and contender."""
    baselines = {suite.name: suite.baseline for suite in ALL_SUITES}
    unknown = Spread(math.nan, math.nan, math.nan)
    for m in results.measurements:
        baseline = baselines.get(m.suite, "")
        limit = m.memory_limit(results.bandwidth) if results.bandwidth is not None and m.costs else None
        for name, timing in m.timings.items():
            yield {
                **{name: results.machine.get(name) for name in ("processor", "instructions", "torch")},
                "suite": m.suite,
                "family": m.shape.family,
                "size": "x".join(map(str, m.shape.size)),
                "layers": m.shape.layers,
                "channels_last": m.shape.channels_last,
                "dtype": m.dtype,
                "contender": name,
                "baseline": baseline,
                **_columns("ratio", m.ratio(name, baseline) if baseline in m.timings else unknown),
                **_columns("seconds", timing.spread),
                "of_copy_bandwidth": limit and limit / timing.median,
                "largest_error": max(m.errors[name].values()) if m.errors else None,
                **vars(m.costs.get(name, Costs())),
            }


def _columns(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
