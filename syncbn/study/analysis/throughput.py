"""What each arm costs: images a second and memory.

Runs of one configuration differ in speed by whatever else the machine was doing, far more than most arms differ. Each
run is therefore divided by the reference's of the same seed, which was nearest to it in time, and the median of the
ratios is shown with the lowest and the highest of them. Where these lie on both sides of 1, no order is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from syncbn.study.analysis.summary import Setting
from syncbn.study.report.words import DASH, some

if TYPE_CHECKING:
    from syncbn.train.result import RunResult


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """One arm at the place of comparison, as the table shows it."""

    arm: str
    label: str
    images_per_second: str
    """Median over the seeds."""
    spread: str
    """The lowest and the highest of them."""
    relative_speed: str
    """Median of its speed over that of the arm it is measured against, seed by seed."""
    relative_spread: str
    memory: str
    relative_memory: str
    seconds: str
    """Training time of a run, the median."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All arms' costs."""

    lines: list[CostLine]
    against: str
    """Label of the arm that the others are measured against."""
    memory: str
    """What the memory is."""
    words: str
    """What the table shows."""


def costs_of(settings: Sequence[Setting]) -> Costs | None:
    """Speed and memory of the arms at one place, relative to the reference or else to the first; None without any."""
    found = [setting for setting in settings if _finite(_figures(setting, _speed))]
    if not found:
        return None
    against = next((setting for setting in found if setting.reference), found[0])
    on_cpu = any(run.environment.get("device", "").startswith("CPU") for setting in found for run in setting.runs)
    return Costs(
        lines=[_cost_line(setting, against) for setting in found],
        against=against.label,
        memory="peak resident memory of the whole process" if on_cpu else "peak memory allocated on the GPU",
        words=_order_words(found, against),
    )


def _cost_line(setting: Setting, against: Setting) -> CostLine:
    speeds, ratios = _finite(_figures(setting, _speed)), _ratios(setting, against, _speed)
    memory, more = _finite(_figures(setting, _memory)), _ratios(setting, against, _memory)
    seconds = _finite(_figures(setting, lambda run: run.seconds))
    itself = setting is against
    return CostLine(
        arm=setting.arm,
        label=setting.label,
        images_per_second=_rounded(median(speeds)),
        spread=_between(speeds, _rounded),
        relative_speed=DASH if itself or not ratios else _ratio(median(ratios)),
        relative_spread=DASH if itself else _between(ratios, lambda ratio: f"{ratio:.2f}"),
        memory=f"{median(memory) / 2**20:.0f}" if memory else DASH,
        relative_memory=DASH if itself or not more else _ratio(median(more)),
        seconds=_rounded(median(seconds)) if seconds else DASH,
    )


def _order_words(settings: Sequence[Setting], against: Setting) -> str:
    """Which arms were faster or slower for every seed; of the others no order is claimed."""
    faster: list[str] = []
    slower: list[str] = []
    open_: list[str] = []
    for setting in settings:
        ratios = _ratios(setting, against, _speed)
        if setting is against or not ratios:
            continue
        if len(ratios) < 2 or min(ratios) <= 1 <= max(ratios):
            open_.append(setting.label)
        else:
            (faster if min(ratios) > 1 else slower).append(f"{setting.label} ({_ratio(median(ratios))})")
    words = [
        f"{name} than {against.label} with every seed: {some(labels, 8)}."
        for name, labels in (("Faster", faster), ("Slower", slower))
        if labels
    ]
    if open_:
        words.append(f"No order is claimed for {some(open_, 4)}, whose ratios lie on both sides of 1, or are too few.")
    return " ".join(words)


def _speed(run: RunResult) -> float:
    return run.images_per_second


def _memory(run: RunResult) -> float:
    return math.nan if run.peak_memory_bytes is None else float(run.peak_memory_bytes)


def _figures(setting: Setting, figure: Callable[[RunResult], float]) -> list[float]:
    """A figure seed by seed; NaN where a run has none, or a speed of 0."""
    found = [math.nan if run is None else figure(run) for run in setting.results]
    return [value if value > 0 else math.nan for value in found]


def _ratios(setting: Setting, against: Setting, figure: Callable[[RunResult], float]) -> list[float]:
    pairs = zip(_figures(setting, figure), _figures(against, figure), strict=True)
    return _finite([own / other for own, other in pairs])


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _between(values: Sequence[float], words: Callable[[float], str]) -> str:
    return f"{words(min(values))} to {words(max(values))}" if len(values) > 1 else DASH


def _ratio(ratio: float) -> str:
    return f"×{ratio:.2f}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
