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
    plural,
    points,
    points_interval,
    setting_words,
    side,
)

MAX_NAMED = 4
"""Costs, and remedies of one cost, that the verdict names. The table has all of them."""


def verdict(summary: Summary, findings: Sequence[Finding]) -> str:
    """What the planned contrasts show: costs and what gives them back, then what is not shown and why."""
    study = summary.study
    planned = {key: run for s in summary.settings.values() for key, run in zip(s.keys, s.results, strict=True)}
    ended = sum(run is not None for run in planned.values())
    if not ended:
        return "No run has a result yet."
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
        margin = points(f.contrast.margin or 0)
        said.append(f"{first} {words} {second}{place} by a margin of {margin} points: {_effect(f)}.")
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
        said.append(f"Nothing is claimed for {waiting}: {ended} of {len(planned)} runs have a result.")
    if not findings:
        said.append("The study plans no contrast, so nothing is compared.")
    return " ".join([*said, "No arm's learning rate was tuned."])


def _costs(summary: Summary, shown: Sequence[Finding]) -> list[str]:
    """What the worse of two settings costs, what gives it back, and what else costs something against the same."""
    study = summary.study
    groups: dict[Place, list[Finding]] = {}
    for finding in sorted(shown, key=lambda finding: -abs(finding.difference)):
        groups.setdefault(_ends(finding)[0], []).append(finding)
    said: dict[tuple[Place, Point], list[str]] = {}
    for worse, group in groups.items():
        main = next((f for f in group if study.reference and _ends(f)[1].arm == study.reference.name), group[0])
        better, cost = _ends(main)[1], abs(main.difference)
        low, high = (main.low, main.high) if main.difference > 0 else (-main.high, -main.low)
        interval = f"(95 % interval {points_interval(low, high, cost)})"
        words = f"{label_of(study, worse.arm)} costs {points(cost)} points"
        sentences = said.setdefault((better, worse.point), [])
        if not sentences:
            place = setting_words(summary.settings[worse.arm, worse.point])
            words = f"At {place}, {words} of test error against {side(study, better, worse)}"
        sentences.append(f"{words} {interval}.")
        back = []
        for remedy, gain in [(_ends(f)[1], abs(f.difference)) for f in group if f is not main]:
            # A remedy that itself costs something against another setting does not give all of it back.
            whole = (gain >= cost or points(gain) == points(cost)) and remedy not in groups
            part = "all of it back" if whole else f"back {points(gain)} points"
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
    interval = points_interval(finding.low, finding.high, finding.difference)
    return f"{points(finding.difference, signed=True)} points (95 % interval {interval})"


def _ends(finding: Finding) -> tuple[Place, Place]:
    """The setting with the higher error, and the one with the lower."""
    first, second = finding.contrast.first, finding.contrast.second
    return (first, second) if finding.difference > 0 else (second, first)
