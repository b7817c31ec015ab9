"""Numbers and places as text. The page, the terminal and the CSV file all use these functions, so no digit differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.grid import HOLD, Contrast, Place, Point, Study, Value, spelled

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
DASH = "–"
"""Stands where there is no number."""

_AXES = {
    "per_gpu_batch_size": "{samples} per GPU",
    "ghost_batch_size": "{samples} per ghost batch",
    "sync_group_size": "GPUs per sync group",
    "gpus": "GPUs",
    HOLD: "constant",
    "data.class_skew": "{samples} of one class in a row",
}
"""What the values of an axis count."""


def percent(fraction: float) -> str:
    """A fraction in percent, without the sign; with a second decimal below one percent.

    >>> percent(0.0213), percent(0.0052)
    ('2.1', '0.52')
    """
    return DASH if math.isnan(fraction) else f"{100 * fraction:.{2 if 0 < fraction < 0.00995 else 1}f}"


def percent_interval(low: float, high: float) -> str:
    """An interval of errors in percent, cut off at 0 and 100: "2.1 to 2.6"."""
    return DASH if math.isnan(low) else f"{percent(max(low, 0.0))} to {percent(min(high, 1.0))}"


def points(difference: float, *, signed: bool = False, like: float | None = None) -> str:
    """A difference of two fractions in percentage points, without the unit; with as many decimals as ``like`` has.

    >>> points(0.7012), points(-0.0312, signed=True), points(0.0012, signed=True)
    ('70', '−3.1', '+0.12')
    """
    if math.isnan(difference):
        return DASH
    size = abs(100 * (difference if like is None else like))
    digits = 0 if size >= 9.95 else 1 if size >= 0.995 or size == 0 else 2
    text = f"{100 * difference:{'+' if signed else ''}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def points_interval(low: float, high: float, middle: float) -> str:
    """An interval of differences in percentage points, with as many decimals as its middle: "−0.2 to 1.4"."""
    return DASH if math.isnan(low) else f"{points(low, like=middle)} to {points(high, like=middle)}"


def decimals(size: float, digits: int) -> int | None:
    """Decimals with which a number of this size has that many significant digits; None if it needs an exponent."""
    if size == 0 or not math.isfinite(size):
        return digits - 1
    power = int(f"{size:.{digits - 1}e}".partition("e")[2])  # after rounding: 0.00999999 is written as 0.010
    return max(0, digits - 1 - power) if -4 <= power < 6 else None


def decimal(value: float, places: int | None, *, signed: bool = False) -> str:
    """A number with that many decimals; with an exponent if ``places`` is None.

    >>> decimal(1.234, 3), decimal(-0.04, 2, signed=True), decimal(12345678.0, None)
    ('1.234', '−0.04', '1.23e+07')
    """
    if math.isnan(value):
        return DASH
    text = f"{value:{'+' if signed else ''}{'.2e' if places is None else f'.{places}f'}}"
    return text.lstrip("+-") if float(text) == 0 else text[0].replace("-", MINUS) + text[1:]


def number(value: float) -> str:
    """A number with four significant digits.

    >>> number(1.2), number(35.2), number(0.0213)
    ('1.200', '35.20', '0.02130')
    """
    return decimal(value, decimals(abs(value), 4))


def p_value(p: float) -> str:
    """A p value with three decimals, two from 0.1 on."""
    if math.isnan(p):
        return DASH
    return f"<{SPACE}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{min(p, 1.0):.2f}"


def compact(value: float) -> str:
    """A positive number in at most five characters: 0.031, 3.4, 38, 1.9k, 2.1M."""
    if math.isnan(value):
        return DASH
    for size, unit in ((1e6, "M"), (1e3, "k"), (1.0, "")):
        if value >= 0.9995 * size:
            short = value / size
            return f"{short:.1f}".removesuffix(".0") + unit if short < 9.95 else f"{short:.0f}{unit}"
    return "0" if value == 0 else "<.001" if value < 0.0005 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def joined(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def capital(words: str) -> str:
    """The words as a sentence begins. A metric's own capitals stay: "Test mAP"."""
    return words[:1].upper() + words[1:]


def value_word(value: Value) -> str:
    """A value of an axis, as the study's file has it, in six digits."""
    return f"{value:g}" if isinstance(value, float) else spelled(value)


def candidate_words(candidate: Iterable[tuple[str, Value]]) -> str:
    """A candidate: "optimizer.lr 0.1, norm.momentum 0.01"."""
    return ", ".join(f"{key} {value_word(value)}" for key, value in candidate)


