"""The report of a study: one self-contained page, the numbers as CSV, the main figure as SVG and PNG."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncbn.study.plan import Cell, Study
from syncbn.study.plots import arm_colours, curve_figure, curve_limits, error_figure, inline_svg, save_figure
from syncbn.study.runner import Outcome, repeat_id
from syncbn.study.summary import Row, answer, percent, repeat_words, spread, summary_rows, write_csv
from syncbn.train.result import RunResult, write_atomically

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, kw_only=True)
class TableLine:
    """One arm, as the table shows it."""

    label: str
    reference: bool
    colour: str
    normalization_batch_size: str
    error: str
    seeds: list[str]
    """One text a seed."""
    images_per_second: str


def write_report(
    study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], out: Path, *, command: str
) -> Path:
    """Write ``report.html``, ``results.csv``, ``error_by_arm.svg`` and ``.png`` to ``out``.

    Args:
        study, cells: as they were run.
        outcomes: of :func:`syncbn.study.runner.run_cells`; cells without a result are shown as missing.
        out: the study's folder.
        command: what made it, for the page.

    Returns:
        The path of the page. It is one file that needs no network.
    """
    results = _results(outcomes)
    rows = summary_rows(study, cells, results)
    colours = arm_colours([arm.name for arm in study.arms], study.reference.name if study.reference else None)
    figure = error_figure(rows, colours)
    save_figure(figure, out / "error_by_arm")
    write_csv(study, cells, results, out / "results.csv")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = importlib.resources.files("syncbn.study").joinpath(TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        study=study,
        answer=answer(rows),
        errors_svg=inline_svg(figure, "errors", "Test error of each arm"),
        curves=_curves(rows, colours),
        lines=table_lines(rows, colours),
        repeat=_repeat(study, cells, outcomes),
        versions=_versions(results),
        failures=[(o.job.label, o.message) for o in outcomes.values() if o.status == "failed"],
        base=yaml.safe_dump(study.base, sort_keys=False, default_flow_style=None).strip(),
        overrides={arm.label: yaml.safe_dump(arm.overrides, default_flow_style=True).strip() for arm in study.arms},
        command=command,
    )
    write_atomically(out / "report.html", page)
    return out / "report.html"


def table_lines(rows: Sequence[Row], colours: Mapping[str, str]) -> list[TableLine]:
    """The rows in words, in their order."""
    return [
        TableLine(
            label=row.label,
            reference=row.reference,
            colour=colours[row.name],
            normalization_batch_size="–" if row.normalization_batch_size is None else str(row.normalization_batch_size),
            error=_error(row),
            seeds=["–" if r is None else _seed(r) for r in row.results],
            images_per_second="–" if row.images_per_second != row.images_per_second else f"{row.images_per_second:.0f}",
        )
        for row in rows
    ]


def print_table(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> None:
    """The table of the page, on the terminal."""
    rows = summary_rows(study, cells, _results(outcomes))
    table = Table(title=Text(study.title))
    for heading in ("arm", "norm. batch", "test error", "seeds", "images/s"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for line in table_lines(rows, {row.name: "" for row in rows}):
        label = f"{line.label} (reference)" if line.reference else line.label
        words = (label, line.normalization_batch_size, line.error, "  ".join(line.seeds), line.images_per_second)
        table.add_row(*(Text(word) for word in words))  # not markup: a label may hold brackets
    Console(width=None if Console().is_terminal else 110).print(table)


def _results(outcomes: Mapping[str, Outcome]) -> dict[str, RunResult]:
    return {key: outcome.result for key, outcome in outcomes.items() if outcome.result is not None}


def _error(row: Row) -> str:
    words = [spread(row.mean, row.sd)] if row.finished else []
    words += [f"{row.diverged} diverged"] if row.diverged else []
    words += [f"{row.missing} missing"] if row.missing else []
    return ", ".join(words)


def _seed(result: RunResult) -> str:
    return "diverged" if result.test_error is None else percent(result.test_error)


def _curves(rows: Sequence[Row], colours: Mapping[str, str]) -> list[tuple[str, str]]:
    """For each arm that has any, its label and its learning curves as SVG."""
    limits = curve_limits(rows)
    reference = next((row for row in rows if row.reference), None)
    if limits is None:
        return []
    return [
        (
            row.label,
            inline_svg(
                curve_figure(row, None if row.reference else reference, colours[row.name], limits),
                f"curve{number}",
                f"Test error of {row.label} over the epochs",
            ),
        )
        for number, row in enumerate(rows)
    ]


def _repeat(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> str | None:
    repeat = study.repeat_distributed
    if repeat is None:
        return None
    cell = next(c for c in cells if (c.arm, c.seed) == (repeat.arm, repeat.seed))
    label = next(arm.label for arm in study.arms if arm.name == repeat.arm)
    emulated, repeated = outcomes.get(cell.key), outcomes.get(repeat_id(repeat, cells))
    return repeat_words(
        emulated.result if emulated else None,
        repeated.result if repeated else None,
        f"{label}, seed {repeat.seed},",
        repeat.processes,
        repeated.message if repeated else "",
    )


def _versions(results: Mapping[str, RunResult]) -> list[tuple[str, str]]:
    """What the runs ran on: each property once, with all the values that occur."""
    found: dict[str, dict[str, Any]] = {}
    for result in results.values():
        for name, value in result.environment.items():
            found.setdefault(name, {})[value] = None
    return [(name, ", ".join(values)) for name, values in found.items()]
