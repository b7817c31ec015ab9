"""What a claim says about the numbers of its experiment, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from syncbn.experiments.runs import Runs
from syncbn.study.analysis.statistics import interval
from syncbn.study.plan.content import mapping, text
from syncbn.study.plan.grid import Study, Value
from syncbn.train.config import fits, require

Agreement = Literal["agrees", "disagrees", "open"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A quantity of one arm at one point of the axes."""

    quantity: str
    arm: str
    at: Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A quantity, or the difference or the ratio of two, and the range in which the claim has it."""

    text: str
    """What the claim says, in words."""
    of: Side
    minus: Side | None = None
    over: Side | None = None
    above: float = -math.inf
    below: float = math.inf

    @property
    def expected(self) -> str:
        """The range in words."""
        if self.above == -math.inf:
            return f"below {self.below:g}"
        return f"above {self.above:g}" if self.below == math.inf else f"{self.above:g} to {self.below:g}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out for a check: the mean over the seeds, its 95 % interval, and whether the claim holds here.

    The claim ``agrees`` if the whole interval is in the check's range, ``disagrees`` if the whole interval is outside,
    and is ``open`` otherwise, also with fewer than two seeds.
    """

    check: Check
    seeds: int
    mean: float
    low: float
    high: float
    agreement: Agreement

    @property
    def words(self) -> str:
        """Mean and interval, in the words of a table."""
        if not self.seeds:
            return "–"
        spread = f" ({self.low:.3g} to {self.high:.3g})" if self.high > self.low else ""
        return f"{self.mean:.3g}{spread}"


def measure(check: Check, runs: Runs) -> Measured:
    """Compare a check with the runs. Differences and ratios are those of runs with the same seed."""
    by_seed = _values(check.of, runs)
    for other, combine in ((check.minus, np.subtract), (check.over, np.divide)):
        if other is not None:
            others = _values(other, runs)
            by_seed = {seed: float(combine(by_seed[seed], others[seed])) for seed in by_seed if seed in others}
    mean, low, high = interval(np.array(list(by_seed.values())))
    inside = check.above < low and high < check.below
    outside = high < check.above or low > check.below
    agreement: Agreement = "agrees" if inside else "disagrees" if outside else "open"
    return Measured(check=check, seeds=len(by_seed), mean=mean, low=low, high=high, agreement=agreement)


def check_from(content: object, study: Study, where: str) -> Check:
    """Read a check from the parsed content of a file. Raises ConfigError for a mistake in it."""
    data = mapping(content, where, ("text", "of"), ("minus", "over", "above", "below"))
    sides: dict[str, Any] = {
        key: _side(data[key], study, f"{where}.{key}") for key in ("of", "minus", "over") if key in data
    }
    for key in ("above", "below"):
        require(fits(data.get(key, 0.0), float), f"{where}.{key}", data.get(key), "a number")
    bounds: dict[str, Any] = {key: float(data[key]) for key in ("above", "below") if key in data}
    require(bool(bounds), where, content, "`above`, `below` or both")
    require(not {"minus", "over"} <= set(sides), f"{where}.over", data.get("over"), "none beside `minus`")
    return Check(text=text(data["text"], f"{where}.text"), **sides, **bounds)


def _side(content: object, study: Study, where: str) -> Side:
    data = mapping(content, where, ("quantity", "arm"), ("at",))
    at = mapping(data.get("at", {}), f"{where}.at")
    names = [arm.name for arm in study.arms]
    require(data["arm"] in names, f"{where}.arm", data["arm"], f"one of {', '.join(names)}")
    arm = next(arm for arm in study.arms if arm.name == data["arm"])
    points = [point for point in study.points(arm) if at.items() <= dict(point).items()]
    axes = ", ".join(study.axes)
    require(len(points) == 1, f"{where}.at", at, f"values of the axes ({axes}) that name one point of the arm")
    return Side(quantity=text(data["quantity"], f"{where}.quantity"), arm=data["arm"], at=at)


def _values(side: Side, runs: Runs) -> dict[int, float]:
    return runs.values(side.quantity, side.arm, side.at)
