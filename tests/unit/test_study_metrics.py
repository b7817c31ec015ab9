"""A study of another task: a metric of which more is better, and one that is no fraction."""

from __future__ import annotations

import csv
import html
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_fakes import cells_of, grid_study, plain_study, results_of, retold, with_errors
from study_fakes import ERROR, fake_result, small_study

from syncbn.study.analysis.evaluations import evaluated_settings
from syncbn.study.analysis.findings import findings_of
from syncbn.study.analysis.statistics import difference_p
from syncbn.study.analysis.summary import by_badness, summary_of
from syncbn.study.plan.grid import Contrast, Place, study_cells
from syncbn.study.report.curves import curves_figure, score_curve
from syncbn.study.report.figures import Mark, forest_figure, main_figure_name, score_axis, statistics_figure
from syncbn.study.report.format import MINUS, SPACE
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import print_table
from syncbn.study.report.units import Units
from syncbn.study.report.verdict import verdict
from syncbn.study.run.jobs import Job
from syncbn.study.run.progress import Display
from syncbn.study.run.status import Outcome
from syncbn.train.config import ConfigError
from syncbn.train.result import Metric

DICE = Metric("dice", higher_is_better=True)
LOSS = Metric("loss", percent=False)
PSNR = Metric("psnr", higher_is_better=True, percent=False)
SCORES = {
    DICE: lambda error: 1 - error,
    LOSS: lambda error: 35.2 + 10 * error,
    PSNR: lambda error: 30 - 10 * error,
}
"""What each metric is where the error of a made-up result is ``error``."""
OTHER_TASK = {"task": {"name": "liver:Liver"}}
JITTER = [0.000, 0.002, -0.001, 0.003, 0.001, -0.002, 0.004, -0.003]
NAMES = ["error", "dice", "loss", "psnr"]
by_metric = pytest.mark.parametrize("metric", SCORES, ids=lambda metric: metric.name)


def around(centre, spread=1.0):
    return [centre + spread * j for j in JITTER]


def study_of(metric, *, margin=None, **changes):
    """Local BatchNorm, SyncBatchNorm and GroupNorm, the latter two against the first; a margin in points of error."""
    study = plain_study(seeds=8, base=OTHER_TASK, **changes)
    size = None if margin is None else margin if metric.percent else margin / 10
    return replace(study, contrasts=tuple(replace(contrast, margin=size) for contrast in study.contrasts))


def summarized(metric, errors, **changes):
    """The summary of a study whose metric is :data:`SCORES` of these errors."""
    study = study_of(metric, **changes)
    cells, results = with_errors(study, errors)
    return summary_of(study, cells, results if metric is ERROR else retold(results, metric, SCORES[metric]))


def told(metric, errors, **changes):
    summary = summarized(metric, errors, **changes)
    return verdict(summary, findings_of(summary)).replace(SPACE, " ")


# ---- findings


@by_metric
@pytest.mark.parametrize("margin", [None, 0.5])
def test_a_metric_that_is_the_error_turned_or_scaled_has_its_findings(metric, margin):
    """The spreads differ, so that it matters which of two settings the floor takes for the better one."""
    errors = {"batch": around(0.3, 4), "sync": around(0.296, 0.5)[::-1], "group": around(0.31, 2)[::-1]}
    known = findings_of(summarized(ERROR, errors, margin=margin))
    found = findings_of(summarized(metric, errors, margin=margin))
    unit = SCORES[metric](1.0) - SCORES[metric](0.0)
    for one, other in zip(found, known, strict=True):
        assert one.verdict == other.verdict
        assert (one.p, one.p_sign_flip) == pytest.approx((other.p, other.p_sign_flip))
        assert one.p_no_worse == pytest.approx(other.p_no_worse, nan_ok=True)
        assert one.smallest_effect == pytest.approx(abs(unit) * other.smallest_effect)
        assert one.difference == pytest.approx(unit * other.difference)
        ends = sorted(unit * end for end in (other.low, other.high))
        assert [one.low, one.high] == pytest.approx(ends)
        assert one.margin == (None if margin is None else pytest.approx(abs(unit) * other.margin))
    alone = findings_of(summarized(metric, errors, arms=("batch", "sync")))[0]
    _, first, second = np.array(alone.pairs).T
    wrong, right = (difference_p(sign * first, sign * second) for sign in (-metric.sign, metric.sign))
    assert alone.p == pytest.approx(right)
    assert alone.p != pytest.approx(wrong, rel=0.1), "the order of the settings would not matter here"


