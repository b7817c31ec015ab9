"""The report of a study: one self-contained page, the numbers as CSV, and the figures as files of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from syncbn.study.analysis.evaluations import evaluated_settings
from syncbn.study.analysis.findings import Finding, findings_of
from syncbn.study.analysis.statistics import SPREAD_FLOOR, TEST
from syncbn.study.analysis.summary import Summary, summary_of
from syncbn.study.plan.alike import alike, named
from syncbn.study.plan.grid import Arm, Cell, Study, unique_cells
from syncbn.study.plan.parity_file import read_parity
from syncbn.study.plan.tuning import trial_cells
from syncbn.study.report import curves, figures, tables
from syncbn.study.report.format import axis_word, capital, joined, place_words, value_word
from syncbn.study.report.tuning import choices_table
from syncbn.study.report.units import Units
from syncbn.study.report.verdict import verdict
from syncbn.train.result import RunResult, write_atomically
from syncbn.train.yaml_file import yaml_text


def write_report(
    study: Study,
    cells: Sequence[Cell],
    results: Mapping[str, RunResult],
    out: Path,
    *,
    command: str,
    failures: Mapping[str, str] | None = None,
    running: Collection[str] = (),
) -> Path:
    """Write ``report.html``, ``results.csv`` and the figures to ``out``.

    The main figure is ``error_by_arm`` or, along a sweep, ``error_by_nbs`` (``.svg`` and ``.png``), with the metric's
    name in place of ``error``. ``contrasts.svg``, ``statistics.svg`` and ``curves.svg`` are written if there is
    something to draw. The curves of a training loop of the user's are what it reported.

    Args:
        results: by the cells' keys. A cell without one is shown as missing.
        out: the study's folder. ``parity.json`` in it is shown if it is there.
        command: what made the report, for the page.
        failures: why runs failed, by their keys.
        running: keys of runs that are going on.

    Returns the path of the page, which is one file that needs no network.
    """
    failures = failures or {}
    summary = summary_of(study, cells, results, failures)
    findings = findings_of(summary)
    runs = tables.runs_csv(study, cells, results, failed=failures, running=running)
    write_atomically(out / "results.csv", runs)
    page = template("report.html.j2").render(
        study=study,
        marks=figures.arm_marks(study),
        metric=summary.metric,
        units=Units(summary.metric),
        capital=capital,
        verdict=verdict(summary, findings),
        test=TEST,
        spread_floor=SPREAD_FLOOR,
        figures=_figures(summary, findings, out),
        spread=curves.spread_words(summary.at(study.comparison_point())),
        **_tables(summary, findings),
        choices=choices_table(study, results, failures),
        levels=[f"{level:g}" for level in tables.LEVELS],
        shown=place_words(study, study.comparison_point()),
        across=axis_word(study, summary.across) if summary.across else "",
        sizes=_sizes(study, results),
        parity=read_parity(out),
        failures=_failed(study, cells, results, failures),
        plan=_plan(study),
        versions=versions_of(results),
        base=_yaml(study.base, block=True),
        arms=[(arm, _yaml(arm.overrides), _only(study, arm)) for arm in study.arms],
        command=command,
    )
    write_page(out / "report.html", page)
    return out / "report.html"


def _failed(
    study: Study, cells: Sequence[Cell], results: Mapping[str, RunResult], failures: Mapping[str, str]
) -> list[tuple[str, str]]:
    """The runs that failed, of the tuning and of the study, with the reason; those with the same one are one entry."""
    every = unique_cells([*trial_cells(study, results), *cells]) if failures else []
    failed = {cell.key: cell for cell in every if cell.key in failures}
    groups = alike({key: failures[key] for key in failed})
    return [(named(failed[keys[0]].label, len(keys)), failures[keys[0]]) for keys in groups]


def template(name: str, package: str = "syncbn.study.report") -> Template:
    """A page's template in ``package``, which may include those of this one."""
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("syncbn.study.report", "")])
    shape: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **shape).get_template(name)


def write_page(path: Path, page: str) -> None:
    """Write a rendered page without its empty lines."""
    write_atomically(path, "\n".join(line for line in page.splitlines() if line.strip()) + "\n")


def _figures(summary: Summary, findings: Sequence[Finding], out: Path) -> dict[str, str]:
    """The figures as SVG elements, by name; empty text for a figure without anything in it."""
    found = dict.fromkeys(("main", "contrasts", "statistics", "curves", "reported"), "")
    for name, (file, draw, what) in drawings(summary, findings).items():
        found[name] = figures.save(out / f"{file}.svg", draw, *what)
        if name == "main":
            figures.save(out / f"{file}.png", draw, *what)
    return found


