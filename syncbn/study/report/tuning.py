"""What a study's settings chose in its tuning, as a table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from syncbn.study.plan.grid import Study
from syncbn.study.plan.halving import Length
from syncbn.study.plan.tuning import Choice, Tuning, failed_trials, tunings_of
from syncbn.study.report.format import DASH, candidate_words, joined, label_of, place_words, plural
from syncbn.study.report.tables import Table
from syncbn.study.report.units import Units
from syncbn.train.result import RunResult


def choices_table(study: Study, results: Mapping[str, RunResult], failed: Collection[str] = ()) -> Table | None:
    """What each setting chose and what that cost; None without tuning.

    ``results`` are by the cells' keys, and ``failed`` the keys of runs that failed.
    """
    if study.tune is None:
        return None
    head = ["arm", "place", "chosen", "at the edge", "validation", "other candidates", "runs", "seconds"]
    halving = study.tune.halving is not None
    table = Table(head=[*head, *(["candidates by rung", "trained", "full grid"] if halving else [])])
    tunings, stuck = tunings_of(study, results), failed_trials(study, results, failed) if failed else {}
    # Settings that have chosen come first.
    for place, tuning in sorted(tunings.items(), key=lambda item: item[1].choice is None):
        row = [label_of(study, place.arm), place_words(study, place.point) or DASH]
        if tuning.choice is None:
            row += [_waiting(tuning, stuck.get(place, 0)), *[DASH] * (len(table.head) - 3)]
        else:
            row += _chosen(study, tuning.choice, results)
            row += _halved(study, tuning, tuning.choice, results) if halving else []
        table.rows.append(row)
        table.arms.append(place.arm)
    return table


def rung_lines(study: Study) -> list[str]:
    """The rungs of a study that tunes by successive halving, one line for each length of its runs; else none."""
    if study.tune is None or study.tune.halving is None:
        return []
    tunings = tunings_of(study).values()
    return list(dict.fromkeys(f"each setting compares {joined(_rungs(tuning))}" for tuning in tunings))


def _chosen(study: Study, choice: Choice, results: Mapping[str, RunResult]) -> list[str]:
    runs = {cell.key: results[cell.key] for rung in choice.rungs for tried in rung for cell in tried.cells}
    units = Units(study.metric or next(iter(runs.values())).metric)
    tied = f", tied with {joined([candidate_words(each) for each in choice.tied])}" if choice.tied else ""
    cells = [candidate_words(choice.chosen.candidate) + tied, ", ".join(choice.at_edge) or "no"]
    cells += [units.value(choice.chosen.mean), _others(choice, units)]
    return [*cells, str(len(runs)), f"{sum(run.seconds for run in runs.values()):,.0f}"]


def _halved(study: Study, tuning: Tuning, choice: Choice, results: Mapping[str, RunResult]) -> list[str]:
    """What each rung compared, the epochs that this took of those of the full grid, and the seconds of the latter."""
    assert study.tune is not None, "it tunes"
    seeds, candidates = len(study.tune.seeds), tuning.rungs[0].candidates
    trained = seeds * sum(rung.candidates * rung.budget for rung in tuning.rungs)
    whole = Length(seeds * candidates * tuning.length.number, tuning.length.unit)
    last = [results[cell.key].seconds for tried in choice.rungs[-1] for cell in tried.cells]
    seconds = sum(last) / len(last) * candidates * seeds
    units = Units(study.metric or next(iter(results.values())).metric)
    return [
        _compared(tuning, choice, units),
        f"{trained:,} of {whole.number:,} {whole.unit}",
        f"about {seconds:,.0f} s",
    ]


def _compared(tuning: Tuning, choice: Choice, units: Units) -> str:
    """The rungs, and who went on from each but the last, with the validation metric there."""
    words = _rungs(tuning)
    for number, (tried, following) in enumerate(zip(choice.rungs, choice.rungs[1:], strict=False)):
        kept = {each.candidate for each in following}
        went = [each for each in tried if each.candidate in kept]
        shown = joined([f"{candidate_words(each.candidate)} ({units.value(each.mean)})" for each in went])
        worst = max(each.cost for each in went)
        as_good = sum(each.cost == worst for each in tried if each.candidate not in kept)
        tied = f", as good as {plural(as_good, 'other')} that did not" if as_good else ""
        words[number] += f", of which {shown} went on{tied}"
    return "; ".join(words)


def _rungs(tuning: Tuning) -> list[str]:
    """ "9 at 1 epoch", "3 at 3 epochs"."""
    return [f"{rung.candidates} at {Length(rung.budget, tuning.length.unit).words}" for rung in tuning.rungs]


def _waiting(tuning: Tuning, failed: int) -> str:
    """Why a setting has not chosen."""
    if failed:
        return f"none: {plural(failed, 'run')} failed"
    rungs = f": {len(tuning.compared)} of {len(tuning.rungs)} rungs" if len(tuning.rungs) > 1 else ""
    return f"not yet{rungs}"


def _others(choice: Choice, units: Units) -> str:
    """The range of the others' validation metric at the whole budget: "12.1 to 40.2, 1× diverged"."""
    known = sorted(
        tried.mean for tried in choice.rungs[-1] if tried is not choice.chosen and not math.isnan(tried.mean)
    )
    lost = sum(math.isnan(tried.mean) for tried in choice.tried if tried is not choice.chosen)
    ends = list(dict.fromkeys(units.value(mean) for mean in (known[0], known[-1]))) if known else []
    words = [" to ".join(ends)] if ends else []
    return ", ".join([*words, *([f"{lost}× diverged"] if lost else [])]) or DASH
