"""The curves and columns of a study over a training loop of the user's, which reports what it likes."""

from __future__ import annotations

import csv
import html
import re
from dataclasses import replace

import numpy as np
import pytest
from report_fakes import cells_of, plain_study, result_of

from syncbn.study.analysis.summary import summary_of
from syncbn.study.report.curves import (
    MAX_REPORTED,
    curves_figure,
    reported_curve,
    reported_figure,
    reported_names,
    spread_words,
)
from syncbn.study.report.figures import arm_marks
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import cost_table
from syncbn.train.result import Metric

DICE = Metric("dice", higher_is_better=True)


def study_of(seeds=3, metric=DICE):
    """Local BatchNorm and SyncBatchNorm in a loop of the user's."""
    return plain_study(seeds=seeds, arms=("batch", "sync"), run="mine:run", metric=metric, base={})


def value(cell, name, step):
    return {"batch": 0.5, "sync": 0.7}[cell.arm] + 0.01 * cell.seed + 0.0001 * step + len(name)


def results_of(cells, names=("dice", "loss"), steps=(10, 20, 30), metric=DICE):
    """Results as a user's loop has them: no figures but its seconds, and what it reported."""
    found = {}
    for cell in cells:
        history = [
            {
                "step": step,
                **dict.fromkeys(("epoch", "train_loss", "validation")),
                "test": {name: value(cell, name, step) for name in names},
            }
            for step in steps
        ]
        unknown = dict.fromkeys(("samples", "samples_per_second", "parameters", "peak_memory_bytes"))
        unknown |= dict.fromkeys(("train_samples", "validation_samples", "test_samples"))
        own = {"metric": metric, "status": "ok", "test": {metric.name: 0.8 + 0.01 * cell.seed}, "history": history}
        found[cell.key] = replace(
            result_of(cell), **unknown, **own, losses=[], evaluations=[], layers=[], steps=max(steps, default=0)
        )
    return found


def settings_of(study, results):
    return summary_of(study, cells_of(study), results).at(())


