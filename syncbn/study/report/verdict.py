"""The verdict: what a study found, in the sentences at the top of its page."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.study.analysis.findings import VERDICTS, Finding
from syncbn.study.analysis.statistics import MIN_SEEDS
from syncbn.study.analysis.summary import Summary
from syncbn.study.plan.grid import Place, Point, Study
from syncbn.study.report.format import (
    contrast_place,
    difference_sides,
    joined,
    label_of,
    place_words,
    plural,
    setting_words,
    side,
)
from syncbn.study.report.units import Units

MAX_NAMED = 4
"""Costs, and remedies of one cost, that the verdict names. The table has all of them."""


def verdict(summary: Summary, findings: Sequence[Finding]) -> str:
    """What the planned contrasts show: costs and what gives them back, then what is not shown and why."""
    study = summary.study
    planned = {key: run for s in summary.settings.values() for key, run in zip(s.keys, s.results, strict=True)}
    ended = sum(run is not None for run in planned.values())
    failed = len({key for setting in summary.settings.values() for key in setting.failed})
    if not ended:
        why = _failures(summary)
        known = f": {failed} of {plural(len(planned), 'run')} failed." if failed else "." if why else " yet."
        return " ".join([f"No run has a result{known}", *why])
    found = {word: [f for f in findings if f.verdict == word] for word in (*VERDICTS, None)}
    shown = found["better"] + found["worse"]
    said = _costs(summary, [f for f in shown if f.contrast.minus is None])
    for f in shown:
        if f.contrast.minus is not None:
            said.append("The difference {} − {}{} is {}.".format(*_sides(study, f), _effect(f)))
    unclear = found["no difference shown"]
    for f in (*found["no worse"], *(f for f in unclear if f.contrast.margin is not None)):
        words = "is no worse than" if f.verdict == "no worse" else "is not shown to be no worse than"
        first, second, place = _sides(study, f)
        margin = Units(f.metric).margin(f.margin or 0)
        said.append(f"{first} {words} {second}{place} by a margin of {margin}: {_effect(f)}.")
    if unclear := sorted((f for f in unclear if f.contrast.margin is None), key=lambda f: -abs(f.difference)):
        which = "" if len(unclear) == 1 else f"in {len(unclear)} contrasts; the largest is "
        first, second, place = _sides(study, unclear[0])
        said.append(f"No difference is shown {which}between {first} and {second}{place}: {_effect(unclear[0])}.")
    if found["diverged"]:
        settings = {p: summary.settings[p.arm, p.point] for f in found["diverged"] for p in f.contrast.places}
        lost = [f"{s.label} in {s.diverged} of {len(s.keys)} runs" for s in settings.values() if s.diverged]
        said.append(f"Diverged, so not compared: {joined(lost)}.")
    if found["too few seeds"]:
        said.append(f"{plural(len(study.seeds), 'seed')} cannot show a difference; {MIN_SEEDS} are needed.")
    if found[None]:
        waiting = f"{len(found[None])} of {plural(len(findings), 'contrast')}"
        gone = f", and {failed} failed" if failed else ""
        said.append(f"Nothing is claimed for {waiting}: {ended} of {len(planned)} runs have a result{gone}.")
    said += _failures(summary)
    if not findings:
        said.append("The study plans no contrast, so nothing is compared.")
    return " ".join([*said, tuning_words(study)])


def tuning_words(study: Study) -> str:
    """How the learning rates were chosen, for the verdict."""
    if study.tune is None:
        return "No arm's learning rate was tuned."
    own = [arm.label for arm in study.arms if arm.tuned and arm.tune is not None]
    number, seeds = len(study.tune.candidates(study.arms[0])), plural(len(study.tune.seeds), "other seed")
    what = joined(list(study.tune.grid)) + (f" ({joined(own)}: options of its own)" if own else "")
    how = ", by successive halving" if study.tune.halving is not None else ""
    words = f"Each arm at each place chose {what} among {number} candidates by validation data and {seeds}{how}."
    untuned = any(not arm.tuned for arm in study.arms)
    return words + (" An arm named untuned is as it was before." if untuned else "")


def _failures(summary: Summary) -> list[str]:
    """Which settings have no result because their runs failed, or those of their tuning."""
    study = summary.study
    whole: dict[tuple[str, tuple[str, ...]], str] = {}
    tuning: dict[tuple[str, tuple[str, ...]], str] = {}
    for s in summary.settings.values():  # settings that are the same runs are named once
        place = place_words(study, s.point)
        name = f"{s.label} at {place}" if place else s.label
        if s.failed and len(set(s.failed)) == len(set(s.keys)):
            whole.setdefault((s.arm, s.keys), f"{name} ({plural(len(s.failed), 'run')})")
        if s.failed_trials:
            tuning.setdefault((s.arm, s.keys), f"{name} ({plural(s.failed_trials, 'run')})")
    said = [f"Every run failed of {joined(_first([*whole.values()]))}."] if whole else []
    if tuning:
        said.append(f"Without a choice, as runs of the tuning failed: {joined(_first([*tuning.values()]))}.")
    return said


def _costs(summary: Summary, shown: Sequence[Finding]) -> list[str]:
    """What the worse of two settings costs, what gives it back, and what else costs something against the same."""
    study, units = summary.study, Units(summary.metric)
    groups: dict[Place, list[Finding]] = {}
    for finding in sorted(shown, key=lambda finding: -abs(finding.difference)):
        groups.setdefault(_ends(finding)[0], []).append(finding)
    said: dict[tuple[Place, Point], list[str]] = {}
    for worse, group in groups.items():
        main = next((f for f in group if study.reference and _ends(f)[1].arm == study.reference.name), group[0])
        better, cost = _ends(main)[1], abs(main.difference)
        low, high = (main.low, main.high) if main.difference > 0 else (-main.high, -main.low)
        interval = f"(95 % interval {units.difference_interval(low, high, cost)})"
        words = f"{label_of(study, worse.arm)} costs {units.amount(cost)}"
        sentences = said.setdefault((better, worse.point), [])
        if not sentences:
            place = setting_words(study, summary.settings[worse.arm, worse.point])
            words = f"At {place}, {words} {units.of} against {side(study, better, worse)}"
        sentences.append(f"{words} {interval}.")
        back = []
        for remedy, gain in [(_ends(f)[1], abs(f.difference)) for f in group if f is not main]:
            # A remedy that itself costs something against another setting does not give all of it back.
            whole = (gain >= cost or units.amount(gain) == units.amount(cost)) and remedy not in groups
            part = "all of it back" if whole else f"back {units.amount(gain)}"
            back.append(f"{side(study, remedy, worse)} gives {part}")
        if back:
            sentences.append("; ".join(_first(back)) + ".")
    return [" ".join(_first(sentences)) for sentences in said.values()][:MAX_NAMED]


def _first(texts: list[str]) -> list[str]:
    more = len(texts) - MAX_NAMED
    return texts if more <= 0 else [*texts[:MAX_NAMED], f"{more} more in the table"]


def _sides(study: Study, finding: Finding) -> tuple[str, str, str]:
    """The two sides of a contrast and their common place: "SyncBatchNorm", "GroupNorm", " at 2 images per GPU"."""
    first, second = finding.contrast.first, finding.contrast.second
    sides, place = (side(study, first, second), side(study, second, first)), contrast_place(study, finding.contrast)
    if finding.contrast.minus is not None:
        sides = difference_sides(study, finding.contrast)
    elif first.arm == second.arm:
        return f"{label_of(study, first.arm)} at {sides[0]}", f"at {sides[1]}", f", {place}," if place else ""
    return (*sides, f" at {place}" if place else "")


def _effect(finding: Finding) -> str:
    units = Units(finding.metric)
    interval = units.difference_interval(finding.low, finding.high, finding.difference)
    # "0.031" alone would not say of what; the word "points" does.
    of = "" if finding.metric.percent else f" {units.of}"
    return f"{units.amount(finding.difference, signed=True)}{of} (95 % interval {interval})"


def _ends(finding: Finding) -> tuple[Place, Place]:
    """The worse of the two settings, and the better one."""
    first, second = finding.contrast.first, finding.contrast.second
    return (first, second) if finding.cost > 0 else (second, first)
