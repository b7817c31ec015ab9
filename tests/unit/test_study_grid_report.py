"""The report of a grid: sweeps, further axes, kinds of statistics, layers; and what is not there."""

from __future__ import annotations

import csv
import html
import re
from dataclasses import replace

import pytest
from report_fakes import (
    LAYERS,
    cells_of,
    grid_study,
    open_page,
    outcomes_of,
    plain_study,
    result_of,
    summary_with,
    with_errors,
)

from syncbn.study.analysis.causes import cause_words, causes_of, estimator_words
from syncbn.study.analysis.evaluations import columns_of, evaluated_settings
from syncbn.study.analysis.layers import divergence_maps, effective_map, heat_level, layer_words
from syncbn.study.analysis.layout import layout_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.analysis.throughput import costs_of
from syncbn.study.plan.grid import Comparisons, Sweep
from syncbn.study.report.captions import chance_words, diverged_words, fair_words, sweep_caption
from syncbn.study.report.report import print_table, write_report
from syncbn.study.report.results_csv import write_csv
from syncbn.study.run.runner import Outcome

NO_NUMBER = re.compile(r"\b(nan|NaN|None|inf)\b")
MOST_BYTES = 600_000
"""Reports of several studies are kept in the repository."""


def written(study, cells, outcomes, out):
    path = write_report(study, cells, outcomes, out, command="syncbn study run --config grid")
    text = path.read_text()
    shown = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return path, text, re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", shown)))


def summarized(study, cells, outcomes):
    return summary_of(study, cells, {key: outcome.result for key, outcome in outcomes.items()})


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    study = grid_study()
    cells = cells_of(study)
    outcomes = outcomes_of(cells)
    gone = [cell for cell in cells if (cell.arm, cell.seed) == ("renorm", 5)]
    for cell in gone[:2]:
        del outcomes[cell.key]
    out = tmp_path_factory.mktemp("grid")
    return study, cells, outcomes, *written(study, cells, outcomes, out)


def test_grid_page_is_whole_and_small(grid):
    study, _, _, path, text, words = grid
    assert len(text) < MOST_BYTES
    assert sum(file.stat().st_size for file in path.parent.glob("*.svg")) < MOST_BYTES / 3
    assert not NO_NUMBER.search(words)
    for arm in study.arms:
        assert words.count(arm.label) >= 5
    for heading in ("error", "comparisons", "estimation", "layers", "curves", "costs", "numbers", "run"):
        assert f'<h2 id="{heading}">' in text
        assert f'href="#{heading}"' in text
    files = {file.name for file in path.parent.iterdir()}
    assert files == {
        "report.html",
        "results.csv",
        "error_by_nbs.svg",
        "error_by_nbs.png",
        "estimation.svg",
        "samples.svg",
        "layers.svg",
    }
    for name in files:
        if name.endswith(".svg"):
            svg = path.with_name(name).read_text()
            assert svg.count("<svg") == svg.count("</svg>") >= 1
            assert "<path" in svg
            assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


def test_grid_words_are_of_its_numbers(grid):
    words = grid[5]
    assert "The global batch of 128 images, the learning rate and the steps are the same everywhere" in words
    assert re.search(r"From 128 to 1 image a GPU, the error of Local BatchNorm rises from 9\.\d % to 49\.\d %", words)
    assert "Diverged: Local BatchNorm at 1 image a GPU (2 of 6 runs) and No normalization (1 of 6 runs)." in words
    assert "Incomplete: 2 of 324 runs have no result." in words
    assert (
        "Not enough seeds to claim anything: with 6 seeds, none of the 11 comparisons can become significant" in words
    )
    assert "Local BatchNorm at 1 image a GPU: the estimate." in words
    assert "Local BatchRenorm at 1 image a GPU: not the estimate." in words
    assert "Shown at 2 images a GPU. SyncBatchNorm has the lowest mean half-way" in words
    assert "Holm's procedure" in words


def test_grid_page_opens_with_all_figures_and_tables(grid, tmp_path):
    study, cells, _, path, text, _ = grid
    dom = open_page(path, tmp_path)
    batch = sum(next(c for c in cells if c.arm == arm.name).config.norm.uses_batch for arm in study.arms)
    # Main figure for either width, one for each arm with batch statistics (kinds, samples), one for each arm (curves).
    assert dom.count("<svg") == text.count("<svg") == 2 + batch + batch + len(study.arms)
    maps = batch + 1
    assert dom.count("<table") == 1 + maps + 1 + 1 + 1
    lines = batch * len(study.sweep.values) + (len(study.arms) - batch)
    rows = len(study.arms) + maps * (1 + len(LAYERS)) + 1 + len(study.arms) + 1 + len(study.arms) + 1 + lines
    assert dom.count("<tr>") == rows