def drawn(axes):
    """The thick lines, and the thin ones."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    return [line for line in lines if line.get_linewidth() > 1], [line for line in lines if line.get_linewidth() < 1]


def test_a_panel_for_each_metric_with_means_and_runs():
    study = study_of()
    cells = cells_of(study)
    results = results_of(cells)
    settings = settings_of(study, results)
    names = reported_names(settings)
    assert names == ["dice", "loss"]
    every = reported_figure(settings, arm_marks(study), names).axes
    assert [axes.get_ylabel() for axes in every] == names
    assert [axes.get_xlabel() for axes in every] == ["", "step"]
    for axes, name in zip(every, names, strict=True):
        means, runs = drawn(axes)
        assert (len(means), len(runs), len(axes.collections)) == (2, 6, 0)
        for line, arm in zip(means, ("batch", "sync"), strict=True):
            own = [cell for cell in cells if cell.arm == arm]
            assert line.get_color() == arm_marks(study)[arm].colour
            assert list(line.get_xdata()) == [10, 20, 30]
            expected = [np.mean([value(cell, name, step) for cell in own]) for step in (10, 20, 30)]
            assert list(line.get_ydata()) == pytest.approx(expected)
    assert spread_words(settings) == "thin lines are single runs"


def test_many_runs_are_a_band_from_the_least_to_the_greatest():
    study = study_of(seeds=16)
    cells = cells_of(study)
    settings = settings_of(study, results_of(cells))
    (axes,) = reported_figure(settings, arm_marks(study), ["loss"]).axes
    means, runs = drawn(axes)
    assert (len(means), len(runs), len(axes.collections)) == (2, 0, 2)
    (path,) = axes.collections[0].get_paths()
    ends = [value(cell, "loss", step) for cell in cells if cell.arm == "batch" for step in (10, 30)]
    assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == pytest.approx((min(ends), max(ends)))
    assert spread_words(settings) == "bands reach from the least to the greatest run"
    trained = [replace(s, results=tuple(map(result_of, [c for c in cells if c.arm == s.arm]))) for s in settings]
    top, bottom = curves_figure(trained, arm_marks(study), trained[0].runs[0].metric).axes
    assert [len(axes.collections) for axes in (top, bottom)] == [2, 2]
    errors = [entry["test"]["error"] for s in trained for run in s.runs for entry in run.history]
    low, high = bottom.get_ylim()
    assert low < min(errors) < max(errors) < high, "no band is cut off"


def test_the_studys_metric_comes_first_and_a_few_panels_are_enough():
    study = study_of()
    cells = cells_of(study)
    names = ("a", "b", "c", "validation_dice", "d", "dice", "e")
    found = reported_names(settings_of(study, results_of(cells, names)))
    assert found == ["dice", "validation_dice", "a", "b"]
    assert len(found) == MAX_REPORTED
    once = results_of(cells, ("dice",), steps=(10,))
    assert reported_names(settings_of(study, once)) == [], "one value is no curve"
    assert reported_names(settings_of(study, {})) == []


def test_a_value_that_is_not_finite_is_left_out():
    cell = cells_of(study_of())[0]
    (run,) = results_of([cell]).values()
    run.history[1]["test"]["loss"] = None  # as it is read from a file
    assert reported_curve(run, "loss") == [(10.0, value(cell, "loss", 10)), (30.0, value(cell, "loss", 30))]


def page_of(study, results, out):
    text = write_report(study, cells_of(study), results, out, command="syncbn study run").read_text()
    shown = re.sub(r"<(style|svg).*?</\1>", "", text, flags=re.DOTALL)
    return text, re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", shown)))


def test_the_page_says_what_the_curves_are(tmp_path):
    study = study_of()
    text, words = page_of(study, results_of(cells_of(study)), tmp_path)
    assert '<h2 id="curves">Reported while it trained' in text
    assert 'href="#curves"' in text
    assert "What the training loop gave to setting.report , under the names that it chose" in words
    assert "thin lines are single runs." in words
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert text.count("<svg") == 3  # the main figure, the contrast, the curves
    assert not re.search(r"\b(nan|NaN|None|inf)\b", words)


def test_a_page_without_reports_has_no_curves(tmp_path):
    study = study_of()
    text, words = page_of(study, results_of(cells_of(study), steps=()), tmp_path)
    assert "curves" not in text
    assert "arm seconds ● Local BatchNorm 100" in words
    assert not (tmp_path / "curves.svg").exists()


def test_costs_have_no_column_that_no_run_has():
    study = study_of()
    cells = cells_of(study)
    results = results_of(cells)
    table = cost_table(summary_of(study, cells, results))
    assert table.head == ["arm", "steps", "seconds"]
    assert table.rows == [["Local BatchNorm", "30", "100"], ["SyncBatchNorm", "30", "100"]]
    some = next(iter(results))
    results[some] = replace(results[some], parameters=1234)
    table = cost_table(summary_of(study, cells, results))
    assert table.head == ["arm", "parameters", "steps", "seconds"]
    assert [row[1] for row in table.rows] == ["1,234", "–"]


def test_a_loss_that_no_run_has_is_no_column(tmp_path):
    study = study_of()
    results = results_of(cells_of(study))
    page_of(study, results, tmp_path)
    (head, *_) = csv.reader((tmp_path / "results.csv").open())
    assert [name for name in head if name.startswith("test_")] == ["test_dice", "test_samples"]
    old = {key: replace(run, test={"loss": None, **run.test}) for key, run in results.items()}
    page_of(study, old, tmp_path)
    assert next(csv.reader((tmp_path / "results.csv").open())) == head, "as earlier versions wrote it"
    own = {key: replace(run, test={**run.test, "loss": 1.5}) for key, run in results.items()}
    page_of(study, own, tmp_path)
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {line["test_loss"] for line in lines} == {"1.5"}
