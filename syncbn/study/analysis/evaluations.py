"""What trained models score under each kind of normalization statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.study.analysis.statistics import Centre, centre_of
from syncbn.study.analysis.summary import Setting, Summary, score_of
from syncbn.study.plan.grid import Point
from syncbn.train.result import RunResult


@dataclass(frozen=True, kw_only=True, order=True)
class Kind:
    """A kind of statistics to evaluate with."""

    statistics: str
    estimator: str = ""
    samples: int = 0

    @property
    def column(self) -> str:
        """Name in a CSV file, after that of the metric: ``batch``, ``population_total_1024``."""
        return "_".join(filter(None, [self.statistics, self.estimator, str(self.samples) if self.samples else ""]))

    @property
    def family(self) -> str:
        """What a figure draws as one series: all numbers of samples together."""
        return f"{self.statistics} {self.estimator}".strip()


CLOSE = 1.25
"""Ratio of two numbers of samples up to which they may share a column of a CSV file."""
FAMILIES = {
    "running": "running (EMA)",
    "batch": "the test batch's own",
    "population mean": "population, mean of variances",
    "population total": "population, total variance",
}
"""The kinds that figures tell apart, and their names."""


def kinds_of(results: Sequence[RunResult]) -> list[Kind]:
    """The kinds that occur in these results: running, batch, then the population's by samples."""
    rank = {"running": 0, "batch": 1}
    found = {_kind(entry) for result in results for entry in _entries(result)}
    return sorted(found, key=lambda kind: (rank.get(kind.statistics, 2), kind.samples, kind.estimator))


def evaluated(result: RunResult | None, kind: Kind) -> float:
    """The metric of a run with one kind of statistics, NaN where it was not evaluated so (or diverged)."""
    if result is None or result.status == "diverged":
        return math.nan
    for entry in _entries(result):
        value = (entry.get("test") or {}).get(result.metric.name)
        if _kind(entry) == kind and value is not None:
            return float(value)
    return score_of(result) if kind.statistics == "running" else math.nan


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One setting with batch statistics, under each kind of them."""

    setting: Setting
    scores: dict[Kind, Centre]
    """Without the kinds that no run of it was evaluated with."""

    def largest(self, family: str) -> Kind | None:
        """The kind of a family with the most samples."""
        found = [kind for kind in self.scores if kind.family == family]
        return max(found, key=lambda kind: kind.samples, default=None)


def evaluated_settings(summary: Summary) -> dict[tuple[str, Point], Evaluated]:
    """The settings whose runs were evaluated with more than running statistics."""
    found = {}
    for place, setting in summary.settings.items():
        kinds = kinds_of(setting.runs)
        if all(kind.statistics == "running" for kind in kinds):
            continue
        centres = {kind: centre_of([evaluated(result, kind) for result in setting.results]) for kind in kinds}
        scores = {kind: centre for kind, centre in centres.items() if not math.isnan(centre.mean)}
        if scores:
            found[place] = Evaluated(setting=setting, scores=scores)
    return found


def columns_of(results: Sequence[RunResult]) -> list[tuple[str, list[Kind]]]:
    """The columns of a CSV file, named without the metric, each with the kinds in it.

    How many samples population statistics are of is rounded to whole global batches, so it may differ a little between
    settings that were asked for the same; such kinds share a column, which is named after the least and the most.
    """
    columns: list[list[Kind]] = []
    together = [{kind.samples for kind in map(_kind, _entries(result))} for result in results]
    for kind in kinds_of(results):
        for column in columns:
            alike = (column[0].family == kind.family) and kind.samples <= CLOSE * column[0].samples
            if alike and not any(kind.samples in run and other.samples in run for run in together for other in column):
                column.append(kind)
                break
        else:
            columns.append([kind])
    ends = [f"_to_{column[-1].samples}" if len(column) > 1 else "" for column in columns]
    return [(column[0].column + end, column) for column, end in zip(columns, ends, strict=True)]


def _entries(result: RunResult) -> list[dict[str, Any]]:
    """A run's evaluations. Batch renormalization has none with the test batch's own statistics: it maps them back."""
    renorm = (result.config.get("norm") or {}).get("name") == "renorm"
    return [entry for entry in result.evaluations if not (renorm and entry.get("statistics") == "batch")]


def _kind(entry: Mapping[str, Any]) -> Kind:
    statistics = str(entry.get("statistics"))
    if statistics != "population":
        return Kind(statistics=statistics)
    return Kind(statistics=statistics, estimator=str(entry.get("estimator")), samples=int(entry.get("samples") or 0))
