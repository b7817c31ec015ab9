"""What each arm costs: images a second and memory, and how fast the whole study went."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncbn.study.summary import Setting
from syncbn.study.words import DASH, plural


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """One arm at the place of comparison, as the table shows it."""

    arm: str
    label: str
    images_per_second: str
    relative_speed: str
    """Its speed over that of the arm it is measured against."""
    bar: int
    """Its speed in percent of the fastest."""
    memory: str
    relative_memory: str
    seconds: str
    """Training time of a run."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All arms' costs."""

    lines: list[CostLine]
    against: str
    """Label of the arm that the others are measured against."""
    words: str
    """What the table shows."""


def costs_of(settings: Sequence[Setting]) -> Costs | None:
    """Speed and memory of the arms at one place, relative to the reference or else to the first; None without any."""
    found = [setting for setting in settings if not math.isnan(_speed(setting))]
    if not found:
        return None
    against = next((setting for setting in found if setting.reference), found[0])
    fastest, slowest = max(found, key=_speed), min(found, key=_speed)
    lines = [
        CostLine(
            arm=setting.arm,
            label=setting.label,
            images_per_second=_rounded(_speed(setting)),
            relative_speed=_ratio(_speed(setting) / _speed(against)),
            bar=round(100 * _speed(setting) / _speed(fastest)),
            memory=DASH if math.isnan(_memory(setting)) else f"{_memory(setting) / 2**20:.0f}",
            relative_memory=_ratio(_memory(setting) / _memory(against)),
            seconds=_rounded(setting.mean_of(lambda run: run.seconds)),
        )
        for setting in found
    ]
    words = ""
    if fastest is not slowest:
        words = (
            f"{fastest.label} is the fastest, with {_rounded(_speed(fastest))} images a second; {slowest.label} the "
            f"slowest, with {_rounded(_speed(slowest))} ({_ratio(_speed(slowest) / _speed(fastest))} of that)."
        )
    return Costs(lines=lines, against=against.label, words=words)


def study_speed_words(out: Path) -> list[str]:
    """Runs an hour, from the study's records, and what a second worker added, where that was measured."""
    return [words for words in (_hourly(out), _speedup(out / "speedup.json")) if words]


def _hourly(out: Path) -> str:
    try:
        from syncbn.study.records import cells_per_hour, read_records
    except ImportError:
        return ""
    records = read_records(out)
    hourly = cells_per_hour(records.values())
    if hourly is None:
        return ""
    workers = len({record.worker for record in records.values()})
    return (
        f"{plural(len(records), 'recorded run')} of {plural(workers, 'worker process')}: "
        f"{_rounded(hourly)} runs an hour while the study was running."
    )


def _speedup(path: Path) -> str:
    """What ``speedup.json`` says; nothing, where it does not exist or is not a record of two speeds."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(found, dict) or not _is_number(found.get("speedup")) or not _is_number(found.get("workers")):
        return ""
    cores = f" on {plural(found['cores'], 'core')}" if _is_number(found.get("cores")) else ""
    spread = found["spread"].get("speedup") if isinstance(found.get("spread"), dict) else None
    rounds = ""
    if isinstance(spread, list) and len(spread) == 2 and all(map(_is_number, spread)):
        rounds = f" ({spread[0]:.2f} to {spread[1]:.2f} in the rounds of the measurement)"
    workers = f"{plural(found['workers'], 'worker')} side by side{cores}"
    ratio = f"{found['speedup']:.2f} times as many images a second as one alone"
    return f"Measured before: {workers} trained {ratio}{rounds}."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _speed(setting: Setting) -> float:
    return setting.mean_of(lambda run: run.images_per_second)


def _memory(setting: Setting) -> float:
    return setting.mean_of(lambda run: run.peak_memory_bytes)


def _ratio(ratio: float) -> str:
    return DASH if math.isnan(ratio) else f"×{ratio:.2f}"


def _rounded(value: float) -> str:
    if math.isnan(value):
        return DASH
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
