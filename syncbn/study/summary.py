"""A study's results in rows and in words: what the table shows, and the answer in a sentence or two."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from syncbn.study.plan import Cell, Study
from syncbn.study.statistics import agreement, recovered, summarize

if TYPE_CHECKING:
    from syncbn.train.result import RunResult

SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm over all seeds. Errors are fractions of the test images; NaN where nothing defines a figure."""

    name: str
    label: str
    reference: bool
    normalization_batch_size: int | None
    """Samples that share statistics; None without batch statistics."""
    results: tuple[RunResult | None, ...]
    """In the order of the study's seeds; None where a run has no result."""
    errors: tuple[float, ...]
    """Test errors in the same order; NaN for a run that diverged or has no result."""
    mean: float
    sd: float
    low: float
    high: float
    finished: int
    diverged: int
    missing: int
    images_per_second: float
    """Mean over the runs."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The study's answer, as far as its numbers carry it."""

    headline: str
    """Which arm is worst, and by how much."""
    remedies: str
    """What the other arms give back; may be empty."""
    caveat: str
    """What the numbers rest on, and what they do not show."""


def summary_rows(study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult]) -> list[Row]:
    """One row an arm, the worst first and the reference last; ``results`` by the cells' keys."""
    by_place = {(cell.arm, cell.seed): cell for cell in cells}
    found = [[results.get(by_place[arm.name, seed].key) for arm in study.arms] for seed in study.seeds]
    errors = np.array([[_error(result) for result in line] for line in found])
    figures = summarize(errors, [[result is not None for result in line] for line in found])
    rows = []
    for column, arm in enumerate(study.arms):
        runs = tuple(line[column] for line in found)
        speeds = [run.images_per_second for run in runs if run is not None]
        rows.append(
            Row(
                name=arm.name,
                label=arm.label,
                reference=arm.reference,
                normalization_batch_size=by_place[arm.name, study.seeds[0]].config.normalization_batch_size,
                results=runs,
                errors=tuple(float(error) for error in errors[:, column]),
                mean=float(figures.mean[column]),
                sd=float(figures.sd[column]),
                low=float(figures.low[column]),
                high=float(figures.high[column]),
                finished=int(figures.finished[column]),
                diverged=int(figures.diverged[column]),
                missing=int(figures.missing[column]),
                images_per_second=sum(speeds) / len(speeds) if speeds else math.nan,
            )
        )
    return sorted(rows, key=lambda row: (row.reference, -_badness(row)))


def answer(rows: Sequence[Row]) -> Answer:
    """The answer to a study's question from its rows, in the order of :func:`summary_rows`."""
    reference = next((row for row in rows if row.reference), None)
    others = [row for row in rows if not row.reference and row.finished + row.diverged > 0]
    caveat = _caveat(rows)
    if not others:
        return Answer(headline="No run has a result yet.", remedies="", caveat=caveat)
    worst, rest = others[0], others[1:]
    if reference is not None and reference.finished and worst.finished and worst.mean <= reference.mean:
        headline = f"No arm did worse than the reference, {reference.label} ({percent(reference.mean)} test error)."
        return Answer(headline=headline, remedies=_listed(others), caveat=caveat)
    if worst.finished == 0:
        headline = f"{worst.label} is the worst arm: all of its runs diverged ({worst.diverged} of {worst.diverged})."
        against = [reference] if reference is not None else []
        return Answer(headline=headline, remedies=_listed([*rest, *against]), caveat=caveat)
    headline = f"{worst.label} is the worst arm: {percent(worst.mean)} test error"
    if reference is None or reference.finished == 0:
        return Answer(headline=f"{headline}.", remedies=_listed(rest), caveat=caveat)
    headline += f", against {percent(reference.mean)} for the reference, {reference.label}."
    if worst.low <= reference.high:
        remedies = "Its seeds overlap the reference's: these runs show no cost that a remedy could give back."
        return Answer(headline=headline, remedies=remedies, caveat=caveat)
    return Answer(headline=headline, remedies=_remedies(worst, rest, reference), caveat=caveat)


