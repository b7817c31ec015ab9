"""How a study's axes are laid out on the page: one of them across, each place on the others a panel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from syncbn.study.plan.grid import HOLD, Point, Study, Value
from syncbn.study.report.words import axis_word, place_words

MIN_GRID_VALUES = 3
"""Numbers that an axis other than the sweep must have to go across."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The places of a study as panels and positions."""

    names: tuple[str, ...]
    """All axes, in the study's order."""
    across: str | None
    """The axis that goes across; None where arms are compared at single places."""
    values: tuple[Value, ...]
    """Its values from left to right."""
    positions: tuple[float, ...]
    """Where they stand: logarithms to base 2, where all are positive."""
    panels: tuple[Point, ...]
    """The places on the other axes; one empty place where there are none."""

    def point(self, panel: Point, value: Value = None) -> Point:
        """The place on all axes of a value within a panel."""
        at = dict(panel) | ({self.across: value} if self.across is not None else {})
        return tuple((name, at[name]) for name in self.names)

    def panel_of(self, point: Point) -> Point:
        """The panel in which a place lies."""
        return tuple((name, value) for name, value in point if name != self.across)

    def title(self, panel: Point) -> str:
        """What a panel shows, as far as it differs from the others."""
        several = [name for name, _ in panel if len({dict(other)[name] for other in self.panels}) > 1]
        return place_words((name, value) for name, value in panel if name in several)


def layout_of(study: Study) -> Layout:
    """The layout of a study.

    The sweep goes across, the largest batch on the left: what is lost by smaller ones is then on the right, as in Wu
    and He's figures (2018, Group Normalization). Without a sweep it is the first axis with several numbers, rising
    unless the study's file has them falling; without that, nothing.
    """
    axes = study.axes
    across: str | None = None
    if study.sweep is not None and len(study.sweep.values) > 1:
        across = study.sweep.vary
    else:
        numeric = [name for name, values in axes.items() if name != HOLD and all(map(_is_number, values))]
        across = next((name for name in numeric if len(axes[name]) >= MIN_GRID_VALUES), None)
    values = axes[across] if across is not None else ()
    if across is not None:
        sweeps = study.sweep is not None and across == study.sweep.vary
        falls = sweeps or list(values) == sorted(values, key=_number, reverse=True)
        values = tuple(sorted(values, key=_number, reverse=falls))
    others = [[(name, value) for value in axes[name]] for name in axes if name != across]
    return Layout(
        names=tuple(axes),
        across=across,
        values=values,
        positions=_positions([_number(value) for value in values]),
        panels=tuple(product(*others)),
    )


def across_label(study: Study, layout: Layout) -> str:
    """What varies along the horizontal axis, and which way it goes."""
    if layout.across is None:
        return ""
    word = axis_word(layout.across)
    return f"{word} (fewer to the right)" if _number(layout.values[0]) > _number(layout.values[-1]) else word


def fixed_words(study: Study) -> str:
    """What stays as it is while the sweep varies, as a sentence; empty without a sweep."""
    sweep = study.sweep
    if sweep is None:
        return ""
    if sweep.kind == "decoupled":
        whole = "" if sweep.global_batch_size is None else f" of {sweep.global_batch_size} images"
        same = f"The global batch{whole}, the learning rate and the steps are the same everywhere"
        return f"{same}; which images share statistics varies."
    held = {"epochs": "the epochs stay the same", "steps": f"every run has {sweep.steps} steps"}
    constant = " or ".join(held[name] for name in sweep.hold)
    panels = " (a panel for each)" if len(sweep.hold) > 1 else ""
    return f"The global batch and the learning rate vary with the batch on each GPU; {constant}{panels}."


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _positions(values: list[float]) -> tuple[float, ...]:
    """Rising positions, whichever way the values go."""
    places = [math.log2(value) for value in values] if all(value > 0 for value in values) else values
    falling = len(places) > 1 and places[0] > places[-1]
    return tuple(-place for place in places) if falling else tuple(places)