@by_metric
def test_better_and_no_worse_follow_the_direction(metric):
    errors = {"batch": around(0.3), "sync": around(0.1)[::-1], "group": around(0.5)[::-1]}
    assert [found.verdict for found in findings_of(summarized(metric, errors))] == ["better", "worse"]
    errors |= {"sync": around(0.3, 0.9), "group": around(0.3)[::-1]}
    found = findings_of(summarized(metric, errors, margin=2))
    assert [item.verdict for item in found] == ["no worse", "no worse"]


def test_a_step_of_the_test_set_is_known_of_a_fraction_of_its_samples_alone():
    """Three seeds that all differ by one of ten samples: chance, unless the metric is no count of samples."""
    errors = {"batch": [0.3] * 3, "sync": [0.2] * 3}
    study = plain_study(arms=("batch", "sync"), seeds=3)
    cells, results = with_errors(study, errors)
    results = {key: replace(run, test_samples=10) for key, run in results.items()}
    p = []
    for metric in (ERROR, replace(ERROR, of_samples=False)):
        runs = {key: replace(run, metric=metric) for key, run in results.items()}
        (found,) = findings_of(summary_of(study, cells, runs))
        p.append(found.p)
    assert p[0] > 1e-3 > p[1]


@by_metric
def test_the_worst_setting_is_the_first(metric):
    errors = {
        "sync": around(0.1),
        "group": ["diverged"] * 8,
        "renorm": ["missing"] * 8,
        "frozen": around(0.4),
        "layer": around(0.2),
        "batch": around(0.9),
    }
    summary = summarized(metric, errors, arms=tuple(errors))
    order = [setting.arm for setting in by_badness(summary.at(()), metric)]
    assert order == ["group", "frozen", "layer", "sync", "renorm", "batch"]


def test_a_score_that_is_not_finite_counts_as_diverged():
    summary = summarized(DICE, {name: around(0.2) for name in ("batch", "sync", "group")})
    study, cells = summary.study, cells_of(summary.study)
    results = {key: run for s in summary.settings.values() for key, run in zip(s.keys, s.results, strict=True)}
    lost = next(cell.key for cell in cells if cell.arm == "sync")
    for value in (float("inf"), None):
        results[lost] = replace(results[lost], test={"loss": 0.1, "dice": value})
        again = summary_of(study, cells, results).settings["sync", ()]
        assert (again.finished, again.diverged) == (7, 1)


def test_runs_with_different_metrics_are_not_compared():
    study = small_study()
    cells = study_cells(study)
    results = {cell.key: fake_result(cell.config) for cell in cells}
    assert summary_of(study, cells, {}).metric == summary_of(study, cells, results).metric == ERROR
    mixed = results | retold({cells[-1].key: results[cells[-1].key]}, DICE, SCORES[DICE])
    with pytest.raises(ConfigError, match="small: metric: got 'dice', expected error, as other runs of the study"):
        summary_of(study, cells, mixed)
    turned = results | {cells[-1].key: replace(results[cells[-1].key], metric=replace(ERROR, higher_is_better=True))}
    with pytest.raises(ConfigError, match=r"expected .*higher_is_better=False.* not .*higher_is_better=True"):
        summary_of(study, cells, turned)
    foreign = results | {"of no cell": mixed[cells[-1].key]}
    assert summary_of(study, cells, foreign).metric == ERROR


