"""Successive halving: all candidates are compared at a small budget, and the best of them at larger ones.

Jamieson and Talwalkar 2016 (Non-stochastic Best Arm Identification and Hyperparameter Optimization, arXiv 1502.07943,
section 2). A *rung* trains its candidates with one budget. The best ``1 / factor`` of them, rounded up, go on to the
next rung, which has ``factor`` times the budget; the last has all of it.

ASHA (Li et al. 2020, arXiv 1810.05934) promotes by the same rule, but as soon as some runs of a rung have ended. Its
choice depends on how many workers there are and on which of them is first. Here a rung waits for all of its runs, so
the choice follows from the study and the records alone.

Each run of a rung is a run of that length, with a schedule that ends with it, and not the start of a longer run:
validation at the peak of the learning rate would say little about its end. scikit-learn's ``HalvingGridSearchCV`` does
the same with its resource.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from syncbn.study.plan.grid import Cell, cell_key
from syncbn.train.config import RunConfig

FACTOR = 3
"""The factor of ``halving: true``: scikit-learn's default."""


class Length(NamedTuple):
    """How long a run trains."""

    number: int
    unit: Literal["epochs", "steps"]

    @property
    def words(self) -> str:
        """ "1 epoch", "300 steps"."""
        return f"{self.number} {self.unit if self.number != 1 else self.unit.removesuffix('s')}"


class Rung(NamedTuple):
    """How many candidates are compared, and at which budget: epochs, or steps if the run's budget has these."""

    candidates: int
    budget: int


def rungs_of(candidates: int, factor: int | None, whole: int) -> list[Rung]:
    """The rungs from the first to the last, which compares at most ``factor`` candidates at the ``whole`` budget.

    Budgets are rounded up to whole numbers. Rungs that would have the same budget would repeat the same runs, so they
    are one, which keeps as many as the last of them would. Without a factor there is one rung.

    >>> rungs_of(10, 3, 9)
    [Rung(candidates=10, budget=1), Rung(candidates=4, budget=3), Rung(candidates=2, budget=9)]
    >>> rungs_of(10, 3, 2)
    [Rung(candidates=10, budget=1), Rung(candidates=2, budget=2)]
    """
    numbers = [candidates]
    while factor is not None and numbers[-1] > factor:
        numbers.append(-(-numbers[-1] // factor))
    found: list[Rung] = []
    for rung, number in enumerate(numbers):
        budget = -(-whole // (factor or 1) ** (len(numbers) - 1 - rung))
        if not found or budget > found[-1].budget:
            found.append(Rung(number, budget))
    return found


def length_of(config: RunConfig) -> Length:
    """The length of a run, in the unit in which its budget is given."""
    budget = config.budget
    if budget.steps is not None:
        return Length(budget.steps, "steps")
    assert budget.epochs is not None, "checked by BudgetConfig"
    return Length(budget.epochs, "epochs")


def shortened(cells: Sequence[Cell], budget: int) -> list[Cell]:
    """The cells as runs of another length, which their labels name."""
    found = []
    for cell in cells:
        length = Length(budget, length_of(cell.config).unit)
        given: dict[str, Any] = {length.unit: budget}
        config = replace(cell.config, budget=replace(cell.config.budget, **given))
        found.append(replace(cell, config=config, key=cell_key(config), rung=length.words))
    return found
