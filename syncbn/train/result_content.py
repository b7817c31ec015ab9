"""What a result that was read from a file has to hold, so that its readers need no checks of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from syncbn.population import LayerDivergence
from syncbn.train.config import RunConfig, fits
from syncbn.train.result import Metric, RunResult

_METRICS = dict[str, float | None] | None
_ENTRIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "history": (
        ("step", "test"),
        {
            "epoch": int | None,
            "step": int | None,
            "train_loss": float | None,
            "test": _METRICS,
            "validation": _METRICS,
        },
    ),
    "evaluations": (
        ("statistics", "test"),
        {"statistics": str, "estimator": str | None, "samples": int | None, "test": _METRICS},
    ),
    "layers": ((), get_type_hints(LayerDivergence)),
}
"""By field: the keys that each entry has to have, and the types of those that it may have."""
_LARGEST = 2**63


def wrong_field(result: RunResult) -> str | None:
    """The first field of a result that does not hold what its readers expect; None if all do."""
    hints = get_type_hints(RunResult)
    for name, hint in hints.items():
        value = getattr(result, name)
        number = name == "losses" and isinstance(value, list) and all(type(loss) in (int, float) for loss in value)
        if not _storable(value) or not (number or fits(value, hint)):
            return name
    metric, test = result.metric, result.test
    hints = get_type_hints(Metric)
    if not all(fits(getattr(metric, name), hint) for name, hint in hints.items()) or not _storable(metric.name):
        return "metric"
    if not (result.status == "diverged" if test is None else _is_scored(metric, test)):
        return "test"
    sections = [name for name, hint in get_type_hints(RunConfig).items() if is_dataclass(hint)]
    if not all(isinstance(result.config.get(name, {}), dict) for name in sections):
        return "config"
    return next((name for name in _ENTRIES if not all(_is_entry(e, name) for e in getattr(result, name))), None)


def _is_scored(metric: Metric, test: Mapping[str, float | None]) -> bool:
    value = test.get(metric.name)
    return metric.name in test and (value is None or metric.problem(value) is None)


def _is_entry(entry: Mapping[str, Any], field: str) -> bool:
    needed, hints = _ENTRIES[field]
    return all(name in entry for name in needed) and all(
        fits(entry[n], hint) for n, hint in hints.items() if n in entry
    )


def _storable(value: Any) -> bool:
    """Whether integers fit into 64 bits, and texts into a file in UTF-8."""
    if isinstance(value, dict):
        return all(map(_storable, value)) and all(map(_storable, value.values()))
    if isinstance(value, list):
        return all(map(_storable, value))
    if isinstance(value, str):
        return value.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in value)
    return not isinstance(value, int) or abs(value) < _LARGEST