@pytest.mark.parametrize(
    ("margin", "good"), [(0.5, True), (350, True), (0, False), (float("inf"), False), ("1", False)]
)
def test_a_margin_in_the_unit_of_another_task(margin, good):
    contrast = {"arm": "sync", "against": {"arm": "batch"}, "no_worse_by": margin}
    changes = {"base": {"gpus": 4, "per_gpu_batch_size": 4, **OTHER_TASK}, "contrasts": [contrast]}
    if good:
        assert small_study(**changes).contrasts[0].margin == margin
    else:
        with pytest.raises(ConfigError, match=r"no_worse_by: got .*, expected a number above 0: points if the metric"):
            small_study(**changes)


# ---- the verdict


@pytest.mark.parametrize(
    ("metric", "cost", "gain"),
    [
        (DICE, "30 points of test dice against SyncBatchNorm (95 % interval 30 to 30)", "25 points"),
        (LOSS, "3.0 in test loss against SyncBatchNorm (95 % interval 3.0 to 3.0)", "2.5"),
        (PSNR, "3.0 in test psnr against SyncBatchNorm (95 % interval 3.0 to 3.0)", "2.5"),
    ],
    ids=NAMES[1:],
)
def test_a_cost_and_what_gives_it_back(metric, cost, gain):
    errors = {"batch": around(0.4), "sync": around(0.1)[::-1], "group": around(0.15)}
    said = told(metric, errors)
    assert said == (
        f"At 4 samples per GPU, Local BatchNorm costs {cost}. GroupNorm gives back {gain}."
        " No arm's learning rate was tuned."
    )
    # The interval of a cost stands the right way round, whichever of the two a contrast names first.
    study = study_of(metric)
    turned = tuple(Contrast(c.name, c.second, c.first) for c in study.contrasts)
    assert told(metric, errors, contrasts=turned) == said


@pytest.mark.parametrize(
    ("metric", "none", "margin"),
    [
        (DICE, f"{MINUS}0.10 points (95 % interval {MINUS}0.29 to 0.09)", "0.50 points: {}0.03 points (95 %"),
        (LOSS, f"+0.010 in test loss (95 % interval {MINUS}0.009 to 0.029)", "0.05: {}0.0030 in test loss (95 %"),
        (PSNR, f"{MINUS}0.010 in test psnr (95 % interval {MINUS}0.029 to 0.009)", "0.05: {}0.0030 in test psnr (95 %"),
    ],
    ids=NAMES[1:],
)
def test_no_difference_and_no_worse(metric, none, margin):
    errors = {"batch": around(0.1), "sync": around(0.101)[::-1]}
    start = "No difference is shown between SyncBatchNorm and Local BatchNorm: "
    assert told(metric, errors, arms=("batch", "sync")).startswith(f"{start}{none}.")
    errors["sync"] = around(0.10055, 0.5)
    said = told(metric, errors, arms=("batch", "sync"), margin=0.5)
    shown = margin.format(MINUS if metric.higher_is_better else "+")
    assert said.startswith(f"SyncBatchNorm is no worse than Local BatchNorm by a margin of {shown}")
    errors["sync"] = around(0.2)
    assert "costs" in told(metric, errors, arms=("batch", "sync"), margin=0.5)


def test_a_difference_of_differences_has_its_unit():
    places = [Place(arm, (("per_gpu_batch_size", size),)) for arm in ("batch", "sync") for size in (2, 8)]
    contrast = Contrast("batch", places[0], places[1], minus=(places[2], places[3]))
    study = grid_study(arms=2, values=4, seeds=6, base=OTHER_TASK, contrasts=(contrast,))
    cells = cells_of(study)
    summary = summary_of(study, cells, retold(results_of(cells), LOSS, SCORES[LOSS]))
    assert re.match(
        r"The difference \(Local BatchNorm: 2 samples per GPU − 8 samples per GPU\) −"
        r" \(SyncBatchNorm: 2 samples per GPU − 8 samples per GPU\)"
        r" is \+1\.\d in test loss \(95 % interval 1\.\d to 1\.\d\)\.",
        verdict(summary, findings_of(summary)).replace(SPACE, " "),
    )


# ---- numbers


