"""What the figures show in these numbers: the sentences under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from syncbn.study.analysis.evaluations import FAMILIES, Evaluated
from syncbn.study.analysis.layout import fixed_words
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.plan.grid import Point, Study
from syncbn.study.report.panels import curves_of
from syncbn.study.report.words import (
    SPACE,
    axis_word,
    coordinate,
    joined,
    percent,
    place_words,
    plural,
    points,
    some,
    value_word,
)

if TYPE_CHECKING:
    from syncbn.train.result import RunResult

CLASSES = {"mnist5k": 10, "digits": 10, "cifar10": 10, "fashion_mnist": 10, "cifar100": 100}
"""Classes of the data sets whose number is not in a run's configuration."""
MIN_RISE = 1.25
"""Ratio of errors from which on an arm is said to rise along the sweep."""


def sweep_caption(summary: Summary, panel: Point) -> list[str]:
    """What the main figure of a sweep shows, for one of its panels; means only, no claim about differences."""
    traces = [_finished(summary, arm.name, panel) for arm in summary.study.arms]
    varying = [t for t in traces if len(t) > 1 and not summary.constant(t[0].arm, panel)]
    words = []
    if varying:
        # The reference tells most: it is what the study is about. Otherwise the arm that changes most.
        main = next((t for t in varying if t[0].reference), max(varying, key=_rise))
        if _rise(main) < MIN_RISE:
            main = max(varying, key=_rise)
        text = f"{_from_to(summary, main)}{_counterpart(varying, main)}."
        words.append(text[0].upper() + text[1:])
        words += _crossing(summary, main, [t for t in traces if t and summary.constant(t[0].arm, panel)])
    return words


def diverged_words(settings: Sequence[Setting]) -> str:
    """Which settings lost runs; empty where none did. The same runs at several places are named once."""
    seen: dict[tuple[str, ...], Setting] = {}
    shared: set[tuple[str, ...]] = set()
    for setting in settings:
        if setting.diverged:
            shared |= {setting.keys} & seen.keys()
            seen.setdefault(setting.keys, setting)
    if not seen:
        return ""
    names = []
    for label in dict.fromkeys(setting.label for setting in seen.values()):
        places = [setting for setting in seen.values() if setting.label == label]
        most = max(places, key=lambda setting: setting.diverged)
        counts = f"{most.diverged} of {most.diverged + most.finished}"
        where = "" if most.keys in shared or not most.point else f" at {place_words(most.point)}"
        if len(places) > 1:
            names.append(f"{label} at {len(places)} places (most{where}: {counts} runs)")
        else:
            names.append(f"{label}{where} ({counts} runs)")
    return f"Diverged: {some(names, 8)}."


def missing_words(settings: Sequence[Setting]) -> str:
    """Which arms have no result at all; empty where there is none."""
    arms = {setting.label: False for setting in settings}
    for setting in settings:
        arms[setting.label] |= bool(setting.runs)
    without = [label for label, there in arms.items() if not there]
    return f"Without a result yet: {some(without, 8)}." if without else ""


def fixed_caption(summary: Summary) -> str:
    """What stays the same along the sweep; arms that it does not touch are explained where there are any."""
    level = any(summary.constant(arm.name, panel) for arm in summary.study.arms for panel in summary.layout.panels)
    words = " Level lines are arms that it does not touch, run once a seed." if level else ""
    return fixed_words(summary.study) + words


def fair_words(study: Study) -> str:
    """What all arms share, whether it suits them or not; arms that have it otherwise are named."""
    own = []
    for arm in study.arms:
        optimizer, budget = arm.overrides.get("optimizer") or {}, arm.overrides.get("budget") or {}
        changed = [f"{axis_word(name)} {value_word(value)}" for name, value in optimizer.items()]
        changed += [
            f"{value_word(budget[name])} {name}" for name in ("epochs", "steps") if budget.get(name) is not None
        ]
        own += [f"{arm.label} ({', '.join(changed)})"] if changed else []
    same = "At each place, learning rate and length of training are the same for all arms"
    otherwise = f", but for {some(own, 8)}" if own else ""
    return f"{same} and were not tuned for any one of them{otherwise}: another learning rate may change the order."