def test_csv_has_axes_and_evaluations(grid):
    _, cells, outcomes, path, _, _ = grid
    lines = list(csv.DictReader(path.with_name("results.csv").open()))
    assert len(lines) == len(cells) == 576
    kinds = ["batch", *(f"population_{estimator}_{n}" for n in (128, 1024) for estimator in ("mean", "total"))]
    assert [name for name in lines[0] if name.startswith("error_")] == ["error_running", *(f"error_{k}" for k in kinds)]
    for cell, line in zip(cells, lines, strict=True):
        assert (line["arm"], line["per_gpu_batch_size"]) == (cell.arm, str(dict(cell.point)["per_gpu_batch_size"]))
        result = outcomes[cell.key].result if cell.key in outcomes else None
        assert line["status"] == ("missing" if result is None else result.status)
        entries = result.evaluations if result is not None else []
        total = [e["test_error"] for e in entries if (e["estimator"], e["samples"]) == ("total", 1024)]
        assert line["error_population_total_1024"] == (str(total[0]) if total else "")
        assert line["peak_memory_bytes"] == ("" if result is None else str(result.peak_memory_bytes))


def test_coupled_sweep_has_a_panel_for_what_is_held(tmp_path):
    sweep = Sweep(kind="coupled", values=(2, 8, 32), hold=("epochs", "steps"), steps=400)
    study = grid_study(arms=7, seeds=3, sweep=sweep)
    cells = cells_of(study)
    _, text, words = written(study, cells, outcomes_of(cells), tmp_path)
    assert "At 2 images a GPU, constant epochs" in words or "at 2 images a GPU, constant epochs" in words
    assert "Constant epochs. From 32 to 2 images a GPU, the error of Local BatchNorm rises" in words
    assert "Constant steps. From 32 to 2 images a GPU" in words
    assert "every run has 400 steps" in words
    assert "Level lines" not in words  # a coupled sweep changes the training of every arm
    assert text.count('aria-label="Test error along the sweep, constant') == 2


def test_axis_of_numbers_goes_across_where_there_is_no_sweep(tmp_path):
    study = grid_study(arms=2, seeds=2, sweep=None, grid={"data.class_skew": (1, 2, 4)}, compare=Comparisons())
    cells = cells_of(study)
    path, _, words = written(study, cells, outcomes_of(cells), tmp_path)
    assert path.with_name("error_by_class_skew.svg").is_file()
    assert "Test error against images of one class in a row" in words
    assert "their own statistics then give away something about the class" in words
    assert layout_of(study).values == (1, 2, 4)
    assert layout_of(grid_study(values=3)).values == (4, 2, 1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_pages_of_unfinished_studies(tmp_path, capsys, seeds):
    study = grid_study(arms=3, values=2, seeds=seeds)
    cells = cells_of(study)
    _, text, words = written(study, cells, {}, tmp_path)
    assert words.count("No run has a result yet.") == 2
    assert "<svg" not in text
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "results.csv"}
    diverged = {
        c.key: Outcome(job=None, state="done", result=replace(result_of(c), status="diverged", test_error=None))
        for c in cells
    }
    _, text, words = written(study, cells, diverged, tmp_path)
    assert "every run diverged" in words
    assert not NO_NUMBER.search(words)
    print_table(study, cells, diverged)
    assert f"{seeds}×" in capsys.readouterr().out


def test_user_labels_are_escaped_everywhere(tmp_path):
    study = grid_study(arms=3, values=2, seeds=2, question="<i>?</i>")
    bad = "</svg><script>alert(1)</script>"
    study = replace(study, arms=tuple(replace(arm, label=f"{bad} {arm.name}") for arm in study.arms))
    cells = cells_of(study)
    path, text, _ = written(study, cells, outcomes_of(cells), tmp_path)
    assert "<script" not in text
    assert "<i>" not in text
    assert all("<script" not in file.read_text() for file in path.parent.glob("*.svg"))


def evaluated_as(running, batch, population):
    """A summary of one arm with these errors for each kind of statistics, beside a reference of 10 %."""
    study = plain_study(arms=("batch", "sync"), reference="sync", seeds=3)
    cells, outcomes = with_errors(study, {"batch": [running] * 3, "sync": [0.1, 0.101, 0.099]})
    for cell in cells:
        if cell.arm == "batch":
            found = outcomes[cell.key].result
            entries = [
                {"statistics": "running", "estimator": None, "samples": None, "test_error": running},
                {"statistics": "batch", "estimator": None, "samples": None, "test_error": batch},
                {"statistics": "population", "estimator": "mean", "samples": 1024, "test_error": population + 0.01},
                {"statistics": "population", "estimator": "total", "samples": 1024, "test_error": population},
            ]
            outcomes[cell.key] = replace(outcomes[cell.key], result=replace(found, evaluations=entries))
    return summarized(study, cells, outcomes)