def test_numbers_of_a_metric_that_is_no_fraction():
    units = Units(LOSS)
    assert [units.value(x) for x in (1.234, 35.2, 0.0213, 0.0, 12345.6, -0.5, 2e-5, 3.21e7)] == [
        *("1.234", "35.20", "0.02130", "0.000", "12346", f"{MINUS}0.5000", "2.00e-05", "3.21e+07"),
    ]
    assert (units.value(float("nan")), units.interval(float("nan"), float("nan"))) == ("–", "–")
    assert units.interval(34.91, 35.5) == "34.91 to 35.50"
    assert units.interval(-0.002, 1.5) == f"{MINUS}0.002 to 1.500", "as many decimals as the larger end"
    assert [units.difference(x, signed=True) for x in (0.0312, -3.14, 271.8, 0.0)] == [
        *("+0.031", f"{MINUS}3.1", "+272", "0.0"),
    ]
    assert units.difference_interval(0.02, 0.0424, 0.0312) == "0.020 to 0.042"
    assert units.difference_interval(-0.04, 0.0402, 0.0001) == f"{MINUS}0.0400 to 0.0402"
    assert (units.spread(0.004899), Units(DICE).spread(0.004899)) == ("0.0049", "0.49")
    assert [units.margin(x) for x in (0.125, 350)] == ["0.125", "350"]
    assert Units(DICE).margin(0.005) == "0.50 points"
    assert Units(DICE).interval(0.97, 1.02) == "97.0 to 100.0", "no part of an interval lies beyond 100 %"


# ---- the page and its files


def written(metric, score, out):
    """Page, words without tags, and the CSV's lines of a sweep over four sizes."""
    study = grid_study(arms=7, values=4, seeds=6, base=OTHER_TASK, question="What does it cost?")
    cells = cells_of(study)
    results = retold(results_of(cells), metric, score)
    some = next(iter(results))
    results[some] = replace(results[some], validation={"loss": 0.1, metric.name: 0.25}, validation_samples=500)
    text = write_report(study, cells, results, out, command="syncbn study run").read_text()
    shown = re.sub(r"<(style|svg).*?</\1>", "", text, flags=re.DOTALL)
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", shown)))
    return text, words, list(csv.DictReader((out / "results.csv").open()))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    scores = {DICE: SCORES[DICE], LOSS: lambda error: 40 * error**2}
    folders = {metric: tmp_path_factory.mktemp(metric.name) for metric in scores}
    return {metric: (folder, *written(metric, scores[metric], folder)) for metric, folder in folders.items()}


PAGE = {
    DICE: (
        *("Mean test dice in %. k× means", "In points of test dice; above 0 the first of the two is better."),
        *("If population statistics raise the dice, the running", "has the higher (lower) dice."),
        "difference in test dice between two runs",
    ),
    LOSS: (
        *("Mean test loss. k× means", "Differences in test loss; below 0 the first of the two is better."),
        *("If population statistics lower the loss, the running", "has the lower (higher) loss."),
        "difference in test loss between two runs",
    ),
}


@pytest.mark.parametrize("metric", PAGE, ids=lambda metric: metric.name)
def test_a_page_speaks_of_its_metric_and_of_samples(pages, metric):
    _, text, words, _ = pages[metric]
    for sentence in PAGE[metric]:
        assert sentence in words
    assert not re.findall(r"\berrors?\b", words), "there is no error here"
    assert not re.findall(r"\bimages?\b", words)
    assert "training samples 50,000 validation samples 500 test samples 10,000" in words
    assert "samples seen steps seconds samples/s memory" in words
    assert "At 2 samples per GPU, Local BatchNorm costs" in words
    assert bool(re.search(r"\d points|points of", words)) == ("An axis with 1, 5, 30" in words) == metric.percent
    assert f'aria-label="Test {metric.name} of every arm"' in text
    assert not re.search(r"\b(nan|NaN|None|inf)\b", words)


def test_tables_have_the_digits_of_the_metric(pages):
    rows = {m: re.findall(r"GroupNorm</th><td>(.*?)</td>", pages[m][1])[0] for m in PAGE}
    assert re.fullmatch(r"=9\d\.\d", rows[DICE])
    assert re.fullmatch(r"=0\.\d{4}", rows[LOSS])