def chance_words(settings: Sequence[Setting]) -> str:
    """How many runs ended at chance level, and of which settings; empty where none did or the classes are unknown."""
    seen: dict[str, tuple[Setting, bool]] = {}
    for setting in settings:
        for key, result, error in zip(setting.keys, setting.results, setting.errors, strict=True):
            classes = None if result is None else _classes(result)
            if classes is not None and not math.isnan(error):
                seen.setdefault(key, (setting, error >= 1 - 1.5 / classes))
    found = [setting for setting, lost in seen.values() if lost]
    if not found:
        return ""
    counts: dict[tuple[str, Point], int] = {}
    for setting in found:
        place = () if _everywhere(setting, settings) else setting.point
        counts[setting.label, place] = counts.get((setting.label, place), 0) + 1
    names = [f"{label}{f' at {place_words(place)}' if place else ''} ({n})" for (label, place), n in counts.items()]
    numbers = {classes for setting in found for run in setting.runs if (classes := _classes(run)) is not None}
    least = percent(1 - 1.5 / numbers.pop()) if len(numbers) == 1 else f"1{SPACE}− 1.5 / classes"
    return (
        f"{len(found)} of {plural(len(seen), 'finished run')} ended at chance level (an error of at least {least}): "
        f"{some(names, 8)}."
    )


def _everywhere(setting: Setting, settings: Sequence[Setting]) -> bool:
    """Whether its runs are those of further places too."""
    return sum(other.keys == setting.keys for other in settings) > 1


def _classes(result: RunResult) -> int | None:
    data = result.config.get("data") or {}
    return data.get("synthetic_classes") if data.get("name") == "synthetic" else CLASSES.get(str(data.get("name")))


def not_shown_words(number: int, what: str) -> str:
    """Said where a section has more than it shows."""
    return f"{plural(number, what)} more {'is' if number == 1 else 'are'} not shown." if number > 0 else ""


def kinds_words(families: Sequence[str]) -> str:
    """What the figures of an arm under several kinds of statistics are, and how to read them."""
    words = f"The same trained models, tested with {plural(len(families), 'kind')} of normalization statistics."
    if any(family.startswith("population") for family in families):
        words += (
            " Where running statistics err and population statistics do not, the weights are good and only the estimate"
            " is not."
        )
    if "batch" in families:
        words += (
            " Where the test batch's own statistics alone bring the error down, the model reads something from the"
            " batch that inference does not give it."
        )
    return words if len(families) < 3 else f"{words} Where all stay high, small batches have hurt the training."


def arms_caption(settings: Sequence[Setting]) -> str:
    """What the dots of arms at one place show."""
    finished = [setting for setting in settings if setting.finished]
    if len(finished) < 2:
        return ""
    low, high = (pick(finished, key=lambda s: s.error.mean) for pick in (min, max))
    wide = max(finished, key=lambda s: max(_errors(s)) - min(_errors(s)))
    words = f"Means go from {percent(low.error.mean)} ({low.label}) to {percent(high.error.mean)} ({high.label})"
    reach = max(_errors(wide)) - min(_errors(wide))
    if wide.finished < 2 or not reach:
        return f"{words}."
    return f"{words}; the seeds of {wide.label} are farthest apart, by {points(reach)} points."


