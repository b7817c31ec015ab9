"""How scores and their differences are written: in percent and points, or in the metric's own unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from syncbn.study.report.format import (
    DASH,
    decimal,
    decimals,
    number,
    percent,
    percent_interval,
    points,
    points_interval,
)
from syncbn.train.result import Metric


@dataclass(frozen=True)
class Units:
    """The numbers and words of a metric on every page and table.

    >>> error, dice = Units(Metric("error")), Units(Metric("dice", higher_is_better=True))
    >>> loss = Units(Metric("loss", percent=False))
    >>> error.value(0.123), dice.value(0.873), loss.value(35.2)
    ('12.3', '87.3', '35.20')
    >>> error.heading, dice.heading, loss.heading
    ('test error in %', 'test dice in %', 'test loss')
    >>> error.amount(0.0312), loss.amount(0.0312)
    ('3.1 points', '0.031')
    """

    metric: Metric

    @property
    def name(self) -> str:
        """ "test error"."""
        return f"test {self.metric.name}"

    @property
    def heading(self) -> str:
        """What a table of scores holds: "test error in %", "test loss"."""
        return f"{self.name} in %" if self.metric.percent else self.name

    @property
    def differences(self) -> str:
        """What a table of differences holds: "points of test error", "differences in test loss"."""
        return f"points of {self.name}" if self.metric.percent else f"differences in {self.name}"

    @property
    def of(self) -> str:
        """What follows an amount: "of test error" after "3.1 points", "in test loss" after "0.031"."""
        return f"of {self.name}" if self.metric.percent else f"in {self.name}"

    @property
    def better(self) -> str:
        """Where the first of two is better: "below 0" or "above 0"."""
        return "above 0" if self.metric.higher_is_better else "below 0"

    @property
    def directions(self) -> tuple[str, str]:
        """How the better of two scores lies, and the worse: "lower" and "higher", or the other way round."""
        return ("higher", "lower") if self.metric.higher_is_better else ("lower", "higher")

    @property
    def scores(self) -> str:
        """ "errors" for classification, "scores" for any other metric."""
        return "errors" if self.metric.name == "error" else "scores"

    def value(self, score: float) -> str:
        """A score without its unit."""
        return percent(score) if self.metric.percent else number(score)

    def interval(self, low: float, high: float) -> str:
        """An interval of scores: "2.1 to 2.6"."""
        if self.metric.percent:
            return percent_interval(low, high)
        places = decimals(max(abs(low), abs(high)), 4)
        return DASH if math.isnan(low) else f"{decimal(low, places)} to {decimal(high, places)}"

    def spread(self, sd: float) -> str:
        """A standard deviation of scores."""
        return percent(sd) if self.metric.percent else self.difference(sd)

    def difference(self, difference: float, *, signed: bool = False) -> str:
        """A difference of two scores without its unit, with two significant digits."""
        if self.metric.percent:
            return points(difference, signed=signed)
        return decimal(difference, decimals(abs(difference), 2), signed=signed)

    def difference_interval(self, low: float, high: float, middle: float) -> str:
        """An interval of differences: "−0.2 to 1.4", with as many decimals as its middle."""
        if self.metric.percent:
            return points_interval(low, high, middle)
        # A middle close to 0 has many decimals, which say nothing of a wide interval.
        places = decimals(max(abs(middle), (high - low) / 10), 2)
        return DASH if math.isnan(low) else f"{decimal(low, places)} to {decimal(high, places)}"

    def amount(self, difference: float, *, signed: bool = False) -> str:
        """A difference with its unit: "3.1 points", "0.031"."""
        return self.difference(difference, signed=signed) + (" points" if self.metric.percent else "")

    def margin(self, margin: float) -> str:
        """A margin with its unit, as exact as the study's file has it in a metric's own unit."""
        return self.amount(margin) if self.metric.percent else f"{margin:g}"
