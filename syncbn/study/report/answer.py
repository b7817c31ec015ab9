"""The answer to a study's question in two sentences: no more than its planned comparisons carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.analysis.comparisons import Compared, Comparisons, interval_words
from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.report.words import SPACE, at_place, between, p_equals, percent, plural, points, some


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
        return _begin(at if anywhere else "", "no run has a result yet."), ""
    if not any(setting.finished for setting in ended):
        runs = sum(setting.diverged for setting in ended)
        return _begin(at, f"every run diverged: {plural(runs, 'run')} of {plural(len(ended), 'arm')}."), ""
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
    if comparisons.having("interim"):
        return _interim(at, comparisons)
    return _nothing_shown(at, reference, comparisons)


def _without_reference(at: str, ended: Sequence[Setting]) -> tuple[str, str]:
    best, worst = _extremes(ended)
    if best is worst:
        return f"{at}{best.label} has {_error(best)}.", ""
    headline = f"{at}{best.label} has the lowest mean, {_error(best)}; {worst.label} the highest, {_error(worst)}."
    return headline, "The study names no reference arm, so no difference was tested and none is claimed."


def _without_measure(at: str, reference: Setting, ended: Sequence[Setting]) -> tuple[str, str]:
    """There is nothing to measure differences from: some or all of the reference's runs diverged, or none has ended."""
    others = [setting for setting in ended if setting is not reference]
    whole = [setting for setting in others if setting.finished and not setting.diverged]
    runs = reference.finished + reference.diverged
    name = _begin(at, f"the reference, {reference.label},")
    words = []
    if whole:
        best = min(whole, key=_mean)
        words.append(f"The lowest mean of those without a diverged run is that of {best.label}, {_error(best)}.")
    if not runs:
        return f"{name} has no result yet, so nothing is compared.", " ".join(words)
    headline = f"{name} diverged in {reference.diverged} of {plural(runs, 'run')}"
    if others:
        part = f"{len(whole)} of the {plural(len(others), 'other arm')}"
        which = "any other arm" if len(whole) == len(others) else part
        headline += f"; no run of {which} did" if whole else "; so did runs of every other arm"
    if reference.finished:
        words.append("The runs that survived would flatter the reference, so no difference from it is tested.")
    return f"{headline}.", " ".join(words)


def _gain(at: str, reference: Setting, comparisons: Comparisons) -> tuple[str, str]:
    """At least one arm is shown to be below the reference."""
    lower = comparisons.having("lower")
    best = lower[0]
    undecided = comparisons.having("not shown", "not enough seeds", "interim")
    still_lower = [line for line in undecided if _lower_than(line, best)]
    so_far = " so far" if comparisons.having("interim") else ""
    whom = f" of those shown to differ{so_far}" if still_lower or so_far else _of_whom(best, comparisons)
    claim = f"{best.setting.label} has the lowest error{whom}: {percent(best.mean)}"
    against = f"the reference, {reference.label} ({percent(best.reference_mean)})"
    headline = f"{at}{claim}, {_points(best)} below {against}."
    support = f"That is shown ({_certainty(best, comparisons)}{_at_odds(best)})"
    others = [f"{line.setting.label} (by {points(-line.found.difference)})" for line in lower[1:]]
    support += f"; so are {some(others)}." if len(others) > 1 else f"; so is {others[0]}." if others else "."
    return headline, _sentence(support, *_rest(comparisons, still_lower))