def drawings(
    summary: Summary, findings: Sequence[Finding]
) -> dict[str, tuple[str, Callable[..., Figure], tuple[Any, ...]]]:
    """By the name of each figure that has something in it: its file's name, the function that draws it, and of what."""
    study, marks = summary.study, figures.arm_marks(summary.study)
    found: dict[str, tuple[str, Callable[..., Figure], tuple[Any, ...]]] = {}
    if not any(setting.runs for setting in summary.settings.values()):
        return found
    found["main"] = figures.main_figure_name(summary), figures.main_figure, (summary, marks)
    words = [row[0] for row in tables.contrasts_table(summary, findings).rows]
    if known := [(f, label) for f, label in zip(findings, words, strict=True) if not math.isnan(f.difference)]:
        found["contrasts"] = "contrasts", figures.forest_figure, tuple(zip(*known, strict=True))
    panel = summary.panel_of(study.comparison_point())
    every = evaluated_settings(summary).values()
    if items := [item for item in every if summary.panel_of(item.setting.point) == panel]:
        found["statistics"] = "statistics", figures.statistics_figure, (summary, items)
    here = [setting for setting in summary.at(study.comparison_point()) if setting.runs]
    if trained := [setting for setting in here if any(run.losses for run in setting.runs)]:
        found["curves"] = "curves", curves.curves_figure, (trained, marks, summary.metric)
    elif names := curves.reported_names(here):
        found["reported"] = "curves", curves.reported_figure, (here, marks, names)
    return found


def _tables(summary: Summary, findings: Sequence[Finding]) -> dict[str, Any]:
    """The tables by the names that the page gives them."""
    return {
        "contrasts": tables.contrasts_table(summary, findings),
        "means": tables.means_tables(summary),
        "settings": tables.settings_table(summary),
        "statistics": tables.statistics_table(summary),
        "maps": tables.heat_maps(summary),
        "effective": tables.effective_table(summary),
        "costs": tables.cost_table(summary),
    }


def _plan(study: Study) -> list[tuple[str, str]]:
    """The axes with their values, what stays the same along the sweep, and the seeds."""
    lines = [(f"{axis_word(study, name)} ({name})", ", ".join(map(value_word, v))) for name, v in study.axes.items()]
    sweep = study.sweep
    if sweep is not None and sweep.kind == "decoupled":
        same = "global batch, learning rate and steps" if study.tune is None else "global batch and steps"
        lines.append(("decoupled sweep", f"{same} are the same everywhere"))
    elif sweep is not None:
        held = joined([f"{sweep.steps} steps" if name == "steps" else f"constant {name}" for name in sweep.hold])
        lines.append(("coupled sweep", f"global batch and learning rate vary with the batch on each GPU; {held}"))
    if study.tune is not None:
        tried = "; ".join(f"{key} {', '.join(map(value_word, values))}" for key, values in study.tune.grid.items())
        halving = f"; successive halving by {study.tune.halving}" if study.tune.halving else ""
        lines.append(("chosen by validation", f"{tried}; seeds {', '.join(map(str, study.tune.seeds))}{halving}"))
    return [*lines, ("seeds", ", ".join(map(str, study.seeds)))]


def _only(study: Study, arm: Arm) -> str:
    """Where an arm is run, if not everywhere."""
    only = arm.only.items()
    return ", ".join(f"{axis_word(study, name)} {joined([value_word(v) for v in values])}" for name, values in only)


def _yaml(values: Mapping[str, Any], block: bool = False) -> str:
    return yaml_text(dict(values), default_flow_style=not block, width=1000).strip() if values else "nothing"


def _sizes(study: Study, results: Mapping[str, RunResult]) -> list[tuple[str, str]]:
    """Numbers of training, validation and test samples, with all the values that occur; without a set that is empty."""
    found = []
    for part, field in (("training", "train"), ("validation", "validation"), ("test", "test")):
        sizes = sorted({size for run in results.values() if (size := getattr(run, f"{field}_samples"))})
        if sizes:
            found.append((f"{part} {study.samples_word}", joined([f"{size:,}" for size in sizes])))
    return found


def versions_of(results: Mapping[str, RunResult]) -> list[tuple[str, str]]:
    """What the runs ran on: each property once, with all the values that occur."""
    found: dict[str, dict[str, None]] = {}
    for result in results.values():
        for name, value in result.environment.items():
            found.setdefault(name, {})[str(value)] = None
    return [(name.replace("_", " "), ", ".join(values)) for name, values in found.items()]
