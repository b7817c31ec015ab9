"""The answer to a study's question in two sentences: no more than its planned comparisons carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.comparisons import Compared, Comparisons, difference_words, interval_words
from syncbn.study.summary import Setting, Summary
from syncbn.study.words import SPACE, at_place, between, joined, p_equals, percent, plural, points, some


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The study's answer, as far as its numbers carry it."""

    headline: str
    """Which arm is best against the reference, and by how much; or that nothing can be claimed."""
    support: str
    """How sure that is, and what became of the other arms; may be empty."""
    caveat: str
    """What the numbers rest on."""


def answer(summary: Summary, comparisons: Comparisons) -> Answer:
    """The answer of a study, whatever has been run of it and whatever the reference is.

    A reference may be the ill that remedies are measured against (an arm below it is a gain) or a goal (an arm close to
    it has given all back); the words say "below" and "above" and leave the judgement to the difference.
    """
    headline, support = _sentences(summary, comparisons)
    return Answer(headline=headline, support=support, caveat=_caveat(summary, comparisons))


def _sentences(summary: Summary, comparisons: Comparisons) -> tuple[str, str]:
    at = at_place(summary.study, comparisons.point)
    ended = [setting for setting in comparisons.settings if setting.finished + setting.diverged]
    if not ended:
        anywhere = any(setting.runs for setting in summary.settings.values())
        return (f"{at}{'no' if at else 'No'} run has a result yet." if anywhere else "No run has a result yet."), ""
    if not any(setting.finished for setting in ended):
        runs = sum(setting.diverged for setting in ended)
        return f"{at}{'every' if at else 'Every'} run diverged: all {runs} of {len(ended)} arms.", ""
    reference = comparisons.reference
    if reference is None:
        return _without_reference(at, ended)
    if not reference.finished or reference.diverged:
        return _without_measure(at, reference, ended)
    if not comparisons.lines:
        return f"{at}{reference.label}, the reference, has {_error(reference)}.", "No other arm is compared with it."
    if comparisons.having("lower"):
        return _gain(at, reference, comparisons)
    if comparisons.having("higher"):
        return _no_gain(at, reference, comparisons)
    return _nothing_shown(at, reference, comparisons)


def _without_reference(at: str, ended: Sequence[Setting]) -> tuple[str, str]:
    best, worst = _extremes(ended)
    if best is worst:
        return f"{at}{best.label} has {_error(best)}.", ""
    headline = f"{at}{best.label} has the lowest mean, {_error(best)}; {worst.label} the highest, {_error(worst)}."
    return headline, "The study names no reference arm, so no difference was tested and none is claimed."


def _without_measure(at: str, reference: Setting, ended: Sequence[Setting]) -> tuple[str, str]:
    """There is nothing to measure differences from: some or all of the reference's runs diverged or are missing."""
    whole = [setting for setting in ended if setting.finished and not setting.diverged and setting is not reference]
    runs = reference.finished + reference.diverged
    if not runs:
        headline = f"{at}{'the' if at else 'The'} reference, {reference.label}, has no result yet: nothing is compared."
    else:
        start = f"{at}{'the' if at else 'The'} reference, {reference.label}, diverged in {reference.diverged} of {runs} runs"
        counts = (
            f"{plural(len(whole), 'other arm')} of {len([s for s in ended if s is not reference])} finished all theirs"
        )
        headline = f"{start}; {counts}."
    lowest = f"The lowest mean among those that finished is {whole and min(whole, key=_mean).label}" if whole else ""
    lowest += f", with {_error(min(whole, key=_mean))}." if whole else ""
    why = "A mean over the runs that survived would flatter the reference, so no difference is tested." if runs else ""
    return headline, " ".join(filter(None, (lowest, why)))


