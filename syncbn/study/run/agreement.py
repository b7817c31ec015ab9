"""How far two executions of one configuration agree: the same run, repeated or executed otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


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
