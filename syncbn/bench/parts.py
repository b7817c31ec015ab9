"""The parts of the bench beside the layers: whole training steps, and what they cost as the world grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from syncbn.bench import growth, steps
from syncbn.bench.suites import Selection
from syncbn.bench.timing import Spread


@dataclass
class Parts:
    """What was measured of them."""

    plain: dict[str, Any] = field(default_factory=dict)
    """By part, for JSON."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By part, for CSV."""
    lines: list[str] = field(default_factory=list)


def run_parts(selection: Selection, report: Callable[[str], None]) -> Parts:
    """Measure both parts. On CUDA the growth is that of given links alone: one machine has no others to measure."""
    device = torch.device(selection.device)
    stepped = steps.run_steps(device, selection.rounds, report)
    worlds = (2, 3, 4) if device.type == "cpu" else ()
    grown = growth.run_growth(device, selection.rounds, report, worlds=worlds)
    return Parts(
        {"steps": stepped, "growth": grown},
        {"steps": steps.rows(stepped), "growth": growth.rows(grown)},
        [*steps.lines(stepped), "", *growth.lines(grown), ""],
    )


def emulation_ratio(selection: Selection, parts: Parts, report: Callable[[str], None]) -> Spread:
    """A step of 8 emulated GPUs on one process over the same step on 4: as :func:`run_parts` found it, or measured."""
    found = parts.plain.get("steps", {}).get("emulation")
    if found is not None:
        return Spread(*found["ratio"])
    report("a step of 8 emulated GPUs on one process, and on 4 processes")
    return steps.emulation_ratio(selection.rounds).ratio