def curves_caption(settings: Sequence[Setting]) -> str:
    """Whether the order at the end was there half-way."""
    means = {}
    for setting in settings:
        curves = [curve for curve in curves_of(setting) if curve]
        if curves:
            epochs = sorted(set.intersection(*map(set, curves)))
            means[setting.label] = {epoch: sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs}
    common = sorted(set.intersection(*map(set, means.values()))) if means else []
    if len(common) < 2 or len(means) < 2:
        return ""
    half, end = common[(len(common) - 1) // 2], common[-1]
    then, now = (min(means, key=lambda label: means[label][epoch]) for epoch in (half, end))
    if then == now:
        return (
            f"{then} has the lowest mean half-way, at epoch {half:g}, and at the end ({percent(means[then][half])}, "
            f"{percent(means[now][end])})."
        )
    return (
        f"Half-way, at epoch {half:g}, {then} has the lowest mean ({percent(means[then][half])}), at the end {now} "
        f"({percent(means[now][end])})."
    )


def samples_caption(items: Sequence[Evaluated]) -> str:
    """What more images for the population statistics change."""
    changes = []
    for item in items:
        for family in FAMILIES:
            series = sorted(item.series(family), key=lambda pair: pair[0])
            if family.startswith("population") and len(series) > 1:
                (first, few), (last, many) = series[0], series[-1]
                changes.append((abs(few.mean - many.mean), few.mean, many.mean, first, last, item.setting, family))
    if not changes:
        return ""
    change, before, after, least, most, setting, family = max(changes, key=lambda entry: entry[0])
    return (
        f"From {least} to {most} images the error changes by at most {points(change)} points ({setting.label}, "
        f"{FAMILIES[family]}: {percent(before)} to {percent(after)})."
    )


def level_words(items: Sequence[Evaluated]) -> str:
    """What the level lines beside population statistics are."""
    level = {"running": "running statistics", "batch": "the test batch's own"}
    found = [name for family, name in level.items() if any(item.series(family) for item in items)]
    return f"Marks as above; level lines: {joined(found)}." if found else "Marks as above."


def _finished(summary: Summary, arm: str, panel: Point) -> list[Setting]:
    return [setting for _, setting in summary.across(arm, panel) if setting.finished]


def _errors(setting: Setting) -> list[float]:
    return [error for error in setting.errors if not math.isnan(error)]


def _rise(trace: Sequence[Setting]) -> float:
    return trace[-1].error.mean / max(trace[0].error.mean, 1e-9)


def _place(summary: Summary, setting: Setting) -> str:
    name = summary.layout.across
    assert name is not None
    return coordinate(name, dict(setting.point)[name])


def _from_to(summary: Summary, trace: Sequence[Setting]) -> str:
    first, last = trace[0], trace[-1]
    change, name = _rise(trace), summary.layout.across
    assert name is not None
    verb = "rises" if change >= MIN_RISE else "falls" if change <= 1 / MIN_RISE else "goes"
    places = f"from {value_word(dict(first.point)[name])} to {_place(summary, last)}"
    errors = f"from {percent(first.error.mean)} to {percent(last.error.mean)}"
    return f"{places}, the error of {first.label} {verb} {errors}"


def _counterpart(varying: Sequence[Sequence[Setting]], main: Sequence[Setting]) -> str:
    """The arm that changes least over the same places."""
    ends = main[0].point, main[-1].point
    others = [t for t in varying if t is not main and (t[0].point, t[-1].point) == ends]
    if not others:
        return ""
    steady = min(others, key=lambda t: abs(math.log(max(_rise(t), 1e-9))))
    first, last = percent(steady[0].error.mean), percent(steady[-1].error.mean)
    return f"; {steady[0].label} " + (f"stays at {first}" if first == last else f"goes from {first} to {last}")


def _crossing(summary: Summary, main: Sequence[Setting], level: Sequence[Sequence[Setting]]) -> list[str]:
    """From where on the best arm that the sweep does not touch has the lower mean."""
    if not level:
        return []
    best = min((trace[0] for trace in level), key=lambda setting: setting.error.mean)
    above = [setting.error.mean > best.error.mean for setting in main]
    lowest = ", the lowest of the level lines" if len(level) > 1 else ""
    name, label = f"that of {best.label} ({percent(best.error.mean)}{lowest})", main[0].label
    if all(above) or not any(above):
        return [f"The mean of {label} is {'above' if above[0] else 'below'} {name} everywhere."]
    if not above[-1]:
        return []
    start = next(i for i in range(len(above)) if all(above[i:]))
    return [f"From {_place(summary, main[start])} on, the mean of {label} is above {name}."]


def shown_words(summary: Summary, point: Point) -> str:
    """Where on the axes a section looks, as far as the study has other places."""
    several = [(name, value) for name, value in point if len(summary.study.axes[name]) > 1]
    return f"Shown at {place_words(several)}." if several else ""
