"""The rows of ``syncbn bench --check``: what is measured, its limit, and whether it holds."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from syncbn.bench.costs import Bandwidth
from syncbn.bench.peers import CONTENDERS
from syncbn.bench.suites import Measurement
from syncbn.bench.timing import Spread, geometric_mean_of_ratios, spread

RowValue = tuple[Spread, str]  # what a row measures, and what a reader should know about it


class NotMeasuredError(Exception):
    """This run or this machine cannot measure a row."""


@dataclass
class BenchResults:
    """All measurements of a run of the bench."""

    device: str
    measurements: list[Measurement] = field(default_factory=list)
    bandwidth: Bandwidth | None = None
    step_checks: dict[str, float] = field(default_factory=dict)  # differences of training steps that must be equal
    machine: dict[str, Any] = field(default_factory=dict)  # see :func:`syncbn.bench.report.machine`


@dataclass(frozen=True)
class Row:
    name: str
    limit: float
    measure: Callable[[BenchResults], RowValue]  # raises NotMeasuredError
    device: str | None = None  # the device that it is measured on; None means any
    at_least: bool = False

    @property
    def bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


class JudgedRow(NamedTuple):
    row: Row
    value: Spread | None
    note: str  # what a reader should know about the value, or why there is none

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        median, limit = self.value.median, self.row.limit
        reached = median >= limit if self.row.at_least else median <= limit  # NaN does not reach it
        return "ok" if reached else "falls short"


def judge(rows: Sequence[Row], results: BenchResults) -> list[JudgedRow]:
    """Compare each row's value with its limit. Rows about another device are not measured."""
    judged = []
    for row in rows:
        try:
            if row.device not in (None, results.device):
                raise NotMeasuredError(f"needs --device {row.device}")
            judged.append(JudgedRow(row, *row.measure(results)))
        except NotMeasuredError as error:
            judged.append(JudgedRow(row, None, str(error)))
    return judged


def table(judged: Sequence[JudgedRow]) -> list[str]:
    """Lines of text for each row: its name; below it the value with quartiles, the limit, the verdict and the note."""
    lines = []
    for found in judged:
        value = "-" if found.value is None else str(found.value)
        note = f": {found.note}" if found.note else ""
        lines.append(found.row.name)
        text = f"{value:<22} {found.row.bound:<13} {found.word}{note}"
        lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent=" " * 8)
    return lines


def comparison(columns: Mapping[str, Sequence[JudgedRow]]) -> list[str]:
    """The medians of several tables side by side, one column each, without the rows that none of them measured."""
    lines = [f"{'':<19}" + "".join(f"{name:<20}" for name in columns).rstrip()]
    for same in zip(*columns.values(), strict=True):
        if any(found.value is not None for found in same):
            values = ["-" if f.value is None else f"{f.value.median:.3g} {f.word}" for f in same]
            line = f"    {same[0].row.bound:<15}" + "".join(f"{value:<20}" for value in values)
            lines += [same[0].row.name, line.rstrip()]
    return lines


def _measured(
    results: BenchResults, suite: str, names: Sequence[str], dtypes: Sequence[str], family: str | None = None
) -> list[Measurement]:
    """The measurements of a suite in which all of ``names`` were timed; there are some in each dtype."""
    of_suite = [m for m in results.measurements if m.suite == suite and family in (None, m.shape.family)]
    found = [m for m in of_suite if m.dtype in dtypes and all(name in m.timings for name in names)]
    missing = [dtype for dtype in dtypes if dtype not in {m.dtype for m in found}]
    if missing:
        reasons = {m.unavailable[name] for m in of_suite for name in names if name in m.unavailable and not found}
        none = f"no shape of '{suite}' was timed in {', '.join(missing)}; see --shapes, --dtype and --cpu"
        raise NotMeasuredError("; ".join(sorted(reasons)) or none)
    return found


def _over_shapes(found: Sequence[Measurement], ratios: Sequence[Spread], worst: Callable[..., Any]) -> RowValue:
    """The geometric mean of a ratio over shapes, and the ``worst`` one: ``max`` or ``min``."""
    ratio, measurement = worst(zip(ratios, found, strict=True), key=lambda pair: pair[0].median)
    note = f"{len(found)} shapes, worst {ratio.median:.2f} ({measurement.shape.label})"
    return geometric_mean_of_ratios(ratios), note


def quotient(
    suite: str, numerator: str, denominator: str, dtypes: Sequence[str] = ("float32",), family: str | None = None
) -> Callable[[BenchResults], RowValue]:
    """Geometric mean over a suite's shapes, or those of a family, of the median ratio of two contenders' times."""

    def measure(results: BenchResults) -> RowValue:
        found = _measured(results, suite, (numerator, denominator), dtypes, family)
        return _over_shapes(found, [measurement.ratio(numerator, denominator) for measurement in found], max)

    return measure


def worst(
    suite: str, numerators: Sequence[str], denominator: str, dtypes: Sequence[str] = ("float32",)
) -> Callable[[BenchResults], RowValue]:
    """The largest median ratio to the denominator's time over a suite's shapes and several contenders."""

    def measure(results: BenchResults) -> RowValue:
        found = _measured(results, suite, (*numerators, denominator), dtypes)
        largest = {n: max((m.ratio(n, denominator), m.shape.label) for m in found) for n in numerators}
        note = "; ".join(f"{name} {ratio.median:.2f} ({label})" for name, (ratio, label) in largest.items())
        return max(largest.values())[0], note

    return measure


