"""Numbers and places in words, as the report and the terminal print them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from syncbn.study.plan.grid import HOLD, Point, Study, Value

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
DASH = "–"
"""Stands where there is no number."""

_AXES = {
    "per_gpu_batch_size": "images a GPU",
    "ghost_batch_size": "images in a ghost batch",
    "sync_group_size": "GPUs in a sync group",
    "gpus": "GPUs",
    HOLD: "constant",
    "data.class_skew": "images of one class in a row",
}
"""What a value of an axis counts; "4 images a GPU"."""


def percent(fraction: float) -> str:
    """A fraction as a percentage, with a second digit below one percent; a dash for NaN."""
    return DASH if math.isnan(fraction) else f"{100 * fraction:.{_digits(fraction)}f}{SPACE}%"


def spread(mean: float, sd: float) -> str:
    """Mean and standard deviation, both fractions, as one percentage with the mean's digits: 2.4 ± 0.1 %."""
    if math.isnan(mean) or math.isnan(sd):
        return percent(mean)
    digits = _digits(mean)
    return f"{100 * mean:.{digits}f}{SPACE}±{SPACE}{100 * sd:.{digits}f}{SPACE}%"


def between(low: float, high: float, middle: float) -> str:
    """An interval of errors in percent, with the digits of its middle: "2.1 to 2.6 %"; empty where there is none.

    It is cut off at 0, which no error is below; the t interval of a few scattered seeds does not know that.
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    digits = _digits(middle)
    ends = (_number(100 * max(end, 0.0), digits) for end in (low, high))
    return f"{' to '.join(ends)}{SPACE}%"


def points(difference: float, signed: bool = False) -> str:
    """A difference of fractions in percentage points, without the unit: "12.4", "0.31"; a dash for NaN."""
    if math.isnan(difference):
        return DASH
    plus = "+" if signed and difference > 0 else ""
    return plus + _number(100 * difference, _points_digits(difference))


def points_between(low: float, high: float, middle: float) -> str:
    """An interval of differences in percentage points, with the digits of its middle: "−0.2 to 1.4"."""
    if math.isnan(low) or math.isnan(high):
        return DASH
    digits = _points_digits(middle)
    return f"{_number(100 * low, digits)} to {_number(100 * high, digits)}"


def p_value(p: float) -> str:
    """A p value, with what a table needs of it; a dash for NaN."""
    if math.isnan(p):
        return DASH
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.0995 else f"{min(p, 1.0):.2f}"


def p_equals(p: float) -> str:
    """The same within a sentence: "p = 0.031"."""
    found = p_value(p)
    return f"p{SPACE}{found}" if found.startswith("<") else f"p{SPACE}={SPACE}{found}"


def significant(value: float) -> str:
    """A positive number with two digits that count and no exponent: 0.0031, 0.42, 7.3, 1,900; a dash for NaN."""
    if math.isnan(value):
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.1e}")
    digits = max(0, 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{digits}f}"


def compact(value: float) -> str:
    """A count in at most five characters: 3.4, 38, 1.9k, 2.1M; a dash for NaN."""
    if math.isnan(value):
        return DASH
    for size, unit in ((1e6, "M"), (1e3, "k"), (1.0, "")):
        if value >= 0.9995 * size:
            short = value / size
            return f"{short:.1f}".removesuffix(".0") + unit if short < 9.95 else f"{short:.0f}{unit}"
    return significant(value)


def joined(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else ""


def plural(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def some(labels: Sequence[str], limit: int = 4) -> str:
    """A list that does not run on: its first members and how many more."""
    return (
        joined(labels)
        if len(labels) <= limit
        else f"{', '.join(labels[: limit - 1])} and {len(labels) - limit + 1} more"
    )


def value_word(value: Value) -> str:
    """A value as its file has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def axis_word(name: str) -> str:
    """What an axis counts, or its name without punctuation."""
    return _AXES.get(name, name.replace(".", " ").replace("_", " "))


def coordinate(name: str, value: Value) -> str:
    """A value of an axis in words: "1 image a GPU", "constant epochs", "data augment crop"."""
    if name == HOLD:
        return f"constant {value}"
    if (name, value) == ("data.class_skew", 1):
        return "i.i.d. order"
    if name not in _AXES:
        return f"{axis_word(name)} {value_word(value)}"
    word = _AXES[name]
    first, _, rest = word.partition(" ")
    if value == 1:
        word = " ".join(filter(None, (first.removesuffix("s"), rest)))
    return f"{value_word(value)} {word}"


def place_words(point: Iterable[tuple[str, Value]]) -> str:
    """A place on the axes: "4 images a GPU, constant steps"; empty where there are no axes."""
    return ", ".join(coordinate(name, value) for name, value in point)


def at_place(study: Study, point: Point) -> str:
    """ "At 4 images a GPU, ", to begin a sentence with; only axes along which the study has several values count."""
    words = place_words((name, value) for name, value in point if len(study.axes[name]) > 1)
    return f"At {words}, " if words else ""


def _digits(fraction: float) -> int:
    return 2 if 0 < fraction < 0.00995 else 1


def _points_digits(difference: float) -> int:
    return 2 if 0 < abs(difference) < 0.00995 else 1


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)
