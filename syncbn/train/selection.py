"""The choice of a run's best epoch by its validation set, and early stopping. The test set is not looked at."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from syncbn.train.config import require
from syncbn.train.state import Run


def check_selection(run: Run) -> None:
    """Raise :class:`ConfigError` if the configuration asks for the best epoch and there is no validation set."""
    without = run.data.validation is None
    remedy = "last, as the task has no validation data (for classification, set data.validation_fraction)"
    require(not without or run.config.budget.select == "last", "budget.select", run.config.budget.select, remedy)


def note_evaluation(run: Run) -> None:
    """Keep the weights of the last evaluation if it is the best so far. Of equal ones, the first is the best."""
    if run.config.budget.select == "last":
        return
    if best_entry(run) is run.progress.history[-1]:
        run.best = {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}


def best_entry(run: Run) -> dict[str, Any]:
    """The evaluation whose model the run ends with: the last one, or the one with the best validation metric."""
    history, metric = run.progress.history, run.task.metric
    if run.config.budget.select == "last":
        return history[-1]

    def cost(entry: dict[str, Any]) -> float:
        value = entry["validation"][metric.name]
        return math.inf if value is None or math.isnan(value) else metric.sign * value

    return min(history, key=cost)


def stops_early(run: Run) -> bool:
    """Whether the best evaluation is as many evaluations ago as the configuration's patience."""
    patience, history = run.config.budget.patience, run.progress.history
    if patience is None or not history:
        return False
    return len(history) - 1 - history.index(best_entry(run)) >= patience


def restore_best(run: Run) -> None:
    """Give the model the weights of :func:`best_entry`."""
    best: dict[str, Tensor] | None = run.best
    if run.config.budget.select == "best" and best is not None:
        run.model.load_state_dict(best)
