"""How far each layer's batch statistics are from the population's: means over the runs of a setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.analysis.summary import Setting


@dataclass(frozen=True, kw_only=True)
class LayerMeans:
    """One layer of one setting; NaN where no run has the number. See :class:`syncbn.population.LayerDivergence`."""

    layer: str
    count: float
    """Values per channel in one normalization batch."""
    kl: float
    """Divergence of a batch's statistics from the population's."""
    effective: float
    """Independent values that would diverge as much."""
    running_kl: float
    """Divergence of the running statistics."""
    seeds: int


def layer_means(setting: Setting) -> list[LayerMeans]:
    """The layers of a setting, in the order of the model; empty without batch statistics."""
    found: dict[str, list[dict[str, float | None]]] = {}
    for run in setting.runs:
        for entry in run.layers:
            found.setdefault(str(entry.get("layer")), []).append(entry)
    return [
        LayerMeans(
            layer=layer,
            count=_mean(entries, "count"),
            kl=_mean(entries, "kl"),
            effective=_mean(entries, "effective"),
            running_kl=_mean(entries, "running_kl"),
            seeds=len(entries),
        )
        for layer, entries in found.items()
    ]


def _mean(entries: Sequence[dict[str, float | None]], name: str) -> float:
    values = [float(value) for entry in entries if (value := entry.get(name)) is not None]
    return sum(values) / len(values) if values else math.nan
