"""The comparisons that a study planned: each arm against the reference, at one place on the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from syncbn.study.plan import Point
from syncbn.study.statistics import Comparison, compare, seeds_needed
from syncbn.study.summary import Setting, Summary
from syncbn.study.words import SPACE, p_value, percent, plural, points, points_between

CONFIDENCE, ALPHA = 0.95, 0.05


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One planned comparison: the setting and what came of it."""

    setting: Setting
    found: Comparison


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """All planned comparisons of a study."""

    point: Point
    """Where arms are compared."""
    settings: Sequence[Setting]
    """All arms that are run there, compared or not, in the study's order."""
    reference: Setting | None
    """None where the study names no reference."""
    lines: Sequence[Compared]
    """The lowest difference first; what has none comes last."""
    needed: int
    """Seeds from which on a difference could be shown."""

    def having(self, *verdicts: str) -> list[Compared]:
        """The comparisons that ended in one of these verdicts, in their order."""
        return [line for line in self.lines if line.found.verdict in verdicts]


@dataclass(frozen=True, kw_only=True)
class ComparisonLine:
    """One comparison, as the table shows it."""

    arm: str
    label: str
    error: str
    difference: str
    interval: str
    p: str
    p_corrected: str
    verdict: str


def comparisons_of(summary: Summary) -> Comparisons:
    """Run the planned comparisons; the generator's seed is fixed, so a page says the same whenever it is written."""
    study = summary.study
    point = study.comparison_point()
    settings = summary.at(point)
    reference = next((setting for setting in settings if setting.reference), None)
    chosen = study.compare.arms
    columns = [i for i, s in enumerate(settings) if not s.reference and (chosen is None or s.arm in chosen)]
    if reference is None or not columns:
        return Comparisons(point=point, settings=settings, reference=reference, lines=[], needed=0)
    to = settings.index(reference)
    scores = np.array([setting.errors for setting in settings], dtype=np.float64).T
    ran = np.array([[result is not None for result in setting.results] for setting in settings]).T
    pairs = [(column, to) for column in columns]
    found = compare(scores, ran, pairs, confidence=CONFIDENCE, alpha=ALPHA, rng=np.random.default_rng(0))
    lines = [Compared(setting=settings[comparison.setting], found=comparison) for comparison in found]
    return Comparisons(
        point=point,
        settings=settings,
        reference=reference,
        lines=sorted(lines, key=lambda line: (_last(line.found.difference), _last(line.setting.error.mean))),
        needed=seeds_needed(len(lines), ALPHA),
    )


def comparison_lines(comparisons: Comparisons) -> list[ComparisonLine]:
    """The planned comparisons in words, the reference's own error first."""
    return [
        ComparisonLine(
            arm=line.setting.arm,
            label=line.setting.label,
            error=percent(line.setting.error.mean),
            difference=points(line.found.difference, signed=True),
            interval=points_between(line.found.low, line.found.high, line.found.difference),
            p=p_value(line.found.p),
            p_corrected=p_value(line.found.p_corrected),
            verdict=verdict_words(line.found),
        )
        for line in comparisons.lines
    ]


def verdict_words(found: Comparison) -> str:
    """The verdict of a comparison, for those who have not read what the names mean."""
    if found.verdict in ("lower", "higher"):
        return f"{found.verdict} error"
    if found.verdict == "not enough seeds":
        return f"no claim: {plural(found.pairs, 'seed')}, needs {found.seeds_needed}"
    if found.verdict == "missing":
        return f"no claim: {plural(found.pairs, 'pair')} of runs finished"
    if found.verdict == "not shown":
        return "not shown"
    arm, reference = found.diverged
    if not arm:
        return f"no claim: the reference diverged in {plural(reference, 'run')}"
    return f"no claim: diverged in {plural(arm, 'run')}"


def interval_words(found: Comparison) -> str:
    """ "95 % interval −12.9 to −11.9"; empty where there is none."""
    if math.isnan(found.low):
        return ""
    return f"95{SPACE}% interval {points_between(found.low, found.high, found.difference)}"


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value
