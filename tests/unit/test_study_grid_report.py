"""The report of a grid: sweeps, further axes, kinds of statistics, layers; and what is not there."""

from __future__ import annotations

import csv
import html
import math
import re
from dataclasses import replace

import pytest
from report_fakes import LAYERS, cells_of, grid_study, open_page, plain_study, result_of, results_of, with_errors
from study_fakes import ERROR

from syncbn.study.analysis.evaluations import columns_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan.contrasts import default_contrasts
from syncbn.study.plan.grid import Sweep
from syncbn.study.report.curves import curves_figure, loss_curve, mean_curve, score_curve
from syncbn.study.report.figures import arm_marks, main_figure
from syncbn.study.report.format import compact
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import (
    LEVELS,
    effective_table,
    heat_level,
    heat_maps,
    means_tables,
    print_table,
    runs_csv,
    settings_table,
)

NO_NUMBER = re.compile(r"\b(nan|NaN|None|inf)\b")
MOST_BYTES = 600_000
"""Reports of several studies are kept in the repository."""


def written(study, cells, results, out):
    path = write_report(study, cells, results, out, command="syncbn study run --config grid")
    text = path.read_text()
    shown = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    return path, text, re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", shown)))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    study = grid_study()
    cells = cells_of(study)
    results = results_of(cells)
    gone = [cell for cell in cells if (cell.arm, cell.seed) == ("renorm", 5)]
    for cell in gone[:2]:
        del results[cell.key]
    out = tmp_path_factory.mktemp("grid")
    return study, cells, results, *written(study, cells, results, out)


def test_grid_page_is_whole_and_small(grid):
    study, _, _, path, text, words = grid
    assert len(text) < MOST_BYTES
    assert sum(file.stat().st_size for file in path.parent.glob("*.svg")) < MOST_BYTES / 2
    assert not NO_NUMBER.search(words)
    for arm in study.arms:
        assert words.count(arm.label) >= 5
    for heading in ("contrasts", "curves", "statistics", "layers", "costs", "numbers", "configuration", "methods"):
        assert f'<h2 id="{heading}">' in text
        assert f'href="#{heading}"' in text
    names = {name for pair in re.findall(r'id="([^"]*)"|href="#([^"]*)"', text) for name in pair if name}
    assert set(re.findall(r'<a href="#([^"]*)"', text)) <= names
    assert {file.name for file in path.parent.iterdir()} == {
        "report.html",
        "results.csv",
        "error_by_nbs.svg",
        "error_by_nbs.png",
        "contrasts.svg",
        "curves.svg",
        "statistics.svg",
    }
    for file in path.parent.glob("*.svg"):
        svg = file.read_text()
        assert svg.count("<svg") == svg.count("</svg>") == 1
        assert "<path" in svg


def test_grid_words_are_of_its_numbers(grid):
    words = grid[5]
    assert re.search(
        r"At 2 images per GPU, Local BatchNorm costs 2\d points of test error against SyncBatchNorm", words
    )
    assert "Diverged, so not compared: No normalization in 1 of 6 runs." in words
    assert "Nothing is claimed for 1 of 11 contrasts: 322 of 324 runs have a result." in words
    assert "global batch, learning rate and steps are the same everywhere" in words
    assert "training images 50,000 test images 10,000" in words
    assert "corrected by Holm, over 11 planned contrasts." in words
    assert "Intervals cover seeds only" in words


def test_page_and_files_have_the_same_digits(grid):
    study, cells, results, _, text, _ = grid
    summary = summary_of(study, cells, results)
    table = settings_table(summary)
    rows = {(row[0].removesuffix(" (reference)"), row[1]): row for row in table.rows}
    local = rows["Local BatchNorm", "2"]
    errors = [results[c.key].score for c in cells if (c.arm, dict(c.point)) == ("batch", {"per_gpu_batch_size": 2})]
    assert local[3] == f"{100 * sum(errors) / len(errors):.1f}"
    assert local[-len(errors) :] == [f"{100 * error:.1f}" for error in errors]
    assert f"<td>{local[3]}</td>" in text
    assert sum(name == "GroupNorm" for name, _ in rows) == 1  # a level arm has one row
    assert rows["GroupNorm", "all"]


