"""The comparisons that a study planned: each arm against the reference, at one place on the axes.

Nothing is claimed of an arm before all planned runs of it and of the reference have a result: to look at the tests
while runs come in, and to stop when one is passed, finds differences by chance more often than the tests say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from syncbn.study.analysis.statistics import Comparison, compare, seeds_needed
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.grid import Point
from syncbn.study.report.words import SPACE, p_value, percent, plural, points, points_between

CONFIDENCE, ALPHA = 0.95, 0.05


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One planned comparison: the setting and what came of it."""

    setting: Setting
    found: Comparison
    verdict: str
    """That of ``found``; or ``interim`` where planned runs that could decide it have no result yet."""
    planned: int
    """Seeds that the study plans."""
    mean: float
    """The arm's mean error over the seeds of the difference; over all that finished where there is none."""
    reference_mean: float
    """The reference's over the same."""

    @property
    def partly(self) -> bool:
        """Whether the difference is over fewer seeds than are planned."""
        return not math.isnan(self.found.difference) and self.found.pairs < self.planned

    @property
    def at_odds(self) -> bool:
        """Whether a difference is shown by the test while its t interval contains 0."""
        return self.verdict in ("lower", "higher") and self.found.low <= 0 <= self.found.high


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
        return [line for line in self.lines if line.verdict in verdicts]


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
    chosen = {contrast.first.arm for contrast in study.contrasts}
    columns = [i for i, s in enumerate(settings) if not s.reference and s.arm in chosen]
    if reference is None or not columns:
        return Comparisons(point=point, settings=settings, reference=reference, lines=[], needed=0)
    to = settings.index(reference)
    needed = seeds_needed(len(columns), ALPHA)
    lines = [
        _compared(settings[comparison.setting], reference, comparison, needed)
        for comparison in _tested(settings, columns, to)
    ]
    return Comparisons(
        point=point,
        settings=settings,
        reference=reference,
        lines=sorted(lines, key=lambda line: (_last(line.found.difference), _last(line.mean))),
        needed=needed,
    )


def _tested(settings: Sequence[Setting], columns: Sequence[int], to: int) -> list[Comparison]:
    """The comparisons of these columns of settings with that of the reference.

    The p of an arm with missing runs is not known yet. In Holm's correction of the others it counts as the largest, so
    that whatever it becomes cannot take a claim back.
    """
    scores = np.array([setting.errors for setting in settings], dtype=np.float64).T
    ran = np.array([[result is not None for result in setting.results] for setting in settings]).T
    pairs = [(column, to) for column in columns]

    def test(done: NDArray[np.bool_]) -> list[Comparison]:
        return compare(scores, done, pairs, confidence=CONFIDENCE, alpha=ALPHA, rng=np.random.default_rng(0))

    whole = np.array([not setting.missing for setting in settings])
    if not whole[to] or whole[columns].all():
        return test(ran)
    return [
        final if whole[final.setting] else described
        for final, described in zip(test(ran & whole), test(ran), strict=True)
    ]


def _compared(setting: Setting, reference: Setting, found: Comparison, needed: int) -> Compared:
    planned = len(setting.errors)
    tested = found.verdict in ("lower", "higher", "not shown", "not enough seeds")
    interim = tested and bool(setting.missing or reference.missing) and planned >= needed
    if interim:
        found = replace(found, p=math.nan, p_corrected=math.nan)
    both = np.array([setting.errors, reference.errors], dtype=np.float64)
    both = both[:, ~np.isnan(both).any(axis=0)]
    alike = tested and both.size > 0
    return Compared(
        setting=setting,
        found=found,
        verdict="interim" if interim else found.verdict,
        planned=planned,
        mean=float(both[0].mean()) if alike else setting.error.mean,
        reference_mean=float(both[1].mean()) if alike else reference.error.mean,
    )


def comparison_lines(comparisons: Comparisons) -> list[ComparisonLine]:
    """The planned comparisons in words, the reference's own error first."""
    return [
        ComparisonLine(
            arm=line.setting.arm,
            label=line.setting.label,
            error=percent(line.mean),
            difference=points(line.found.difference, signed=True),
            interval=points_between(line.found.low, line.found.high, line.found.difference),
            p=p_value(line.found.p),
            p_corrected=p_value(line.found.p_corrected),
            verdict=verdict_words(line),
        )
        for line in comparisons.lines
    ]


def verdict_words(line: Compared) -> str:
    """The verdict of a comparison, for those who have not read what the names mean."""
    found = line.found
    over = f"; the reference's mean over these seeds is {percent(line.reference_mean)}" if line.partly else ""
    if line.verdict in ("lower", "higher"):
        why = ": shown by the sign-flip test of the mean difference; Student's t, another method, leaves 0 possible"
        return f"{line.verdict} error{why if line.at_odds else ''}"
    if line.verdict == "interim":
        return f"interim, no claim: {found.pairs} of {line.planned} pairs of runs{over}"
    if line.verdict == "not enough seeds":
        return f"no claim: {plural(found.pairs, 'seed')}, needs {found.seeds_needed}{over}"
    if line.verdict == "missing":
        return f"no claim: {plural(found.pairs, 'pair')} of runs finished"
    if line.verdict == "not shown":
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
