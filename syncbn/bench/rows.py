"""The table: what must hold, what was measured, and the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from syncbn.bench.bandwidth import Bandwidth
from syncbn.bench.peers import CONTENDERS
from syncbn.bench.shapes import DTYPES
from syncbn.bench.suites import Measurement
from syncbn.bench.timing import Spread, geometric_mean_of_ratios, spread


class NotMeasuredError(Exception):
    """A row that this run or this machine cannot measure, with the reason."""


@dataclass
class Results:
    """All that a run of the bench has measured."""

    device: str
    measurements: list[Measurement] = field(default_factory=list)
    bandwidth: Bandwidth | None = None
    emulation: Spread | None = None
    """Time of a step of 8 emulated GPUs on one process over the same step on 4 processes."""


@dataclass(frozen=True)
class Figure:
    value: Spread
    detail: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    limit: float
    measure: Callable[[Results], Figure]
    """Raises NotMeasuredError."""
    device: str | None = None
    """Where it can be measured; None is anywhere."""
    at_least: bool = False


@dataclass(frozen=True)
class Verdict:
    row: Row
    figure: Figure | None
    reason: str = ""
    """Why there is no figure."""

    @property
    def falls_short(self) -> bool:
        if self.figure is None:
            return False
        median, limit = self.figure.value.median, self.row.limit
        return not (median >= limit if self.row.at_least else median <= limit)

    @property
    def word(self) -> str:
        if self.figure is None:
            return "not measured"
        return "falls short" if self.falls_short else "ok"


def judge(rows: Sequence[Row], results: Results) -> list[Verdict]:
    """Each row's figure against its limit; a row about another device is not measured."""
    verdicts = []
    for row in rows:
        try:
            if row.device not in (None, results.device):
                raise NotMeasuredError(f"needs --device {row.device}")
            verdicts.append(Verdict(row, row.measure(results)))
        except NotMeasuredError as error:
            verdicts.append(Verdict(row, None, str(error)))
    return verdicts


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Lines of text: the figure with its quartiles, the limit, the verdict, and what is to be known about it."""
    lines = []
    width = max(len(verdict.row.name) for verdict in verdicts)
    for verdict in verdicts:
        row, figure = verdict.row, verdict.figure
        measured = "-" if figure is None else str(figure.value)
        bound = f"{'at least' if row.at_least else 'at most'} {row.limit:g}"
        note = verdict.reason if figure is None else figure.detail
        lines.append(f"{row.name:<{width}}  {measured:<22} {bound:<14} {verdict.word}{f': {note}' if note else ''}")
    return lines


# -- how the rows are measured -----------------------------------------------------------------------------------------


def _measured(results: Results, suite: str, names: Sequence[str], dtypes: Sequence[str]) -> list[Measurement]:
    found = [
        measurement
        for measurement in results.measurements
        if measurement.suite == suite and measurement.dtype in dtypes and all(n in measurement.timings for n in names)
    ]
    if not found:
        reasons = {
            measurement.unavailable[name]
            for measurement in results.measurements
            if measurement.suite == suite
            for name in names
            if name in measurement.unavailable
        }
        raise NotMeasuredError("; ".join(sorted(reasons)) or f"no shape of '{suite}' was timed in {', '.join(dtypes)}")
    missing = [dtype for dtype in dtypes if dtype not in {measurement.dtype for measurement in found}]
    if missing:
        raise NotMeasuredError(f"needs --dtype {','.join(dtypes)}, without {', '.join(missing)} here")
    return found


def quotient(
    suite: str,
    numerator: str,
    denominator: str,
    dtypes: Sequence[str] = ("float32",),
    families: Sequence[str] | None = None,
) -> Callable[[Results], Figure]:
    """Geometric mean over a suite's shapes of the median ratio of two contenders' times."""

    def measure(results: Results) -> Figure:
        found = _measured(results, suite, (numerator, denominator), dtypes)
        if families is not None:
            found = [measurement for measurement in found if measurement.shape.family in families]
        if not found:
            raise NotMeasuredError(f"no shape of {', '.join(families or ())} was timed")
        ratios = [measurement.ratio(numerator, denominator) for measurement in found]
        worst = max(range(len(found)), key=lambda index: ratios[index].median)
        detail = f"{len(found)} shapes, at worst {ratios[worst].median:.2f} ({found[worst].shape.label})"
        return Figure(geometric_mean_of_ratios(ratios), detail)

    return measure


def saved(results: Results) -> Figure:
    """Most float32 numbers that one of our layers keeps for each channel and group, over all shapes."""
    found = [
        (figures.saved_numbers, name, measurement)
        for measurement in results.measurements
        for name, figures in measurement.figures.items()
        if CONTENDERS[name].ours and figures.saved_numbers is not None
    ]
    if not found:
        raise NotMeasuredError("no figure of our layers was taken")
    most, name, measurement = max(found, key=lambda item: item[0])
    values = sorted({round(number, 3) for number, _, _ in found})
    detail = f"from {values[0]:g}; most by {name} on {measurement.shape.label}"
    return Figure(Spread(most, most, most), detail)


def bandwidth(results: Results) -> Figure:
    """Bytes of 8 passes over x in the time of a step, of the bandwidth of a copy; geometric mean over large inputs."""
    found = _measured(results, "large", ("SyncBatchNorm",), ("float32", "bfloat16"))
    if results.bandwidth is None:
        raise NotMeasuredError("the copy bandwidth was not measured")
    parts = []
    for measurement in found:
        limit = results.bandwidth.seconds(measurement.shape, DTYPES[measurement.dtype])
        parts.append(spread(limit / seconds for seconds in measurement.timings["SyncBatchNorm"].samples))
    worst = min(range(len(found)), key=lambda index: parts[index].median)
    detail = f"{len(found)} inputs, at worst {parts[worst].median:.2f} ({found[worst].shape.label})"
    return Figure(geometric_mean_of_ratios(parts), detail)


def emulation(results: Results) -> Figure:
    if results.emulation is None:
        raise NotMeasuredError("left out of this run")
    return Figure(results.emulation, "ResNet-20, 2 images a GPU, geometric mean over three groupings")


_BOTH = ("float32", "bfloat16")

ROWS = (
    Row(
        "CPU: SyncBatchNorm in a group of one / nn.BatchNorm",
        0.85,
        quotient("alone", "SyncBatchNorm", "nn.BatchNorm"),
        "cpu",
    ),
    Row(
        "CPU, 2 processes: SyncBatchNorm / textbook all-reduce",
        0.45,
        quotient("pair", "SyncBatchNorm", "textbook"),
        "cpu",
    ),
    Row(
        "CPU, 2 processes: SyncBatchNorm / textbook compiled",
        1.0,
        quotient("pair", "SyncBatchNorm", "textbook compiled"),
        "cpu",
    ),
    Row("CPU: 32 ghost groups / 1 group", 1.4, quotient("ghost", "GhostBatchNorm", "GhostBatchNorm of 1 group"), "cpu"),
    Row("CPU: 32 ghost groups / loop over chunks", 0.6, quotient("ghost", "GhostBatchNorm", "loop over chunks"), "cpu"),
    Row("CPU: BatchRenorm / nn.BatchNorm", 1.1, quotient("alone", "BatchRenorm", "nn.BatchNorm"), "cpu"),
    Row("saved for backward beyond the input, numbers a channel and group", 8, saved),
    Row("CPU: 8 emulated GPUs in one process / the step on 4 real processes", 0.5, emulation, "cpu"),
    Row(
        "CUDA: SyncBatchNorm alone in its group / torch's SyncBatchNorm function",
        0.7,
        quotient("alone", "SyncBatchNorm", "torch's SyncBatchNorm function", _BOTH, ("resnet50",)),
        "cuda",
    ),
    Row("CUDA: achieved bandwidth over 100 MB, of copy bandwidth", 0.85, bandwidth, "cuda", at_least=True),
    Row(
        "CUDA: fused BN+add+ReLU / torch's three ops",
        0.6,
        quotient("fused", "SyncBatchNorm + add + ReLU", "nn.BatchNorm, add, ReLU", _BOTH),
        "cuda",
    ),
    Row(
        "CUDA: 32 ghost groups / 1 group",
        1.15,
        quotient("ghost", "GhostBatchNorm", "GhostBatchNorm of 1 group", _BOTH),
        "cuda",
    ),
    Row(
        "CUDA: 32 ghost groups / loop over chunks",
        0.2,
        quotient("ghost", "GhostBatchNorm", "loop over chunks", _BOTH),
        "cuda",
    ),
)
"""Every row of what must hold, in its order; a row of two figures is two here."""