def saved(results: BenchResults) -> RowValue:
    """Most float32 numbers per channel and group that one of our layers saves for backward, over all shapes."""
    found = [
        (costs.saved_numbers, name, measurement.shape.label)
        for measurement in results.measurements
        for name, costs in measurement.costs.items()
        if CONTENDERS[name].ours and costs.saved_numbers is not None
    ]
    if not found:
        raise NotMeasuredError("saved memory was not measured for any of our layers")
    most, name, label = max(found, key=lambda item: item[0])
    least = min(number for number, _, _ in found)
    return Spread(most, most, most), f"from {least:.4g}; most by {name} on {label}"


def bandwidth(results: BenchResults) -> RowValue:
    """The memory limit's time over that of a step; geometric mean over large inputs."""
    found = _measured(results, "large", ("SyncBatchNorm",), _BOTH)
    if results.bandwidth is None:
        raise NotMeasuredError("the copy bandwidth was not measured")
    ratios = []
    for measurement in found:
        limit = measurement.memory_limit(results.bandwidth)
        ratios.append(spread(limit / seconds for seconds in measurement.timings["SyncBatchNorm"].samples))
    return _over_shapes(found, ratios, min)


_BOTH = ("float32", "bfloat16")
_SYNC, _LOCAL, _RENORM, _TORCH = "SyncBatchNorm", "nn.BatchNorm", "BatchRenorm", "torch's SyncBatchNorm function"
_GHOST, _ONE_GROUP, _LOOP = "GhostBatchNorm", "GhostBatchNorm of 1 group", "loop over chunks"
_HALVES = "GhostBatchNorm of 2 groups"
_VARIANTS = ("sync", "ghost", "renorm")
_ALONE_ON_CUDA = quotient("alone", _SYNC, _TORCH, _BOTH, "resnet50")
_EMULATION = quotient("emulation", "emulated", "real")
_HOST = worst("host", (_SYNC, _RENORM, _HALVES), _LOCAL)
_FUSED, _OPS = "SyncBatchNorm + add + ReLU", "nn.BatchNorm, add, ReLU"

ROWS = (
    Row("CPU: SyncBatchNorm in a group of one / nn.BatchNorm", 0.85, quotient("alone", _SYNC, _LOCAL), "cpu"),
    Row("CPU: BatchRenorm / nn.BatchNorm", 0.95, quotient("alone", _RENORM, _LOCAL), "cpu"),
    Row("CPU: 2 ghost groups / nn.BatchNorm", 0.95, quotient("alone", _HALVES, _LOCAL), "cpu"),
    Row(
        "CPU: SyncBatchNorm in a group of one / nn.BatchNorm, worst shape", 1.3, worst("alone", (_SYNC,), _LOCAL), "cpu"
    ),
    Row("CPU: BatchRenorm / nn.BatchNorm, worst shape", 1.4, worst("alone", (_RENORM,), _LOCAL), "cpu"),
    Row("CPU: 2 ghost groups / nn.BatchNorm, worst shape", 1.4, worst("alone", (_HALVES,), _LOCAL), "cpu"),
    Row("CPU: host time, the slowest of these three / nn.BatchNorm", 1.3, _HOST, "cpu"),
    Row("CPU, 2 processes: SyncBatchNorm / textbook all-reduce", 0.45, quotient("pair", _SYNC, "textbook"), "cpu"),
    Row("CPU, 2 processes: SyncBatchNorm / textbook compiled", 1, quotient("pair", _SYNC, "textbook compiled"), "cpu"),
    Row("CPU: 32 ghost groups / 1 group", 1.4, quotient("ghost", _GHOST, _ONE_GROUP), "cpu"),
    Row("CPU: 32 ghost groups / loop over chunks", 0.6, quotient("ghost", _GHOST, _LOOP), "cpu"),
    Row("saved for backward beyond the input, numbers per channel and group", 8, saved),
    Row("CPU: 8 emulated GPUs in one process / the step on 4 real processes", 0.5, _EMULATION, "cpu"),
    Row("CUDA: SyncBatchNorm alone in its group / torch's SyncBatchNorm function", 0.7, _ALONE_ON_CUDA, "cuda"),
    Row("CUDA: achieved bandwidth over 100 MB / copy bandwidth", 0.85, bandwidth, "cuda", at_least=True),
    Row("CUDA: fused BN+add+ReLU / torch's three ops", 0.6, quotient("fused", _FUSED, _OPS, _BOTH), "cuda"),
    Row("CUDA: 32 ghost groups / 1 group", 1.15, quotient("ghost", _GHOST, _ONE_GROUP, _BOTH), "cuda"),
    Row("CUDA: 32 ghost groups / loop over chunks", 0.2, quotient("ghost", _GHOST, _LOOP, _BOTH), "cuda"),
)

COMPILED_ROWS = (
    Row("CPU: compiled ResNet-18, step / with torch's BatchNorm", 1.05, worst("compiled", _VARIANTS, "local"), "cpu"),
    Row("CPU: compiled ResNet-18, compilation", 1.3, worst("compilation", _VARIANTS, "local"), "cpu"),
)
"""The rows of ``--compile``."""
