"""Two studies beside each other, as tables for the terminal, as CSV or as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.analysis.two_studies import Row, rows_of
from syncbn.study.plan.differences import differences
from syncbn.study.report.format import DASH, candidate_words, p_value, place_words, plural
from syncbn.study.report.tables import Table, console, print_rich
from syncbn.study.report.units import Units
from syncbn.train.config import flatten
from syncbn.train.result import jsonable

FORMATS = ("table", "csv", "json")


def print_comparison(first: Summary, second: Summary, folders: tuple[str, str], form: str) -> None:
    """Print two studies, A and B: what differs in their configurations, then the settings that both have.

    Raises:
        ConfigError: the studies have different metrics.
    """
    rows = rows_of(first, second)
    if form == "csv":
        print(_csv(rows, first), end="")
    elif form == "json":
        print(_json(rows, first, second, folders))
    else:
        _print_tables(rows, first, second, folders)


def exploratory(rows: Sequence[Row]) -> str:
    """What the rows are worth."""
    family = sum(row.test != "same" for row in rows)
    if rows and not family:
        return "The runs are the same in both studies, so there is nothing to compare."
    left_out = " that are not the same runs in both" * (family < len(rows))
    return (
        f"Exploratory: neither study planned these comparisons, so nothing is claimed. p is corrected by Holm over"
        f" {plural(family, 'row')}{left_out}. Ask what you see here of new seeds, as a contrast of one study."
    )


def _print_tables(rows: Sequence[Row], first: Summary, second: Summary, folders: tuple[str, str]) -> None:
    out, units = console(), Units(first.metric)
    for name, folder, summary in zip("AB", folders, (first, second), strict=True):
        out.print(Text(f"{name}: {summary.study.title} ({folder})"), soft_wrap=True)
    found = differences(first.study, second.study)
    if found:
        print_rich(out, Table(title="What differs", head=["key", "A", "B"], rows=[list(pair) for pair in found]))
    else:
        out.print("\nTheir configurations are the same.\n")
    if not rows:
        out.print(Text("No arm is in both studies at the same place."))
        return
    head = ["setting", "A", "B", "A − B", "p", "test"]
    table = Table(title=f"{units.heading[:1].upper()}{units.heading[1:]}, mean and 95 % interval", head=head)
    table.rows.extend(_cells(row, first, units) for row in rows)
    print_rich(out, table)
    out.print(Text(exploratory(rows)))
    out.print(Text("paired: over the seeds that both have; Welch: over different seeds; k×: k runs diverged"))


def _cells(row: Row, summary: Summary, units: Units) -> list[str]:
    place = "" if row.level else place_words(summary.study, row.first.point)
    name = f"{row.first.label}, {place}" if place else row.first.label
    if sides := _sides(row):
        name += f"\n({sides[0] or DASH} against {sides[1] or DASH})"
    effect = row.effect
    interval = units.difference_interval(effect.low, effect.high, effect.difference)
    seeds = f"{row.seeds[0]}" if row.test == "paired" else f"{row.seeds[0]} and {row.seeds[1]}"
    return [
        name,
        _mean(row.first, units),
        _mean(row.second, units),
        units.difference(effect.difference, signed=True) + (f"\n{interval}" if interval != DASH else ""),
        p_value(effect.p),
        {"none": DASH, "same": "the same\nruns"}.get(row.test, f"{row.test}\n{seeds} seeds"),
    ]


def _mean(setting: Setting, units: Units) -> str:
    score, lost = setting.score, [f"{setting.diverged}×"] * (setting.diverged > 0)
    words = [units.value(score.mean), units.interval(score.low, score.high)] if setting.finished else []
    return "\n".join([*words, *lost]) or DASH


def _sides(row: Row) -> tuple[str, str] | None:
    """What the two sides chose, without the options that are the same for both, chosen or not; None if that is all."""
    one, other = (dict(setting.chosen or ()) for setting in (row.first, row.second))
    # A side that did not choose an option has the value of its configuration.
    used = [flatten(setting.runs[0].config) | chosen for setting, chosen in ((row.first, one), (row.second, other))]
    differ = [key for key in {**one, **other} if used[0].get(key) != used[1].get(key)]
    sides = [candidate_words([(key, side[key]) for key in differ if key in side]) for side in (one, other)]
    return (sides[0], sides[1]) if differ else None


def _chosen(setting: Setting) -> str | None:
    return candidate_words(setting.chosen) if setting.chosen else None


def _values(row: Row, summary: Summary) -> dict[str, Any]:
    """A row with numbers as the metric gives them."""
    values: dict[str, Any] = {"arm": row.first.arm, "label": row.first.label, **dict(row.first.point)}
    values |= {"level": "yes" if row.level else "no", "metric": summary.metric.name}
    for name, setting in (("a", row.first), ("b", row.second)):
        score = setting.score
        values |= {f"mean_{name}": score.mean, f"low_{name}": score.low, f"high_{name}": score.high}
        values |= {f"finished_{name}": setting.finished, f"diverged_{name}": setting.diverged}
        values |= {f"missing_{name}": setting.missing, f"chosen_{name}": _chosen(setting)}
    effect = row.effect
    values |= {"difference": effect.difference, "low_difference": effect.low, "high_difference": effect.high}
    seeds = dict(zip(("seeds_a", "seeds_b"), row.seeds, strict=True))
    return jsonable(values | {"p_exploratory": effect.p, "test": row.test, **seeds})  # type: ignore[no-any-return]


def _csv(rows: Sequence[Row], first: Summary) -> str:
    text = io.StringIO()
    values = [_values(row, first) for row in rows]
    writer = csv.DictWriter(text, list(values[0]) if values else ["arm"])
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()


def _json(rows: Sequence[Row], first: Summary, second: Summary, folders: tuple[str, str]) -> str:
    pairs = zip("ab", folders, (first, second), strict=True)
    content: dict[str, Any] = {name: {"folder": folder, "title": of.study.title} for name, folder, of in pairs}
    found = differences(first.study, second.study)
    content["differences"] = [{"key": pair.key, "a": pair.first, "b": pair.second} for pair in found]
    content |= {"note": exploratory(rows), "rows": [_values(row, first) for row in rows]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