def test_grid_page_opens_with_all_figures_and_tables(grid, tmp_path):
    study, cells, _, path, text, _ = grid
    dom = open_page(path, tmp_path)
    batch = sum(next(c for c in cells if c.arm == arm.name).config.norm.uses_batch for arm in study.arms)
    assert dom.count("<svg") == text.count("<svg") == 4  # main, contrasts, curves, statistics
    assert dom.count("<table") == 1 + 1 + 1 + batch + 1 + 1 + 1
    lines = batch * len(study.sweep.values) + (len(study.arms) - batch)
    means, contrasts, costs = 1 + len(study.arms), len(study.arms), 1 + len(study.arms)
    rows = means + contrasts + (1 + batch) + batch * (1 + len(LAYERS)) + (1 + len(LAYERS)) + costs + (1 + lines)
    assert dom.count("<tr>") == rows


def test_an_arm_that_is_level_has_its_number_at_every_size(grid, capsys):
    """A reader who looks for GroupNorm at one image per GPU finds it there."""
    study, cells, results, *_ = grid
    (means,) = means_tables(summary_of(study, cells, results))
    rows = {arm: row[1:] for arm, row in zip(means.arms, means.rows, strict=True)}
    level = [results[cell.key].score for cell in cells if cell.arm == "group" and cell.point == cells[-1].point]
    assert rows["group"] == [f"={100 * sum(level) / len(level):.1f}"] * len(study.sweep.values)
    assert not any("=" in cell for cell in rows["batch"])
    print_table(study, cells, results)
    printed = capsys.readouterr().out
    assert re.search(rf"^ GroupNorm +({rows['group'][0]} *){{8}}$", printed, flags=re.MULTILINE)
    assert "=: the same runs in the whole row" in printed


def test_csv_has_one_line_a_run_with_axes_and_evaluations(grid):
    study, cells, results, path, _, _ = grid
    lines = list(csv.DictReader(path.with_name("results.csv").open()))
    assert len(lines) == len({(cell.arm, cell.key) for cell in cells}) == 324
    kinds = ["batch", *(f"population_{estimator}_{n}" for n in (128, 1024) for estimator in ("mean", "total"))]
    assert [name for name in lines[0] if name.startswith("error_")] == ["error_running", *(f"error_{k}" for k in kinds)]
    by_run = {(cell.arm, cell.key): cell for cell in cells}
    for line in lines:
        cell = by_run[line["arm"], line["key"]]
        level = not cell.config.norm.uses_batch
        assert line["level"] == ("yes" if level else "no")
        assert line["per_gpu_batch_size"] == ("" if level else str(dict(cell.point)["per_gpu_batch_size"]))
        result = results.get(cell.key)
        done = "missing" if result is None else "diverged" if result.status == "diverged" else "done"
        assert line["status"] == done
        entries = result.evaluations if result is not None else []
        total = [e["test"]["error"] for e in entries if (e["estimator"], e["samples"]) == ("total", 1024)]
        assert line["error_population_total_1024"] == (str(total[0]) if total else "")
        assert line["peak_memory_bytes"] == ("" if result is None else str(result.peak_memory_bytes))
        assert line["test_images"] == ("" if result is None else "10000")
    text = runs_csv(study, cells, {}, failed=[cells[0].key], running=[cells[1].key])
    path.with_name("empty.csv").write_text(text)
    states = [line["status"] for line in csv.DictReader(path.with_name("empty.csv").open())]
    path.with_name("empty.csv").unlink()
    assert states[:3] == ["failed", "running", "missing"]


def test_terminal_tables_fit_80_columns(grid, capsys):
    study, cells, results, *_ = grid
    print_table(study, cells, results)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "Local BatchNorm" in printed
    assert re.search(r"\b49\.\d\b", printed)
    assert "better" in printed


def test_coupled_sweep_has_a_panel_for_what_is_held(tmp_path):
    sweep = Sweep(kind="coupled", values=(2, 8, 32), hold=("epochs", "steps"), steps=400)
    study = grid_study(arms=7, seeds=3, sweep=sweep, contrasts=())
    study = replace(study, contrasts=default_contrasts(study))
    cells = cells_of(study)
    results = results_of(cells)
    path, _, words = written(study, cells, results, tmp_path)
    assert "At 2 images per GPU, constant epochs, Local BatchNorm costs" in words
    assert "global batch and learning rate vary with the batch on each GPU; constant epochs and 400 steps" in words
    figure = main_figure(summary_of(study, cells, results), arm_marks(study))
    assert [axes.get_title("left") or axes.get_title() for axes in figure.axes] == ["constant epochs", "constant steps"]
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks == [["32", "8", "2"]] * 2  # nothing is level: a coupled sweep changes the training of every arm
    assert "constant steps" in path.with_name("error_by_nbs.svg").read_text()