def _no_gain(at: str, reference: Setting, comparisons: Comparisons) -> tuple[str, str]:
    """Some arms are shown to be above the reference and none below: the reference is a goal, or nothing helps."""
    closest = comparisons.having("higher", "not shown", "not enough seeds", "interim")[0]
    side = "above" if closest.found.difference > 0 else "below"
    whom = _of_whom(closest, comparisons) or " of the others"
    so_far = " so far" if comparisons.having("interim") else ""
    headline = _begin(
        at,
        f"no arm is shown{so_far} to be below the reference, {reference.label} ({percent(closest.reference_mean)}); "
        f"{closest.setting.label} has the lowest error{whom}, {percent(closest.mean)}, "
        f"{_points(closest)} {side} it.",
    )
    higher = [line for line in comparisons.having("higher") if line is not closest]
    above = [f"{line.setting.label} (by {points(line.found.difference)})" for line in reversed(higher)]
    certainty = _certainty(closest, comparisons) + _at_odds(closest)
    if closest.verdict == "higher":
        support = f"Even that is shown to be above it ({certainty})"
        support += f", as {'are' if len(above) > 1 else 'is'} {some(above)}." if above else "."
    elif closest.verdict == "not shown":
        support = f"That difference is not shown ({certainty}), which does not prove the two equal"
        support += f"; shown to be above the reference: {some(above)}." if above else "."
    elif closest.verdict == "interim":
        support = f"Runs of that arm are missing, so nothing is claimed of it; shown to be above: {some(above)}."
    else:
        support = f"For that difference there are too few seeds; shown to be above the reference: {some(above)}."
    return headline, _sentence(support, *_rest(comparisons, [], closest))


def _nothing_shown(at: str, reference: Setting, comparisons: Comparisons) -> tuple[str, str]:
    """Every reference run finished, and no difference is shown: too few seeds, or too small, or nothing comparable."""
    open_, few = comparisons.having("not shown"), comparisons.having("not enough seeds")
    against = f"the reference, {reference.label} ({percent(reference.error.mean)})"
    if open_:
        best = open_[0]
        certainty = f"{_certainty(best, comparisons)}, which does not prove them equal"
        support = f"{_described(best, comparisons)} the reference's; {certainty}."
        headline = _begin(at, f"no arm is shown to differ from {against}.")
        return headline, _sentence(support, *_rest(comparisons, [], best))
    if not few:
        return _begin(at, f"nothing can be compared with {against} yet."), _sentence(*_rest(comparisons, []))
    family = len(comparisons.lines)
    which = f"none of the {family} comparisons can" if family > 1 else "the comparison cannot"
    pairs = max(line.found.pairs for line in few)
    seeds = plural(pairs, "seed") if pairs == len(reference.errors) else f"{plural(pairs, 'finished pair')} of runs"
    least = f"{comparisons.needed} are needed"
    headline = f"Not enough seeds to claim anything: with {seeds}, {which} become significant ({least})."
    return headline, _without_claim(at, few, comparisons)


def _interim(at: str, comparisons: Comparisons) -> tuple[str, str]:
    """Planned runs are missing that may decide: whoever looks again and again would find a difference by chance."""
    family, lines = len(comparisons.lines), comparisons.having("interim")
    fewest, most = (pick(line.found.pairs for line in lines) for pick in (min, max))
    pairs = f"{fewest} to {most}" if fewest < most else str(most)
    which = f"{len(lines)} of the {family} comparisons" if family > 1 else "the comparison"
    headline = (
        f"Interim, nothing is claimed: for {which} {pairs} of {lines[0].planned} planned pairs of runs have a result."
    )
    why = "A test that is looked at while runs come in finds differences by chance more often than it says."
    return headline, _sentence(_without_claim(at, lines, comparisons), why)


def _without_claim(at: str, lines: Sequence[Compared], comparisons: Comparisons) -> str:
    """The lowest and the highest mean of these, described."""
    best, worst = lines[0], lines[-1]
    assert comparisons.reference is not None
    against = f"the reference, {comparisons.reference.label} ({percent(best.reference_mean)})"
    support = f"Described, not claimed: {at[:1].lower() + at[1:]}{_described(best, comparisons)} that of {against}"
    if worst is not best and worst.found.difference > 0:
        support += f"; {worst.setting.label} has the highest, {percent(worst.mean)}"
    over = " Means are over the pairs that finished." if best.partly or worst.partly else ""
    return _sentence(f"{support}.{over}", *_rest(comparisons, [], best))