def _gain(at: str, reference: Setting, comparisons: Comparisons) -> tuple[str, str]:
    """At least one arm is shown to be below the reference."""
    lower = comparisons.having("lower")
    best = lower[0]
    still_lower = [line for line in comparisons.having("not shown", "not enough seeds") if _lower_than(line, best)]
    claim = "has the lowest error" if not still_lower else "has the lowest error of those shown to differ"
    headline = (
        f"{at}{best.setting.label} {claim}: {percent(best.setting.error.mean)}, {_points(best)} below the reference, "
        f"{reference.label} ({percent(reference.error.mean)})."
    )
    support = f"That is shown ({_certainty(best, comparisons)})"
    others = [f"{line.setting.label} (by {points(-line.found.difference)})" for line in lower[1:]]
    support += f"; so are {some(others)}." if len(others) > 1 else f"; so is {others[0]}." if others else "."
    return headline, _sentence(support, *_rest(comparisons, still_lower))


def _no_gain(at: str, reference: Setting, comparisons: Comparisons) -> tuple[str, str]:
    """Some arms are shown to be above the reference and none below: the reference is a goal, or nothing helps."""
    closest = comparisons.having("higher", "not shown", "not enough seeds")[0]
    side = "above" if closest.found.difference > 0 else "below"
    headline = (
        f"{at}{'no' if at else 'No'} arm is shown to be below the reference, {reference.label} "
        f"({percent(reference.error.mean)}); {closest.setting.label} has the lowest error of the others, "
        f"{percent(closest.setting.error.mean)}, {_points(closest)} {side} it."
    )
    higher = [line for line in comparisons.having("higher") if line is not closest]
    above = [f"{line.setting.label} (by {points(line.found.difference)})" for line in reversed(higher)]
    certainty = _certainty(closest, comparisons)
    if closest.found.verdict == "higher":
        support = f"Even that is shown to be above it ({certainty})"
        support += f", as {'are' if len(above) > 1 else 'is'} {some(above)}." if above else "."
    elif closest.found.verdict == "not shown":
        support = f"That difference is not shown ({certainty}), which does not prove the two equal"
        support += f"; shown to be above the reference: {some(above)}." if above else "."
    else:
        support = f"For that difference there are too few seeds; shown to be above the reference: {some(above)}."
    return headline, _sentence(support, *_rest(comparisons, [], closest))


def _nothing_shown(at: str, reference: Setting, comparisons: Comparisons) -> tuple[str, str]:
    """Every reference run finished, and no difference is shown: too few seeds, or too small, or nothing comparable."""
    open_, few = comparisons.having("not shown"), comparisons.having("not enough seeds")
    against = f"the reference, {reference.label} ({percent(reference.error.mean)})"
    if open_:
        headline = f"{at}{'no' if at else 'No'} arm is shown to differ from {against}."
        support = f"The lowest of the others is {_described(open_[0])}; {_certainty(open_[0], comparisons)}: "
        return headline, _sentence(support + "no proof that they are equal.", *_rest(comparisons, [], open_[0]))
    if few:
        pairs = max(line.found.pairs for line in few)
        family = f"of {len(comparisons.lines)} " if len(comparisons.lines) > 1 else ""
        headline = (
            f"Not enough seeds to claim anything: with {pairs}, no comparison {family}can reach significance "
            f"({comparisons.needed} are needed)."
        )
        best, worst = few[0], few[-1]
        support = f"{at}{'described' if at else 'Described'}, not claimed: the lowest mean is {_described(best)}"
        if worst is not best:
            support += f" and the highest {worst.setting.label}'s, {percent(worst.setting.error.mean)}"
        return headline, _sentence(f"{support}, against {against}.", *_rest(comparisons, [], best))
    return f"{at}{'nothing' if at else 'Nothing'} can be compared with {against} yet.", " ".join(_rest(comparisons, []))