def test_level_arms_are_one_column_of_points_each():
    study = grid_study(arms=9, values=4, seeds=3)
    cells = cells_of(study)
    (axes,) = main_figure(summary_of(study, cells, results_of(cells)), arm_marks(study)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "4", "2", "1", "unaffected"]
    marks = arm_marks(study)
    level = [arm.name for arm in study.arms if arm.name in ("group", "layer", "instance")]
    places = []
    for name in level:
        drawn = [line for line in axes.lines if line.get_color() == marks[name].colour and len(line.get_xdata())]
        assert {len(line.get_xdata()) for line in drawn} == {1}
        (mean,) = {line.get_xdata()[0] for line in drawn if line.get_marker() == marks[name].marker}
        (seeds,) = {line.get_xdata()[0] for line in drawn if line.get_marker() == "."}
        assert 0 < seeds - mean < 0.2  # beside the mean's mark, not under it
        places.append(mean)
    assert len(set(places)) == len(level)


def test_arms_have_marks_of_their_own():
    for arms in (3, 12):
        marks = arm_marks(grid_study(arms=arms))
        assert len({mark.colour for mark in marks.values()}) == arms
    study = grid_study(arms=2)
    many = tuple(replace(study.arms[1], name=f"arm{i}") for i in range(40))
    marks = arm_marks(replace(study, arms=(study.arms[0], *many)))
    assert len({mark.colour for mark in marks.values()}) == 41


def test_axis_of_numbers_goes_across_where_there_is_no_sweep(tmp_path):
    study = grid_study(arms=2, seeds=2, sweep=None, grid={"data.class_skew": (1, 2, 4)}, contrasts=())
    cells = cells_of(study)
    path, _, words = written(study, cells, results_of(cells), tmp_path)
    assert path.with_name("error_by_class_skew.svg").is_file()
    assert "images of one class in a row" in words
    assert "The study plans no contrast, so nothing is compared." in words
    assert summary_of(study, cells, {}).values == (1, 2, 4)
    swept = grid_study(values=3)
    assert summary_of(swept, cells_of(swept), {}).values == (4, 2, 1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_pages_of_unfinished_studies(tmp_path, capsys, seeds):
    study = grid_study(arms=3, values=2, seeds=seeds)
    cells = cells_of(study)
    _, text, words = written(study, cells, {}, tmp_path)
    assert words.count("No run has a result yet.") == 1
    assert "<svg" not in text
    assert not NO_NUMBER.search(words)
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "results.csv"}
    diverged = {c.key: replace(result_of(c), status="diverged", test=None, history=[]) for c in cells}
    _, text, words = written(study, cells, diverged, tmp_path)
    assert "Diverged, so not compared" in words
    assert not NO_NUMBER.search(words)
    print_table(study, cells, diverged)
    assert f"{seeds}×" in capsys.readouterr().out


def test_user_labels_are_escaped_everywhere(tmp_path):
    study = grid_study(arms=3, values=2, seeds=2, question="<i>?</i>")
    bad = "</svg><script>alert(1)</script>"
    study = replace(study, arms=tuple(replace(arm, label=f"{bad} {arm.name}") for arm in study.arms))
    cells = cells_of(study)
    path, text, _ = written(study, cells, results_of(cells), tmp_path)
    assert "<script" not in text
    assert "<i>" not in text
    assert all("<script" not in file.read_text() for file in path.parent.glob("*.svg"))


def test_a_run_that_was_tested_once_has_a_mark_among_the_curves():
    study = plain_study(seeds=2, arms=("batch", "sync"))
    cells = cells_of(study)
    results = {key: replace(run, history=run.history[-1:]) for key, run in results_of(cells).items()}
    settings = summary_of(study, cells, results).at(())
    losses, errors = curves_figure(settings, arm_marks(study), ERROR).axes
    means = [line for line in errors.lines if line.get_linewidth() > 1]
    assert [len(line.get_xdata()) for line in means] == [1, 1]
    assert all(line.get_marker() not in ("", "None") for line in means)
    assert all(len(line.get_xdata()) > 10 for line in losses.lines)