def chosen_words(
    summary: Summary, contrast: Contrast, untuned: str = "untuned", undecided: str = "not yet"
) -> tuple[str, str]:
    """What the two sides of a contrast chose in tuning. Of a difference of differences, each side has two choices."""
    words = []
    for place in contrast.places:
        chosen = summary.settings[place.arm, place.point].chosen
        tuned = any(arm.tuned for arm in summary.study.arms if arm.name == place.arm)
        words.append(candidate_words(chosen) if chosen is not None else undecided if tuned else untuned)
    if contrast.minus is None:
        return words[0], words[1]
    first, second = (f" {MINUS} ".join(filter(None, two)) for two in (words[:2], words[2:]))
    return first, second


def frame_choices(summary: Summary, contrast: Contrast) -> dict[str, str | None]:
    """The same as columns of a frame, None where nothing is chosen; no columns if the study does not tune."""
    if summary.study.tune is None:
        return {}
    chosen, against = chosen_words(summary, contrast, "", "")
    return {"chosen": chosen or None, "chosen_against": against or None}


def axis_word(study: Study, name: str) -> str:
    """What an axis counts, or its name without punctuation."""
    return _AXES[name].format(samples=study.samples_word) if name in _AXES else name.replace(".", " ").replace("_", " ")


def coordinate(study: Study, name: str, value: Value) -> str:
    """A value of an axis with what it counts.

    >>> from syncbn.study.plan.study_file import load_study
    >>> study = load_study("quickstart")
    >>> coordinate(study, "per_gpu_batch_size", 1), coordinate(study, "hold", "steps")
    ('1 image per GPU', 'constant steps')
    """
    if (name, value) == ("data.class_skew", 1):
        return "shuffled data"
    if name == HOLD or name not in _AXES:
        return f"{axis_word(study, name)} {value_word(value)}"
    first, _, rest = axis_word(study, name).partition(" ")
    return " ".join(filter(None, [value_word(value), first.removesuffix("s") if value == 1 else first, rest]))


def place_words(study: Study, point: Iterable[tuple[str, Value]]) -> str:
    """A place on the axes: "4 images per GPU, constant steps"; empty without axes."""
    return ", ".join(coordinate(study, name, value) for name, value in point)


def panel_title(summary: Summary, panel: Point) -> str:
    """What a panel of the main figure shows, as far as it differs from the other panels."""
    several = [name for name, _ in panel if len({dict(other)[name] for other in summary.panels}) > 1]
    return place_words(summary.study, ((name, value) for name, value in panel if name in several))


def same_runs(along: Mapping[int, Setting]) -> bool:
    """Whether all settings of an arm within a panel are the same runs: the axis across does not change the arm."""
    return len(along) > 1 and len({setting.keys for setting in along.values()}) == 1


def contrast_words(study: Study, contrast: Contrast) -> str:
    """A contrast without its place: "SyncBatchNorm − Local BatchNorm"."""
    if contrast.minus is not None:
        return f" {MINUS} ".join(difference_sides(study, contrast))
    return _difference(study, contrast.first, contrast.second)


def difference_sides(study: Study, contrast: Contrast) -> tuple[str, str]:
    """The two differences of a difference of differences, each in brackets."""
    assert contrast.minus is not None
    words = []
    for (one, two), other in (((contrast.first, contrast.second), contrast.minus[0]), (contrast.minus, contrast.first)):
        values = place_words(study, (pair for pair in one.point if pair in two.point and pair not in other.point))
        words.append(f"({_difference(study, one, two)}{f' at {values}' if values else ''})")
    return words[0], words[1]


def contrast_place(study: Study, contrast: Contrast) -> str:
    """Where both settings of a contrast are, on the axes with several values: "2 images per GPU"."""
    pairs = [pair for pair in contrast.first.point if all(pair in place.point for place in contrast.places)]
    return place_words(study, ((name, value) for name, value in pairs if len(study.axes[name]) > 1))


def side(study: Study, place: Place, other: Place) -> str:
    """One side of a contrast, by what it does not share with the other: its arm, its values, or both."""
    values = place_words(study, (pair for pair in place.point if pair not in other.point))
    label = label_of(study, place.arm) if place.arm != other.arm or not values else ""
    return f"{label} at {values}" if label and values else label or values


def label_of(study: Study, arm: str) -> str:
    """The label of the arm of this name."""
    return next(each.label for each in study.arms if each.name == arm)


def setting_words(study: Study, setting: Setting) -> str:
    """Where a setting is, as a sentence begins: "4 images per GPU in class order".

    The batch on each GPU and the class order are named also where the study does not vary them.
    """
    at = dict(setting.point)
    config = setting.runs[0].config
    size = ("per_gpu_batch_size", config.get("per_gpu_batch_size"))
    words = [place_words(study, setting.point if size[0] in at else [size, *setting.point])]
    skewed = ((config.get("data") or {}).get("class_skew") or 1) > 1
    return " ".join([*words, "in class order"] if skewed and "data.class_skew" not in at else words)


def _difference(study: Study, first: Place, second: Place) -> str:
    words = f"{side(study, first, second)} {MINUS} {side(study, second, first)}"
    return f"{label_of(study, first.arm)}: {words}" if first.arm == second.arm else words
