"""What a handful of seeds says about each setting: pure functions over a (seeds, settings) array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One value a setting, each of shape (settings,), in the unit of the scores.

    The scores of diverged runs have no place in a mean: ``mean``, ``sd``, ``low``, ``high`` and the interval describe
    the finished runs, and ``diverged`` stands beside them. A figure that too few finished runs define is NaN.
    """

    finished: IntArray
    """Runs that ended with a score."""
    diverged: IntArray
    """Runs that ended without one (NaN in the scores)."""
    missing: IntArray
    """Runs that have not ended: not done yet, or failed."""
    mean: FloatArray
    """Arithmetic mean; NaN without a finished run."""
    sd: FloatArray
    """Sample standard deviation (n - 1 in the denominator); NaN below two finished runs."""
    low: FloatArray
    """Smallest score."""
    high: FloatArray
    """Largest score."""
    interval_low: FloatArray
    """Lower end of the t interval of the mean; NaN below two finished runs."""
    interval_high: FloatArray
    """Upper end of the t interval of the mean."""


def summarize(scores: ArrayLike, ran: ArrayLike | None = None, *, confidence: float = 0.95) -> Summary:
    """Describe each setting's scores over seeds.

    Args:
        scores: (seeds, settings), NaN where a run diverged (or where ``ran`` is False).
        ran: (seeds, settings) of bool, False where there is no run yet; all True by default.
        confidence: coverage of the t interval, which takes the seeds' scores as independent and normal.

    Raises:
        ValueError: the arrays are not two-dimensional or of different shapes, a score is infinite, or ``confidence``
            is not between 0 and 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    done = np.ones(values.shape, dtype=bool) if ran is None else np.asarray(ran, dtype=bool)
    if values.ndim != 2 or values.shape != done.shape:
        raise ValueError(f"scores and ran: got shapes {values.shape} and {done.shape}, expected one (seeds, settings)")
    if np.isinf(values).any():
        raise ValueError("scores: got an infinite value, expected finite scores, and NaN for a diverged run")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence!r}, expected a number between 0 and 1")
    columns = [column[ok] for column, ok in zip(values.T, done.T, strict=True)]
    finished = [column[~np.isnan(column)] for column in columns]
    intervals = [t_interval(column, confidence) for column in finished]

    def each(figures: list[float]) -> FloatArray:
        return np.array(figures, dtype=np.float64)

    return Summary(
        finished=np.array([len(column) for column in finished], dtype=np.int64),
        diverged=np.array([int(np.isnan(column).sum()) for column in columns], dtype=np.int64),
        missing=(~done).sum(axis=0).astype(np.int64),
        mean=each([float(column.mean()) if len(column) else np.nan for column in finished]),
        sd=each([float(column.std(ddof=1)) if len(column) > 1 else np.nan for column in finished]),
        low=each([float(column.min()) if len(column) else np.nan for column in finished]),
        high=each([float(column.max()) if len(column) else np.nan for column in finished]),
        interval_low=each([low for low, _ in intervals]),
        interval_high=each([high for _, high in intervals]),
    )


def t_interval(values: FloatArray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of ``values`` (n,); (NaN, NaN) below two values."""
    if len(values) < 2:
        return np.nan, np.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def recovered(score: float, worst: float, reference: float) -> float:
    """Share of the gap between the worst arm and the reference that an arm with mean ``score`` closes (1 is all)."""
    if worst == reference:
        raise ValueError(f"recovered: got no gap between worst and reference ({worst!r}), expected two values")
    return (worst - score) / (worst - reference)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two executions of one configuration agree, step by step."""

    steps: tuple[int, int]
    """Optimizer steps of the two."""
    first: float
    """Absolute difference of the losses of the first step."""
    largest: float
    """Largest absolute difference of a step's losses, over the steps that both have."""
    largest_step: int
    """The step of that difference, counted from 1."""
    mean: float
    """Mean absolute difference."""
    steps_within: int
    """Leading steps without a difference above ``tolerance``."""
    tolerance: float


def agreement(losses: ArrayLike, repeated: ArrayLike, *, tolerance: float = 1e-3) -> Agreement:
    """Compare two loss curves, each of shape (steps,), over their common length.

    A loss that is not finite in both counts as equal, in one of them as infinitely different.

    Raises:
        ValueError: one of the curves is empty.
    """
    a, b = np.asarray(losses, dtype=np.float64), np.asarray(repeated, dtype=np.float64)
    if a.size == 0 or b.size == 0:
        raise ValueError(f"losses: got {a.size} and {b.size} steps, expected at least one in each")
    common = min(len(a), len(b))
    with np.errstate(invalid="ignore"):  # inf - inf, replaced below
        difference = np.abs(a[:common] - b[:common])
    lost = ~np.isfinite(a[:common]), ~np.isfinite(b[:common])
    difference[lost[0] | lost[1]] = np.inf
    difference[lost[0] & lost[1]] = 0.0
    above = np.flatnonzero(difference > tolerance)
    return Agreement(
        steps=(len(a), len(b)),
        first=float(difference[0]),
        largest=float(difference.max()),
        largest_step=int(difference.argmax()) + 1,
        mean=float(difference.mean()),
        steps_within=int(above[0]) if above.size else common,
        tolerance=tolerance,
    )
