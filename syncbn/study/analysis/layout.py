"""How a study's axes are laid out: one of them across, and a panel for each place on the others."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from syncbn.study.plan.grid import HOLD, Point, Study, Value

MIN_GRID_VALUES = 3
"""Numbers that an axis other than the sweep must have to go across."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The places of a study as panels, and values across each."""

    names: tuple[str, ...]
    """All axes, in the study's order."""
    across: str | None
    """The axis that goes across; None where arms are compared at single places."""
    values: tuple[Value, ...]
    """Its values from left to right."""
    panels: tuple[Point, ...]
    """The places on the other axes; one empty place where there are none."""

    def point(self, panel: Point, value: Value = None) -> Point:
        """The place on all axes of a value within a panel."""
        at = dict(panel) | ({self.across: value} if self.across is not None else {})
        return tuple((name, at[name]) for name in self.names)

    def panel_of(self, point: Point) -> Point:
        """The panel in which a place lies."""
        return tuple((name, value) for name, value in point if name != self.across)


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
        panels=tuple(product(*others)),
    )


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)
