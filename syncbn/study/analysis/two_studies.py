"""Two studies beside each other: each arm at each place that both have. Neither planned this, so nothing is claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from syncbn.study.analysis import statistics
from syncbn.study.analysis.statistics import Effect
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.train.config import require
from syncbn.train.result import RunResult


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm at one place in both studies."""

    first: Setting
    second: Setting
    test: Literal["paired", "Welch", "same", "none"]
    """``same``: the same runs, so there is nothing to test. ``none``: a run diverged, or there are too few seeds."""
    seeds: tuple[int, int]
    """Runs of either study that the difference is of; for pairs, their number twice."""
    level: bool = False
    """Whether its runs are the same at several places: it does not depend on an axis."""
    effect: Effect
    """First minus second, in the metric's own unit. p is corrected over all rows; NaN without a test."""


def rows_of(first: Summary, second: Summary) -> list[Row]:
    """The settings that both studies have, in the order of the first.

    With at least three seeds in common, which share initial weights and the order of the data, the test is the one of
    a study's contrasts, over these seeds. Else it is Welch's, over all seeds of either. Holm's correction is over the
    rows but those whose runs are the same in both studies. Places with the same runs are one row.

    Raises:
        ConfigError: the studies have different metrics.
    """
    expected = f"{first.metric}, as the other study has it"
    require(first.metric == second.metric, "metric", second.metric, expected)
    others = {(arm, frozenset(point)): setting for (arm, point), setting in second.settings.items()}
    found: dict[tuple[object, ...], Row] = {}
    for (arm, point), setting in first.settings.items():
        if other := others.get((arm, frozenset(point))):
            runs = (arm, setting.keys, other.keys)
            found[runs] = replace(found[runs], level=True) if runs in found else _row(setting, other, first, second)
    rows = list(found.values())
    family = [i for i, row in enumerate(rows) if row.test != "same"]
    corrected = statistics.holm(np.array([rows[i].effect.p for i in family]))
    for i, p in zip(family, corrected, strict=True):
        rows[i] = replace(rows[i], effect=rows[i].effect._replace(p=float(p)))
    return rows


def _row(one: Setting, other: Setting, first: Summary, second: Summary) -> Row:
    scores = [_by_seed(one, first), _by_seed(other, second)]
    common = [seed for seed in scores[0] if seed in scores[1]]
    enough = min(map(len, scores)) >= statistics.MIN_SEEDS
    test: Literal["paired", "Welch", "same", "none"] = "none"
    if _same(one, other):
        test = "same"
    elif not one.diverged and not other.diverged and enough:
        test = "paired" if len(common) >= statistics.MIN_SEEDS else "Welch"
    if test in ("paired", "same"):
        scores = [{seed: values[seed] for seed in common} for values in scores]
    a, b = (np.array(list(values.values()), dtype=np.float64) for values in scores)
    resolution = _resolution(first, [*one.runs, *other.runs])
    if test == "Welch":
        effect = statistics.welch(a, b, resolution)
    elif test == "paired":
        sign = first.metric.sign  # the test takes the lower score for the better one
        p = float(statistics.difference_p(sign * a, sign * b, resolution))
        effect = Effect(*statistics.interval(a - b), p)
    else:
        # What diverged has no part in a mean, so a difference of what is left would favour its setting.
        known = not one.diverged and not other.diverged and len(a) and len(b)
        effect = Effect(float(a.mean() - b.mean()) if known else math.nan, math.nan, math.nan, math.nan)
    return Row(first=one, second=other, test=test, seeds=(len(a), len(b)), effect=effect)


def _same(one: Setting, other: Setting) -> bool:
    """Whether the runs of the seeds that both have are the same computations, and had the same results.

    A key stands for a configuration: another version of the user's code may give it other results.
    """
    runs = [{run.config["seed"]: (key, run) for key, run in _keyed(setting)} for setting in (one, other)]
    pairs = [(runs[0][seed], runs[1][seed]) for seed in runs[0] if seed in runs[1]]
    if not pairs or (len(pairs) < statistics.MIN_SEEDS and max(map(len, runs)) > len(pairs)):
        return False
    return all(a[0] == b[0] and (a[1].test, a[1].losses) == (b[1].test, b[1].losses) for a, b in pairs)


def _keyed(setting: Setting) -> list[tuple[str, RunResult]]:
    return [(key, run) for key, run in zip(setting.keys, setting.results, strict=True) if run is not None]


def _by_seed(setting: Setting, summary: Summary) -> dict[int, float]:
    """The scores of the runs that finished."""
    pairs = zip(summary.study.seeds, setting.scores, strict=True)
    return {seed: score for seed, score in pairs if not math.isnan(score)}


def _resolution(summary: Summary, runs: Sequence[RunResult]) -> float:
    samples = max((run.test_samples or 0 for run in runs), default=0)
    return 1 / samples if samples and summary.metric.of_samples else 0.0