def test_curves_of_runs():
    run = result_of(cells_of(plain_study(seeds=1, arms=("batch",)))[0])
    assert loss_curve(replace(run, losses=[3.0, 1.0])) == [(1, 3.0), (2, 1.0)]
    thinned = loss_curve(replace(run, losses=[float(i) for i in range(150)]))
    assert len(thinned) <= 60
    assert thinned[0] == (3, 1.0)
    assert thinned[-1][0] == 150
    assert score_curve(run)[-1] == (390.0, run.score)
    assert mean_curve([[(1, 0.2), (2, 0.4)], [(2, 0.2)]]) == [(2, pytest.approx(0.3))]
    assert mean_curve([[]]) == []


def test_heat_maps_show_one_quantity():
    study = grid_study(arms=2, values=3, seeds=2)
    cells = cells_of(study)
    results = results_of(cells, layers=30)
    other = next(c for c in cells if c.arm == "batch" and c.config.per_gpu_batch_size == 2)
    results[other.key].layers[0].update({"kl": None, "effective": None})
    summary = summary_of(study, cells, results)
    maps = heat_maps(summary)
    assert [(found.title, found.columns, len(found.rows)) for found in maps] == [
        ("Local BatchNorm", ["4", "2", "1"], 24),
        ("SyncBatchNorm", ["4", "2", "1"], 24),
    ]
    assert maps[0].rows[0][0] == "layer0.0.norm"
    assert maps[0].rows[-1][0] == "layer3.5.norm"
    cells_shown = [cell for found in maps for _, row in found.rows for cell in row]
    assert all(cell.level is not None for cell in cells_shown)  # the other seed has that layer
    for cell in cells_shown:
        below = [level for level in LEVELS if float(cell.text.replace("<", "0")) >= level]
        assert len(below) == cell.level
    assert [heat_level(value) for value in (0.001, 0.003, 0.5, 99.0, math.nan)] == [0, 1, 5, 8, None]
    assert effective_table(summary).title == "Local BatchNorm"
    assert [compact(value) for value in (0.0312, 3.44, 1900, 2.1e6, math.nan)] == ["0.031", "3.4", "1.9k", "2.1M", "–"]


def test_level_runs_are_flagged(tmp_path):
    study = grid_study(arms=7, values=3, seeds=2)
    (tmp_path / "results.csv").write_text(runs_csv(study, cells_of(study), {}))
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {line["arm"] for line in lines if line["level"] == "yes"} == {"group"}
    assert {line["level"] for line in lines if line["arm"] == "group"} == {"yes"}


def test_own_batch_of_batch_renormalization_is_no_evaluation(tmp_path):
    study = plain_study(arms=("renorm", "sync"), reference="sync", seeds=3)
    cells = cells_of(study)
    results = results_of(cells)
    for cell in cells:
        if cell.arm == "renorm":
            entries = [
                {"statistics": "running", "estimator": None, "samples": None, "test": {"error": 0.5}},
                {"statistics": "batch", "estimator": None, "samples": None, "test": {"error": 0.1}},
                {"statistics": "population", "estimator": "total", "samples": 1024, "test": {"error": 0.6}},
            ]
            results[cell.key] = replace(results[cell.key], test={"error": 0.5}, evaluations=entries)
    (tmp_path / "results.csv").write_text(runs_csv(study, cells, results))
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert all((line["error_batch"] == "") == (line["arm"] == "renorm") for line in lines)


def test_numbers_of_images_that_were_rounded_apart_share_a_column():
    cell = cells_of(plain_study(seeds=1, arms=("batch",)))[0]
    several = [result_of(cell, samples=(128, 1024)), result_of(cell, samples=(128, 1088)), result_of(cell, samples=())]
    names = [name for name, _ in columns_of(several)]
    assert names == [
        "running",
        "batch",
        "population_mean_128",
        "population_total_128",
        "population_mean_1024_to_1088",
        "population_total_1024_to_1088",
    ]
    assert len(columns_of([result_of(cell, samples=(1024, 1088))])) == 6  # two columns each: one run has both


def test_page_of_a_study_with_missing_runs(tmp_path):
    study = plain_study(seeds=8)
    errors = {name: [0.1 + 0.001 * i for i in range(8)] for name in ("batch", "sync", "group")}
    errors["sync"][7] = "missing"
    errors["group"][3] = "diverged"
    cells, results = with_errors(study, errors)
    _, _, words = written(study, cells, results, tmp_path)
    assert "Nothing is claimed for 1 of 2 contrasts: 23 of 24 runs have a result." in words
    assert "SyncBatchNorm − Local BatchNorm 1 run missing" in words
    assert "GroupNorm − Local BatchNorm diverged –" in words
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert sorted({line["status"] for line in lines}) == ["diverged", "done", "missing"]