def _rest(comparisons: Comparisons, still_lower: Sequence[Compared], said: Compared | None = None) -> list[str]:
    """What became of the arms that the sentences above leave out."""
    words = [
        f"{line.setting.label}'s mean is lower still ({percent(line.setting.error.mean)}), but its difference from the "
        "reference is not shown."
        for line in still_lower[:1]
    ]
    if comparisons.having("lower"):
        higher = [line.setting.label for line in comparisons.having("higher")]
        words += [f"Shown to be above it: {some(higher)}."] if higher else []
    told = [line.setting.arm for line in still_lower[:1]] + ([said.setting.arm] if said is not None else [])
    if comparisons.having("lower", "higher"):
        names = [line.setting.label for line in comparisons.having("not shown") if line.setting.arm not in told]
        words += [f"Not shown to differ from it: {some(names)}."] if names else []
        few = [line.setting.label for line in comparisons.having("not enough seeds") if line.setting.arm not in told]
        words += [f"Too few seeds: {some(few)}."] if few else []
    barred = [line.setting for line in comparisons.having("diverged") if line.setting.diverged]
    words += [f"No claim where runs diverged: {some([_divergence(setting) for setting in barred])}."] if barred else []
    return words


def _caveat(summary: Summary, comparisons: Comparisons) -> str:
    seeds = len(summary.study.seeds)
    if seeds == 1:
        words = ["One seed: how far another would be from it is unknown."]
    elif comparisons.lines:
        words = [
            f"Means over {seeds} seeds, each paired with the reference's of the same seed; points are percentage points"
            " of test error. Only differences from the reference were tested, not those between other arms."
        ]
    else:
        words = [f"Means over {seeds} seeds."]
    runs = {key: result for s in summary.settings.values() for key, result in zip(s.keys, s.results, strict=True)}
    ended = [result for result in runs.values() if result is not None]
    diverged = sum(result.status == "diverged" or result.test_error is None for result in ended)
    if diverged:
        words.append(f"{diverged} of {plural(len(ended), 'run')} diverged; they are counted, and no part of any mean.")
    if len(ended) < len(runs):
        words.append(f"Incomplete: {len(runs) - len(ended)} of {len(runs)} runs have no result.")
    return " ".join(words)


def _described(line: Compared) -> str:
    """ "SyncBatchNorm's, 1.7 % (+0.1 points, 95 % interval −0.2 to 0.4)"."""
    return f"{line.setting.label}'s, {percent(line.setting.error.mean)}{SPACE}[{difference_words(line.found)}]"


def _certainty(line: Compared, comparisons: Comparisons) -> str:
    family = len(comparisons.lines)
    corrected = f", corrected for {family} comparisons" if family > 1 else ""
    return f"{p_equals(line.found.p_corrected)}{corrected}"


def _points(line: Compared) -> str:
    """The size of a difference and its interval, turned round where the difference is negative."""
    found = line.found
    if math.isnan(found.low) or found.difference >= 0:
        interval = interval_words(found)
    else:
        turned = type(found)(**{**vars(found), "difference": -found.difference, "low": -found.high, "high": -found.low})
        interval = interval_words(turned)
    return f"{points(abs(found.difference))}{SPACE}points{f' ({interval})' if interval else ''}"


def _error(setting: Setting) -> str:
    interval = between(setting.error.low, setting.error.high, setting.error.mean)
    words = f"{percent(setting.error.mean)} test error"
    return f"{words} (95{SPACE}% interval {interval})" if interval else words


def _divergence(setting: Setting) -> str:
    return f"{setting.label} ({setting.diverged} of {setting.diverged + setting.finished})"


def _extremes(settings: Sequence[Setting]) -> tuple[Setting, Setting]:
    finished = [setting for setting in settings if setting.finished]
    return min(finished, key=_mean), max(finished, key=_mean)


def _mean(setting: Setting) -> float:
    return setting.error.mean


def _lower_than(line: Compared, best: Compared) -> bool:
    return line.found.difference < best.found.difference


def _sentence(*parts: str) -> str:
    return " ".join(part for part in parts if part)