def test_csv_columns_are_named_after_the_metric(pages):
    kinds = ["running", "batch", *(f"population_{e}_{n}" for n in (128, 1024) for e in ("mean", "total"))]
    own = {
        DICE: ["test_dice", "test_loss", "test_other", "validation_dice"],
        LOSS: ["test_loss", "test_other", "validation_loss"],
    }
    for metric, (*_, lines) in pages.items():
        assert list(lines[0]) == [
            *("arm", "label", "per_gpu_batch_size", "level", "seed", "normalization_batch_size", "key", "status"),
            *own[metric],
            *("steps", "samples", "seconds", "samples_per_second", "peak_memory_bytes", "parameters"),
            *("train_samples", "test_samples", "processes"),
            *(f"{metric.name}_{kind}" for kind in kinds),
        ]
        done = [line for line in lines if line["status"] == "done"]
        assert all(line[f"test_{metric.name}"] == line[f"{metric.name}_running"] != "" for line in done)
        assert [line[f"validation_{metric.name}"] for line in lines].count("0.25") == 1
        assert {line[f"test_{metric.name}"] for line in lines if line["status"] == "diverged"} == {""}


def test_csv_of_classification_keeps_its_header(tmp_path):
    study = plain_study(seeds=1, arms=("batch",), contrasts=())
    cells = cells_of(study)
    write_report(study, cells, results_of(cells), tmp_path, command="")
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == (
        "arm,label,level,seed,normalization_batch_size,key,status,test_error,test_loss,steps,samples,seconds,"
        "images_per_second,peak_memory_bytes,parameters,train_images,test_images,processes,error_running,error_batch,"
        "error_population_mean_128,error_population_total_128,error_population_mean_1024,error_population_total_1024"
    )


def svg_texts(path):
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", path.read_text())]


@pytest.mark.parametrize("metric", PAGE, ids=lambda metric: metric.name)
def test_figures_are_drawn_in_the_unit_of_the_metric(pages, metric):
    folder = pages[metric][0]
    axis = {DICE: "test dice", LOSS: "test loss (log scale)"}[metric]
    difference = {
        DICE: "difference in test dice, points (above 0: the first is better)",
        LOSS: "difference in test loss (below 0: the first is better)",
    }[metric]
    texts = {path.stem: svg_texts(path) for path in folder.glob("*.svg")}
    assert set(texts) == {f"{metric.name}_by_nbs", "contrasts", "curves", "statistics"}
    assert axis in texts[f"{metric.name}_by_nbs"]
    assert "samples per GPU" in texts[f"{metric.name}_by_nbs"]
    assert axis in texts["curves"]
    assert difference in texts["contrasts"]
    for name in (f"{metric.name}_by_nbs", "curves", "statistics"):
        assert any(text.endswith(" %") for text in texts[name]) == metric.percent, name
    assert not any("image" in text or "error" in text for found in texts.values() for text in found)


def test_the_scale_of_an_axis_follows_the_metric():
    def axis(metric, scores):
        axes = Figure().add_subplot()
        score_axis(axes, scores, "y", metric)
        axes.figure.canvas.draw()
        ticks = [label.get_text() for label in axes.get_yticklabels()]
        return axes.get_yscale(), axes.get_ylim(), ticks

    spread = [0.02, 0.5, 0.97]
    assert axis(ERROR, spread)[:2] == ("log", pytest.approx((0.016, 1.02)))
    assert axis(DICE, spread)[0] == "linear", "what is close to 0 is not the best here"
    assert axis(LOSS, spread)[:2] == ("log", pytest.approx((0.016, 1.2125)))
    scale, (low, high), ticks = axis(LOSS, [1.234, 35.2])
    assert (scale, low < 1.234, high > 35.2) == ("log", True, True)
    assert ticks == ["1", "2", "5", "10", "20"]
    assert axis(LOSS, [-0.5, 3.0])[0] == "linear"
    assert axis(LOSS, [-0.5, 3.0])[2][0].startswith(("0", MINUS))
    many = axis(LOSS, [1e-6, 1e9])
    assert 3 <= len(many[2]) <= 9
    assert axis(LOSS, [35.2])[1] == pytest.approx((34.848, 35.552))