@pytest.mark.parametrize(
    ("running", "batch", "population", "title", "text"),
    [
        (0.5, 0.3, 0.12, "the estimate", "38.0 of the 40.0 points lost against SyncBatchNorm (10.0 %) come back"),
        (0.5, 0.48, 0.49, "the training", "38.0 of the 40.0 points lost against SyncBatchNorm (10.0 %) stay"),
        (0.5, 0.4, 0.3, "both", "Of 40.0 points lost against SyncBatchNorm (10.0 %), 20.0 come back"),
        (0.5, 0.12, 0.45, "the mismatch of training and inference", "but population statistics leave 45.0 %"),
        (0.843, 0.318, 0.844, "inference, and the training", "52.5 of the 74.3 points lost against SyncBatchNorm"),
        (0.843, 0.318, 0.844, "inference, and the training", "At most 21.8 points are in the weights; less, as far as"),
        (0.5, 0.2, 0.3, "both", "20.0 come back with population statistics of 1024 images (total variance) (50.0 % be"),
        (
            0.5,
            0.2,
            0.3,
            "both",
            "10.0 more with the test batch's own statistics (20.0 %), which no fixed ones give; at",
        ),
        (0.102, 0.101, 0.1, "No cost to divide", "Local BatchNorm (less than 0.5 points"),
    ],
)
def test_training_or_estimation(running, batch, population, title, text):
    summary = evaluated_as(running, batch, population)
    items = evaluated_settings(summary)
    ((found, words),) = cause_words(causes_of(summary, items))
    assert found.endswith(title)
    assert text in words.replace("\N{NO-BREAK SPACE}", " ")
    assert "end at most 1.0 points apart" in estimator_words(items)


def test_cost_of_an_arm_is_measured_against_its_own_largest_batch():
    study = grid_study(arms=2, values=8, seeds=3)
    cells = cells_of(study)
    summary = summarized(study, cells, outcomes_of(cells))
    causes = causes_of(summary, evaluated_settings(summary))
    places = [dict(c.setting.point)["per_gpu_batch_size"] for c in causes if c.setting.arm == "batch"]
    assert places == [1, 2]  # the smallest, and where arms are compared
    found = {c.setting.arm: (dict(c.setting.point), c.base.arm, dict(c.base.point)) for c in causes[::-1]}
    assert found["batch"] == ({"per_gpu_batch_size": 1}, "batch", {"per_gpu_batch_size": 128})
    assert found["sync"][1] == "batch"  # its own batch is the same everywhere


def test_layer_maps():
    study = grid_study(arms=2, values=3, seeds=2)
    cells = cells_of(study)
    outcomes = outcomes_of(cells, layers=30)
    other = next(c for c in cells if c.arm == "batch" and c.config.per_gpu_batch_size == 2)
    outcomes[other.key].result.layers[0].update({"kl": None, "effective": None})
    summary = summarized(study, cells, outcomes)
    maps = divergence_maps(summary)
    assert [(found.arm, found.columns, len(found.rows), found.omitted) for found in maps] == [
        ("batch", ["4", "2", "1"], 24, 6),
        ("sync", ["4", "2", "1"], 24, 6),
    ]
    assert maps[0].rows[0].layer == "layer0.0.norm"
    assert maps[0].rows[-1].layer == "layer3.5.norm"
    assert all(cell.level is not None for row in maps[0].rows for cell in row.cells)  # the other seed has that layer
    assert effective_map(summary).arm == "batch"
    assert [heat_level(value) for value in (0.001, 0.003, 0.5, 99.0, float("nan"))] == [0, 1, 5, 8, None]
    words = " ".join(layer_words(summary))
    assert re.search(r"Farthest off in Local BatchNorm is \S+ at 1 image a GPU", words)
    assert "counts for fewer than it has" in words
    assert "nearer to the population's than a single batch in every layer" in words


def test_divergence_is_named_by_place_and_level_arms_once():
    study = grid_study(arms=12, values=3, seeds=3)
    cells = cells_of(study)
    summary = summarized(study, cells, outcomes_of(cells))
    words = diverged_words(list(summary.settings.values()))
    assert words == "Diverged: Local BatchNorm at 1 image a GPU (1 of 3 runs) and No normalization (1 of 3 runs)."
    caption = " ".join(sweep_caption(summary, ()))
    assert "lowest of the level lines" in caption


