"""A study's main table for papers and other programs, and its figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from syncbn.study.analysis.findings import Finding, findings_of
from syncbn.study.analysis.summary import Summary, summary_of
from syncbn.study.plan.grid import Cell, Study
from syncbn.study.report import figures
from syncbn.study.report.format import (
    DASH,
    MINUS,
    SPACE,
    axis_word,
    candidate_words,
    capital,
    frame_choices,
    plural,
    side,
    value_word,
)
from syncbn.study.report.report import drawings
from syncbn.study.report.units import Units
from syncbn.train.config import ConfigError
from syncbn.train.result import RunResult

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("latex", "csv", "json", "parquet", "pdf", "svg")
"""The last two are the figures, the others the table."""


def export(study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult], form: str, to: Path) -> list[Path]:
    """Write the main table to the file ``to``, or the figures to the folder ``to``; returns what was written.

    Raises:
        ConfigError: ``to`` is of the wrong kind.
        ImportError: pandas needs another package for this format.
    """
    summary = summary_of(study, cells, results)
    findings = findings_of(summary)
    if form in ("pdf", "svg"):
        if to.exists() and not to.is_dir():
            raise ConfigError("to", to, f"a folder for the figures ({form})")
        to.mkdir(parents=True, exist_ok=True)
        written = []
        for file, draw, what in drawings(summary, findings).values():
            written.append(to / f"{file}.{form}")
            figures.save(written[-1], draw, *what)
        return written
    if to.is_dir():
        raise ConfigError("to", to, f"the name of a {form} file, not a folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    frame = main_frame(summary, findings)
    if form == "latex":
        to.write_text(latex(summary, findings), encoding="utf-8")
    elif form == "csv":
        frame.to_csv(to, index=False)
    elif form == "json":
        frame.to_json(to, orient="records", indent=1)
    else:
        try:
            frame.to_parquet(to, index=False)
        except ImportError as error:
            raise ImportError("parquet files need: pip install pyarrow") from error
    return [to]


def main_frame(summary: Summary, findings: Sequence[Finding]) -> pd.DataFrame:
    """One row for each setting, with numbers as the task gives them: fractions for a metric in percent.

    ``verdict``, ``difference``, ``low_difference``, ``high_difference`` and ``p`` are of the first planned contrast
    between the setting and ``against``; empty without one.
    """
    import pandas as pd

    rows = []
    for setting in summary.settings.values():
        finding = _finding_of(setting.arm, setting.point, findings)
        row = {"arm": setting.arm, "label": setting.label, **dict(setting.point)}
        row |= {"normalization_batch_size": setting.normalization_batch_size, "metric": summary.metric.name}
        row |= {
            "mean": setting.score.mean,
            "low": setting.score.low,
            "high": setting.score.high,
            "sd": setting.score.sd,
        }
        row |= {"finished": setting.finished, "diverged": setting.diverged, "missing": setting.missing}
        if summary.study.tune is not None:
            chosen = candidate_words(setting.chosen) if setting.chosen else None
            against = None if finding is None else frame_choices(summary, finding.contrast)["chosen_against"]
            row |= {"chosen": chosen, "chosen_against": against}
        if finding is not None:
            row |= {"against": finding.contrast.second.arm, "verdict": finding.verdict, "p": finding.p}
            row |= {"difference": finding.difference, "low_difference": finding.low, "high_difference": finding.high}
        rows.append(row)
    return pd.DataFrame(rows).astype({"normalization_batch_size": "Int64"})  # it may be missing


def latex(summary: Summary, findings: Sequence[Finding]) -> str:
    """The main table in LaTeX, for the package booktabs: mean, 95 % interval and verdict of each setting."""
    study, units = summary.study, Units(summary.metric)
    found = [_finding_of(setting.arm, setting.point, findings) for setting in summary.settings.values()]
    others = [DASH if f is None else side(study, f.contrast.second, f.contrast.first) for f in found]
    planned = list(dict.fromkeys(other for other in others if other != DASH))
    heads = ["arm", *(axis_word(study, name) for name in study.axes), units.heading, "95 % interval"]
    heads += ["verdict"] * bool(planned) + ["against"] * (len(planned) > 1)
    lines = [heads]
    for setting, finding, other in zip(summary.settings.values(), found, others, strict=True):
        name = f"{setting.label} (reference)" if setting.reference else setting.label
        lost = f" ({plural(setting.diverged, 'run')} diverged)" if setting.diverged else ""
        interval = units.interval(setting.score.low, setting.score.high)
        cells = [name, *(value_word(value) for _, value in setting.point)]
        cells += [units.value(setting.score.mean) + lost, interval]
        verdict = DASH if finding is None else finding.verdict or "not finished"
        lines.append([*cells, verdict, other][: len(heads)])
    columns = "l" * (1 + len(study.axes)) + "rr" + "l" * (len(heads) - 3 - len(study.axes))
    head, *body = [" & ".join(map(_escaped, cells)) + r" \\" for cells in lines]
    caption = _escaped(_caption(summary, planned, dashes=DASH in others))
    table = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join(
        [*table, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    )


def _caption(summary: Summary, planned: Sequence[str], *, dashes: bool) -> str:
    """What the table holds; ``planned`` are the settings that others are compared with."""
    study, units = summary.study, Units(summary.metric)
    seeds = plural(len(study.seeds), "seed")
    words = [f"{study.title}.", f"{capital(units.heading)}: mean over {seeds} and 95 % interval."]
    if planned:
        against = f" against {planned[0]}" if len(planned) == 1 else ""
        words.append(f"Verdicts are of the planned contrasts{against}, by a paired t test with Holm's correction.")
        words += [f"{DASH} in place of a verdict: no contrast is planned for the setting."] * dashes
    return " ".join(words)


def _finding_of(arm: str, point: object, findings: Sequence[Finding]) -> Finding | None:
    """The first contrast of two settings whose first one is this."""
    return next(
        (
            f
            for f in findings
            if f.contrast.minus is None and (f.contrast.first.arm, f.contrast.first.point) == (arm, point)
        ),
        None,
    )


def _escaped(text: str) -> str:
    """Text in which LaTeX finds no command."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"} | {
        MINUS: "$-$",
        SPACE: "~",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }
    return "".join(special.get(character, character) for character in text)