def _rest(comparisons: Comparisons, still_lower: Sequence[Compared], said: Compared | None = None) -> list[str]:
    """What became of the arms that the sentences above leave out."""
    words = [
        f"{line.setting.label}'s mean is lower still ({percent(line.mean)}), but "
        + (
            "runs of it are missing."
            if line.verdict == "interim"
            else "its difference from the reference is not shown."
        )
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
        interim = [line for line in comparisons.having("interim") if line.setting.arm not in told]
        names = [f"{line.setting.label} ({line.found.pairs} of {line.planned} pairs)" for line in interim]
        words += [f"Interim, no claim before all runs have ended: {some(names)}."] if names else []
    barred = [line.setting for line in comparisons.having("diverged") if line.setting.diverged]
    words += [f"No claim where runs diverged: {some([_divergence(setting) for setting in barred])}."] if barred else []
    return words


def _caveat(summary: Summary, comparisons: Comparisons) -> str:
    seeds = len(summary.study.seeds)
    words = []
    if seeds == 1 and any(setting.runs for setting in comparisons.settings):
        words.append("One seed: how far another would be from it is unknown.")
    elif paired := [line.found.pairs for line in comparisons.lines if not math.isnan(line.found.difference)]:
        words.append(
            f"Means over {_from_to(paired, seeds)}, each paired with the reference's of the same seed; points are "
            "percentage points of test error."
        )
        if comparisons.having("lower", "higher"):
            words.append("Only differences from the reference were tested, not those between other arms.")
    elif finished := [setting.finished for setting in comparisons.settings if setting.finished]:
        words.append(f"Means over {_from_to(finished, seeds)}.")
    runs = {key: result for s in summary.settings.values() for key, result in zip(s.keys, s.results, strict=True)}
    ended = [result for result in runs.values() if result is not None]
    diverged = sum(result.status == "diverged" or result.test_error is None for result in ended)
    if diverged:
        words.append(f"{diverged} of {plural(len(ended), 'run')} diverged; they are counted, and no part of any mean.")
    if len(ended) < len(runs):
        words.append(f"Incomplete: {len(runs) - len(ended)} of {len(runs)} runs have no result.")
    return " ".join(words)


def _from_to(counts: Sequence[int], planned: int) -> str:
    """How many seeds means are over, where those of different arms may differ."""
    fewest, most = min(counts), max(counts)
    if fewest == most == planned:
        return plural(planned, "seed")
    return f"{plural(most, 'seed') if fewest == most else f'{fewest} to {most} seeds'} of {planned} planned"


def _of_whom(best: Compared, comparisons: Comparisons) -> str:
    """Said where an arm that was not compared, or could not be, has a lower mean."""
    compared = {line.setting.arm for line in comparisons.lines if not math.isnan(line.found.difference)}
    lower = [s for s in comparisons.settings if s.finished and s.error.mean < best.setting.error.mean]
    return " of the arms compared" if any(s.arm not in compared and not s.reference for s in lower) else ""


def _described(line: Compared, comparisons: Comparisons) -> str:
    """ "SyncBatchNorm has the lowest mean of the others, 1.7 %, 0.1 points (95 % interval −0.2 to 0.4) above"."""
    above = line.found.difference > 0
    whom = _of_whom(line, comparisons) or (" of the other arms" if above and len(comparisons.lines) > 1 else "")
    has = (
        f"{line.setting.label} has the lowest mean{whom},"
        if len(comparisons.lines) > 1
        else f"{line.setting.label} has"
    )
    return f"{has} {percent(line.mean)}, {_points(line)} {'above' if above else 'below'}"


def _certainty(line: Compared, comparisons: Comparisons) -> str:
    family = len(comparisons.lines)
    corrected = f", corrected for {family} comparisons" if family > 1 else ""
    return f"{p_equals(line.found.p_corrected)}{corrected}"


def _at_odds(line: Compared) -> str:
    """Said where the interval beside a shown difference contains 0."""
    words = "; by the sign-flip test of the mean difference: Student's t interval is another method and contains 0"
    return words if line.at_odds else ""


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


def _begin(at: str, words: str) -> str:
    """A sentence that begins with a place, or with its own first word where there is none to name."""
    return at + words if at else words[0].upper() + words[1:]


def _sentence(*parts: str) -> str:
    return " ".join(part for part in parts if part)