def test_speeds_are_compared_seed_by_seed_and_ranked_only_where_they_are_apart():
    study = plain_study(seeds=3)
    cells, outcomes = with_errors(study, {arm.name: [0.1, 0.11, 0.12] for arm in study.arms})
    speeds = {"batch": [100, 200, 400], "sync": [110, 240, 520], "group": [120, 150, 420]}
    results = {
        c.key: replace(outcomes[c.key].result, images_per_second=float(speeds[c.arm][c.seed]), peak_memory_bytes=2**20)
        for c in cells
    }
    costs = costs_of(list(summary_of(study, cells, results).settings.values()))
    sync, group = (next(line for line in costs.lines if line.arm == name) for name in ("sync", "group"))
    assert (sync.images_per_second, sync.spread) == ("240", "110 to 520")
    assert (sync.relative_speed, sync.relative_spread) == ("×1.20", "1.10 to 1.30")
    assert (group.relative_speed, group.relative_spread) == ("×1.05", "0.75 to 1.20")
    assert costs.words == (
        "Faster than Local BatchNorm with every seed: SyncBatchNorm (×1.20). No order is claimed for GroupNorm, whose "
        "ratios lie on both sides of 1, or are too few."
    )
    assert costs.memory == "peak resident memory of the whole process"


def test_own_batch_of_batch_renormalization_is_no_evaluation(tmp_path):
    study = plain_study(arms=("renorm", "sync"), reference="sync", seeds=3)
    cells = cells_of(study)
    results = {cell.key: result_of(cell) for cell in cells}
    for cell in cells:
        if cell.arm == "renorm":
            entries = [
                {"statistics": "running", "estimator": None, "samples": None, "test_error": 0.5},
                {"statistics": "batch", "estimator": None, "samples": None, "test_error": 0.1},
                {"statistics": "population", "estimator": "total", "samples": 1024, "test_error": 0.6},
            ]
            results[cell.key] = replace(results[cell.key], test_error=0.5, evaluations=entries)
    summary = summary_of(study, cells, results)
    items = evaluated_settings(summary)
    (title, words), (_, free), (worse, where) = cause_words(causes_of(summary, items))
    assert title == "Local BatchRenorm: not the estimate"
    assert "the test batch's own statistics" not in words.partition("This rests on running and population")[0]
    assert "batch renormalization maps the test batch's own statistics back" in words
    assert free.startswith("SyncBatchNorm (")
    assert worse == "Population statistics worse than the running ones"
    assert where.replace("\N{NO-BREAK SPACE}", " ") == "Local BatchRenorm (60.0 % against 50.0 %)."
    write_csv(study, cells, results, tmp_path / "results.csv")
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert all((line["error_batch"] == "") == (line["arm"] == "renorm") for line in lines)


def test_numbers_of_images_that_were_rounded_apart_share_a_column():
    cell = cells_of(plain_study(seeds=1, arms=("batch",)))[0]
    several = [result_of(cell, samples=(128, 1024)), result_of(cell, samples=(128, 1088)), result_of(cell, samples=())]
    names = [name for name, _ in columns_of(several)]
    assert names == [
        "error_running",
        "error_batch",
        "error_population_mean_128",
        "error_population_total_128",
        "error_population_mean_1024_to_1088",
        "error_population_total_1024_to_1088",
    ]
    assert len(columns_of([result_of(cell, samples=(1024, 1088))])) == 6  # two columns each: one run has both


def test_what_all_arms_share_and_who_learnt_nothing():
    study = plain_study(seeds=2)
    assert fair_words(study).startswith("At each place, learning rate and length of training are the same for all arms")
    arms = (*study.arms[:2], replace(study.arms[2], overrides={**study.arms[2].overrides, "optimizer": {"lr": 0.5}}))
    assert "but for GroupNorm (lr 0.5)" in fair_words(replace(study, arms=arms))
    summary = summary_with(study, {"batch": [0.84, 0.86], "sync": [0.1, 0.1], "group": [0.9, "diverged"]})
    assert chance_words(list(summary.settings.values())).replace("\N{NO-BREAK SPACE}", " ") == (
        "2 of 5 finished runs ended at chance level (an error of at least 85.0 %): Local BatchNorm (1) and "
        "GroupNorm (1)."
    )


def test_a_falling_error_is_not_called_rising():
    study = plain_study(seeds=2, grid={"data.class_skew": (1, 2, 4)})
    errors = {name: [0.3, 0.32] for name in ("batch", "sync", "group")}
    summary = summary_with(study, errors)
    assert "goes from 31.0" in sweep_caption(summary, ())[0].replace("\N{NO-BREAK SPACE}", " ")