def repeat_words(
    emulated: RunResult | None, repeated: RunResult | None, label: str, processes: int, message: str = ""
) -> str:
    """What the repeat of one cell under real processes shows about the emulation of logical GPUs.

    Args:
        emulated: the cell's result in one process, if there is one.
        repeated: its result under ``processes`` processes, if there is one.
        label: the arm and the seed, in words.
        processes: real processes of the repeat.
        message: why the repeat failed, if it did.
    """
    if emulated is None or repeated is None:
        why = f": {message}" if message else ""
        return f"{label} was to be repeated under {processes} real processes; there is nothing to compare{why}."
    words = f"{label} was run in one process and again under {processes} real processes. "
    if emulated.losses and repeated.losses:
        found = agreement(emulated.losses, repeated.losses)
        words += (
            f"The training losses differ by {_small(found.first)} at the first step and by at most "
            f"{_small(found.largest)}, at step {found.largest_step} of {min(found.steps)} "
            f"(by {_small(found.mean)} on average; {_within(found.steps_within, min(found.steps), found.tolerance)}). "
        )
    ends = [
        percent(result.test_error) if result.test_error is not None and result.status == "ok" else "divergence"
        for result in (emulated, repeated)
    ]
    words += f"They end at {ends[0]} and {ends[1]} test error."
    precision = emulated.config.get("precision")
    if precision in ("fp32", "bf16", "fp16"):
        words += (
            f" Both do the same sums in another order, so in {precision} rounding differences appear, and training"
            " amplifies them; the command syncbn parity makes the exact comparison, in fp64."
        )
    return words


def write_csv(study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult], path: Path) -> None:
    """One line a cell, also for those without a result: its place, status and figures (errors as fractions)."""
    figures = ("test_error", "test_loss", "steps", "samples", "seconds", "images_per_second", "parameters", "processes")
    labels = {arm.name: arm.label for arm in study.arms}
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # two study runs may end at once
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "label", "seed", "normalization_batch_size", "key", "status", *figures])
        for cell in cells:
            result = results.get(cell.key)
            place = [cell.arm, labels[cell.arm], cell.seed, cell.config.normalization_batch_size, cell.key]
            status = "missing" if result is None else result.status
            writer.writerow([*place, status, *(getattr(result, name, None) for name in figures)])
    draft.replace(path)


def percent(fraction: float) -> str:
    """A fraction as a percentage, with a second digit below one percent; a dash for NaN."""
    return "–" if math.isnan(fraction) else f"{100 * fraction:.{_digits(fraction)}f}{SPACE}%"


def spread(mean: float, sd: float) -> str:
    """Mean and standard deviation, both fractions, as one percentage with the mean's digits: 2.4 ± 0.1 %."""
    if math.isnan(mean) or math.isnan(sd):
        return percent(mean)
    digits = _digits(mean)
    return f"{100 * mean:.{digits}f}{SPACE}±{SPACE}{100 * sd:.{digits}f}{SPACE}%"


def _digits(fraction: float) -> int:
    return 2 if 0 < fraction < 0.00995 else 1


def _error(result: RunResult | None) -> float:
    if result is None or result.status == "diverged" or result.test_error is None:
        return math.nan
    return result.test_error


def _badness(row: Row) -> float:
    """Sorts arms: without any result last, then by mean error, and divergence throughout above all."""
    if row.finished == 0:
        return 2.0 if row.diverged else -1.0
    return row.mean


def _remedies(worst: Row, rest: Sequence[Row], reference: Row) -> str:
    gap = 100 * (worst.mean - reference.mean)
    words = []
    for row in reversed([row for row in rest if row.finished]):
        share = recovered(row.mean, worst.mean, reference.mean)
        inside = ", its seeds overlap the reference's" if row.low <= reference.high and row.finished > 1 else ""
        words.append(f"{row.label} gives back {_share(share)} ({percent(row.mean)} error{inside})")
    lost = [f"{row.label} diverged throughout" for row in rest if not row.finished]
    if not words and not lost:
        return ""
    return f"Of that gap of {gap:.1f} points, {_join(words + lost)}."


def _share(share: float) -> str:
    if share >= 1:
        return "all"
    # 99.7 % is not all of it.
    return f"{100 * share:.{1 if 0.99 <= share < 0.9995 else 0}f}{SPACE}%" if share < 0.9995 else "nearly all"


def _listed(rows: Sequence[Row]) -> str:
    words = [f"{row.label} {'diverged' if not row.finished else percent(row.mean)}" for row in rows]
    return f"The others: {_join(words)}." if words else ""


def _caveat(rows: Sequence[Row]) -> str:
    runs = max((len(row.results) for row in rows), default=0)
    words = [f"Means over {runs} seeds, paired across the arms." if runs > 1 else "One seed: its spread is unknown."]
    words += [
        f"{row.label}: {row.diverged} of {row.diverged + row.finished} runs diverged, its mean is over the others."
        for row in rows
        if row.diverged and row.finished
    ]
    missing = sum(row.missing for row in rows)
    if missing:
        words.append(f"Incomplete: {missing} of {runs * len(rows)} runs have no result.")
    words.append("This describes these runs; no test of significance was made, and none is claimed.")
    return " ".join(words)


def _within(steps: int, of: int, tolerance: float) -> str:
    if steps == of:
        return f"never above {tolerance:g}"
    return f"the first {steps} steps agree within {tolerance:g}" if steps else f"above {tolerance:g} from the start"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else ""