@pytest.mark.parametrize(
    ("metric", "difference", "margin"), [(ERROR, -10, 2), (DICE, 10, -2), (LOSS, -1, 0.2), (PSNR, 1, -0.2)], ids=NAMES
)
def test_a_margin_is_drawn_on_the_side_of_the_worse(metric, difference, margin):
    errors = {"batch": around(0.3), "sync": around(0.2)}
    found = findings_of(summarized(metric, errors, margin=2, arms=("batch", "sync")))
    (axes,) = forest_figure(found, ["sync"]).axes
    drawn = {line.get_marker(): line.get_xdata()[0] for line in axes.lines}
    assert (drawn["s"], drawn["|"]) == pytest.approx((difference, margin))
    assert drawn["o"] == pytest.approx(difference)


def test_curves_are_of_the_metric():
    cell = cells_of(plain_study(seeds=1))[0]
    (run,) = retold(results_of([cell]), PSNR, SCORES[PSNR]).values()
    assert score_curve(run)[-1] == (390.0, run.score)
    axes = curves_figure(
        summarized(PSNR, {"batch": around(0.3)}, arms=("batch",)).at(()), {"batch": Mark("black", "o")}, PSNR
    ).axes
    assert [each.get_ylabel() for each in axes] == ["training loss", "test psnr"]


def test_an_unusual_name_is_a_file_name():
    study = plain_study(seeds=1, base=OTHER_TASK)
    cells = cells_of(study)
    results = retold(results_of(cells), replace(DICE, name="mAP@0.5/all"), SCORES[DICE])
    assert main_figure_name(summary_of(study, cells, results)) == "mAP_0_5_all_by_arm"


def test_statistics_of_arms_side_by_side_have_the_unit_too():
    study = plain_study(seeds=2, base=OTHER_TASK)
    cells = cells_of(study)
    summary = summary_of(study, cells, retold(results_of(cells), LOSS, SCORES[LOSS]))
    (axes,) = statistics_figure(summary, list(evaluated_settings(summary).values())).axes
    assert axes.get_xlabel() == "test loss"


@pytest.mark.parametrize(
    ("metric", "titles", "numbers"),
    [
        (DICE, ["Planned contrasts, points of test dice", "Test dice in %"], r"\b60\.\d\b"),
        (LOSS, ["Planned contrasts, differences in test loss", "Test loss"], r"\b39\.2\d\b"),
    ],
    ids=NAMES[1:3],
)
def test_the_terminal_prints_the_metric(capsys, metric, titles, numbers):
    study = study_of(metric)
    errors = {"batch": around(0.4), "sync": around(0.1)[::-1], "group": around(0.15)}
    cells, results = with_errors(study, errors)
    print_table(study, cells, retold(results, metric, SCORES[metric]))
    printed = capsys.readouterr().out
    for title in titles:
        assert re.search(rf"^{re.escape(title)}\s*$", printed, flags=re.MULTILINE)
    assert re.search(numbers, printed)
    assert max(map(len, printed.splitlines())) <= 80
    assert "error" not in printed


@pytest.mark.parametrize(
    ("metric", "news"),
    [(ERROR, "test error 12.7 %, 0.1 s"), (DICE, "test dice 87.3 %, 0.1 s"), (LOSS, "test loss 36.47, 0.1 s")],
    ids=NAMES[:3],
)
def test_a_run_that_ended_says_its_score(tmp_path, capsys, metric, news):
    cell = study_cells(small_study())[0]
    result = fake_result(cell.config, 0.127)
    if metric is not ERROR:
        result = retold({"": result}, metric, SCORES[metric])[""]
    display = Display()
    display.total = 1
    display.ended(Outcome(job=Job(cell=cell, out=tmp_path), state="done", result=result))
    assert capsys.readouterr().out == f"[1/1] batch, seed 0: {news}\n"
