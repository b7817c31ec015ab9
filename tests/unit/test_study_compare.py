"""Two studies side by side: what differs in their configurations, and the settings that both have."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import numpy as np
import own_loops
import pytest
import yaml
from scipy import stats
from study_fakes import NOON, fake_result, small_study

from syncbn.cli import main
from syncbn.study import Study
from syncbn.study.analysis.statistics import difference_p, holm, welch
from syncbn.study.analysis.summary import summary_of
from syncbn.study.analysis.two_studies import rows_of
from syncbn.study.plan.differences import differences
from syncbn.study.plan.folder import save_study
from syncbn.study.plan.grid import study_cells
from syncbn.study.report.two_studies import exploratory
from syncbn.study.run.records import Records
from syncbn.train.config import ConfigError
from syncbn.train.result import Metric

A = {"batch": [0.40, 0.36, 0.41, 0.38], "sync": [0.03, 0.05, 0.04, 0.06], "iid": [0.02, 0.03, 0.02, 0.03]}
B = {"batch": [0.30, 0.27, 0.33, 0.31], "sync": [0.04, 0.05, 0.03, 0.06], "iid": [0.02, 0.03, 0.02, 0.04]}


def summary(study, errors):
    """``None`` among the errors is a run that diverged; a seed without an error has not run."""
    cells, results = study_cells(study), {}
    for cell in cells:
        known = dict(zip(study.seeds, errors[cell.arm], strict=False))
        if cell.seed in known:
            error = known[cell.seed]
            results[cell.key] = fake_result(cell.config, error or 0.0, "diverged" if error is None else "ok")
    return summary_of(study, cells, results)


def folder(path, study, errors):
    records = Records(path)
    for setting in summary(study, errors).settings.values():
        for key, run in zip(setting.keys, setting.results, strict=True):
            if run is not None:
                records.add(key, NOON, 1.0, run)
    save_study(study, path)
    return path


FIRST = {"seeds": [0, 1, 2, 3], "title": "First"}
SECOND = {"seeds": [0, 1, 2, 3], "title": "Second"}


def test_common_seeds_are_paired_and_holm_is_over_the_rows():
    rows = rows_of(summary(small_study(**FIRST), A), summary(small_study(**SECOND), B))
    assert [(row.first.arm, row.test, row.seeds) for row in rows] == [(arm, "paired", (4, 4)) for arm in A]
    p = [float(difference_p(np.array(A[arm]), np.array(B[arm]))) for arm in A]
    assert [row.effect.p for row in rows] == pytest.approx(holm(np.array(p)).tolist())
    assert rows[0].effect.difference == pytest.approx(np.mean(A["batch"]) - np.mean(B["batch"]))
    expected = stats.ttest_rel(A["batch"], B["batch"]).confidence_interval()
    assert (rows[0].effect.low, rows[0].effect.high) == pytest.approx(tuple(expected))


def test_the_same_runs_are_no_test_and_not_in_the_family():
    """An arm that nothing was changed for."""
    first, second = summary(small_study(**FIRST), A), summary(small_study(**SECOND), {**B, "batch": A["batch"]})
    rows = rows_of(first, second)
    assert [row.test for row in rows] == ["same", "paired", "paired"]
    assert (rows[0].effect.difference, np.isnan(rows[0].effect.p), rows[0].seeds) == (0.0, True, (4, 4))
    p = [float(difference_p(np.array(A[arm]), np.array(B[arm]))) for arm in ("sync", "iid")]
    assert [row.effect.p for row in rows[1:]] == pytest.approx(holm(np.array(p)).tolist())
    assert "over 2 rows that are not the same runs in both." in exploratory(rows)
    more = summary(small_study(**{**SECOND, "seeds": [0, 1, 2, 3, 4]}), {**B, "batch": [*A["batch"], 0.3]})
    assert rows_of(first, more)[0].test == "same", "its common seeds are what would be tested"
    fewer = summary(small_study(**{**SECOND, "seeds": [3, 4, 5]}), {**B, "batch": [A["batch"][3], 0.3, 0.3]})
    assert rows_of(first, fewer)[0].test == "Welch"
    assert rows_of(first, first)[0].test == "same"
    assert exploratory(rows_of(first, first)) == (
        "The runs are the same in both studies, so there is nothing to compare."
    )


def test_equal_scores_of_other_configurations_are_tested():
    base = {"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits"}, "optimizer": {"lr": 0.2}}
    rows = rows_of(summary(small_study(**FIRST), A), summary(small_study(**SECOND, base=base), A))
    assert {row.test for row in rows} == {"paired"}
    assert [row.effect.p for row in rows] == [1.0] * 3


def test_only_the_common_seeds_are_paired():
    """The study's means are over all seeds, and the difference over the three that both have."""
    second = small_study(**{**SECOND, "seeds": [1, 2, 3, 7]})
    rows = rows_of(summary(small_study(**FIRST), A), summary(second, B))
    assert (rows[0].test, rows[0].seeds) == ("paired", (3, 3))
    pairs = np.array(A["batch"][1:]) - np.array(B["batch"][:3])
    assert rows[0].effect.difference == pytest.approx(pairs.mean())
    assert rows[0].second.score.mean == pytest.approx(np.mean(B["batch"]))


def test_different_seeds_are_compared_by_welch():
    second = small_study(**{**SECOND, "seeds": [3, 4, 5]})
    rows = rows_of(summary(small_study(**FIRST), A), summary(second, {arm: B[arm][:3] for arm in B}))
    assert {(row.test, row.seeds) for row in rows} == {("Welch", (4, 3))}
    expected = stats.ttest_ind(A["batch"], B["batch"][:3], equal_var=False)
    effect = welch(np.array(A["batch"]), np.array(B["batch"][:3]))
    assert effect.p == pytest.approx(expected.pvalue)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert rows[0].effect[:3] == effect[:3]
    alone = welch(np.array([0.1, 0.1]), np.array([0.2, 0.2]))
    assert (alone.difference, alone.p < 1e-6) == (pytest.approx(-0.1), True)
    assert welch(np.array([0.1, 0.1]), np.array([0.1, 0.1])).p == 1.0


def test_welch_keeps_its_level_for_different_spreads():
    """Three seeds with four times the spread of six: the pooled test would claim too much."""
    rng = np.random.default_rng(0)
    wide, narrow = 0.1 + 0.04 * rng.standard_normal((3, 2000)), 0.1 + 0.01 * rng.standard_normal((6, 2000))
    claims = [welch(a, b).p <= 0.05 for a, b in zip(wide.T, narrow.T, strict=True)]
    pooled = stats.ttest_ind(wide, narrow).pvalue <= 0.05
    assert np.mean(claims) <= 0.075 < np.mean(pooled)


def test_what_diverged_or_has_too_few_seeds_is_not_tested():
    errors = {"batch": [None, 0.3, 0.3, 0.3], "sync": [0.04, 0.05], "iid": []}
    rows = rows_of(summary(small_study(**FIRST), A), summary(small_study(**SECOND), errors))
    assert [row.test for row in rows] == ["none"] * 3
    assert np.isnan([row.effect.p for row in rows]).all()
    assert np.isnan(rows[0].effect.difference), "the runs that are left favour the arm that lost its worst"
    assert rows[1].effect.difference == pytest.approx(0.0)
    assert np.isnan(rows[2].effect.difference)


def test_places_match_by_their_values():
    arms = {"batch": {"overrides": {"norm": {"name": "batch"}}}}
    base = {"data": {"name": "digits"}}
    first = small_study(base=base, arms=arms, sweep={"values": [2, 4, 8], "global_batch_size": 8})
    second = small_study(base=base, arms=arms, sweep={"values": [8, 2], "global_batch_size": 8})
    rows = rows_of(summary(first, {"batch": [0.1, 0.2]}), summary(second, {"batch": [0.1, 0.2]}))
    assert [dict(row.first.point) for row in rows] == [{"per_gpu_batch_size": 2}, {"per_gpu_batch_size": 8}]
    assert not rows_of(summary(first, {"batch": []}), summary(small_study(), A))


def test_studies_of_different_metrics_are_not_compared():
    found = summary(small_study(**SECOND), B)
    with pytest.raises(
        ConfigError, match=r"metric: got Metric\(name='dice'.*expected Metric\(name='error'.*as the other"
    ):
        rows_of(summary(small_study(**FIRST), A), dataclasses.replace(found, metric=Metric("dice")))


def test_values_that_look_alike_in_six_digits_differ():
    first, second = (small_study(base={"gpus": 4, "optimizer": {"lr": lr}}) for lr in (0.1, 0.10000001))
    assert [(pair.key, pair.first, pair.second) for pair in differences(first, second)] == [
        ("optimizer.lr", "0.1", "0.10000001")
    ]


def test_what_differs():
    first = small_study(
        base={"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits"}, "optimizer": {"lr": 0.1}},
        title="First",
        axes={"optimizer.momentum": [0.8, 0.9]},
    )
    arms = {
        "batch": {"label": "Local BatchNorm", "overrides": {"norm": {"name": "batch", "momentum": 0.01}}},
        "sync": {"label": "SyncBatchNorm", "overrides": {"norm": {"name": "sync"}}, "reference": True},
        "group": {"label": "GroupNorm", "overrides": {"norm": {"name": "group", "groups": 2}}},
    }
    base = {"gpus": 8, "per_gpu_batch_size": 4, "data": {"name": "digits", "validation_fraction": 0.2}}
    tune = {"optimizer.lr": [0.1, 0.2], "halving": False}
    second = small_study(base=base, title="Second", seeds=[0, 1, 2], arms=arms, tune=tune)
    found = {pair.key: (pair.first, pair.second) for pair in differences(first, second)}
    assert found == {
        "title": ("First", "Second"),
        "seeds": ("0, 1", "0, 1, 2"),
        "reference": ("iid", "sync"),
        "contrasts": (
            "batch optimizer.momentum=0.8 against iid, sync optimizer.momentum=0.8 against iid",
            "batch against sync, group against sync",
        ),
        "axes.optimizer.momentum": ("0.8, 0.9", "–"),
        "tune.optimizer.lr": ("–", "0.1, 0.2"),
        "tune.seeds": ("–", "1000"),
        "tune.halving": ("–", "null"),
        "arms.iid": ("Reference <b>", "–"),
        "arms.group": ("–", "GroupNorm"),
        "gpus": ("4", "8"),
        "data.validation_fraction": ("0", "0.2"),
        "optimizer.momentum": ("–", "0.9"),
        "arms.batch.norm.momentum": ("0.1", "0.01"),
    }
    assert differences(first, first) == []
    other = {"other": {"overrides": {"norm": {"name": "batch"}}}}
    found = {
        pair.key: (pair.first, pair.second) for pair in differences(small_study(), small_study(base=base, arms=other))
    }
    assert found["gpus"] == ("4", "8"), "without a common arm, the bases are compared"


def test_the_command_prints_tables_csv_and_json(tmp_path, capsys):
    one = folder(tmp_path / "one", small_study(**FIRST), A)
    other = folder(tmp_path / "other", small_study(**{**SECOND, "seeds": [0, 1, 2]}), {arm: B[arm][:3] for arm in B})
    assert main(["study", "compare", str(one), str(other)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[2:])) <= 80
    assert printed.index("A: First") < printed.index("What differs") < printed.index("SyncBatchNorm")
    assert "Exploratory: neither study planned these comparisons, so nothing is claimed." in printed.replace("\n", " ")
    assert "better" not in printed
    assert re.search(r"38\.7 +30\.0 +\+9\.0 +0\.\d+ +paired", printed)
    assert main(["study", "compare", str(one), str(other), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["arm"] for row in rows] == list(A)
    assert float(rows[0]["mean_a"]) == pytest.approx(np.mean(A["batch"]))
    assert (rows[0]["test"], rows[0]["seeds_a"], rows[0]["finished_a"], rows[0]["finished_b"]) == (
        "paired",
        "3",
        "4",
        "3",
    )
    assert 0 < float(rows[0]["p_exploratory"]) <= 1
    assert main(["study", "compare", str(one), str(other), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["a"] == {"folder": str(one), "title": "First"}
    assert {"key": "seeds", "a": "0, 1, 2, 3", "b": "0, 1, 2"} in content["differences"]
    assert content["note"].startswith("Exploratory")
    assert [row["difference"] for row in content["rows"]] == pytest.approx([float(row["difference"]) for row in rows])


def test_a_study_beside_itself(tmp_path, capsys):
    one = folder(tmp_path / "one", small_study(**FIRST), A)
    assert main(["study", "compare", str(one), str(one)]) == 0
    printed = capsys.readouterr().out
    assert "Their configurations are the same." in printed
    assert "0.0" in printed
    assert len(re.findall(r"the same *\n.* runs *\n", printed)) == 3
    assert "1.00" not in printed


def test_a_folder_says_which_study_it_holds(tmp_path, capsys):
    study = small_study(**FIRST)
    one, bare = folder(tmp_path / "one", study, A), folder(tmp_path / "bare", study, B)
    (bare / "study.yaml").rename(tmp_path / "mine.yaml")
    words = ["study", "compare", str(one), str(bare)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "expected one with study.yaml" in error
    assert "name its study with --config-b" in error
    assert main([*words, "--config-b", str(tmp_path / "mine.yaml")]) == 0
    assert main(["study", "compare", str(one), str(tmp_path / "nowhere")]) == 2
    assert "nowhere', expected the folder of a study" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    save_study(study, tmp_path / "empty")
    assert main(["study", "compare", str(one), str(tmp_path / "empty")]) == 2
    assert "a folder with at least one finished run of the study small" in capsys.readouterr().err
    assert main([*words, "--config-b", str(tmp_path / "mine.yaml"), "--format", "xml"]) == 2
    assert "format: got 'xml', expected one of table, csv, json" in capsys.readouterr().err


def test_a_study_from_python_is_found_again_in_its_folder(tmp_path, capsys):
    def made(**changes):
        return Study(
            run=own_loops.budgeted,
            metric={"name": "error", "percent": False},
            base={"gpus": 2, "per_gpu_batch_size": 4, "device": "cpu", "budget": {"epochs": 4}},
            arms={"batch": {"overrides": {"norm": {"name": "batch"}}}},
            seeds=range(3),
            **changes,
        )

    made().run(tmp_path / "plain", progress=False)
    tune = {"optimizer.lr": [0.025, 0.05, 0.1, 0.2, 0.4], "halving": 2}
    made(title="Tuned", tune=tune).run(tmp_path / "tuned", progress=False)
    assert yaml.safe_load((tmp_path / "plain" / "study.yaml").read_text())["run"] == "own_loops:budgeted"
    capsys.readouterr()
    assert main(["study", "compare", str(tmp_path / "plain"), str(tmp_path / "tuned")]) == 0
    printed = capsys.readouterr().out
    assert "tune.optimizer.lr" in printed
    assert "optimizer.lr 0.1)" not in printed, "which is what the other has"
    assert main(["study", "compare", str(tmp_path / "tuned"), str(tmp_path / "tuned")]) == 0
    assert "optimizer.lr 0.1" not in capsys.readouterr().out, "which both have chosen"
    folder = tmp_path / "tuned"
    records = [json.loads(line) for path in (folder / "records").iterdir() for line in path.read_text().splitlines()]
    trials = [record for record in records if record["result"]["config"]["seed"] >= 1000]
    assert 0 < len(trials) < len(records)
    for path in (folder / "records").iterdir():
        path.write_text("".join(f"{json.dumps(record)}\n" for record in trials))
    command = f"syncbn study run --config {folder / 'study.yaml'} --out {folder}"
    for words in (
        ["compare", str(tmp_path / "plain"), str(folder)],
        ["export", "--config", str(folder / "study.yaml")],
    ):
        assert main(["study", *words, *(["--out", str(folder)] if words[0] == "export" else [])]) == 2
        assert f"it has runs of the tuning alone so far, and this does the others: {command}" in capsys.readouterr().err


def test_places_with_the_same_runs_are_one_row():
    arms = {"group": {"overrides": {"norm": {"name": "group", "groups": 2}}}}
    study = small_study(base={"data": {"name": "digits"}}, arms=arms, sweep={"values": [2, 4], "global_batch_size": 8})
    (row,) = rows_of(summary(study, {"group": [0.1, 0.2]}), summary(study, {"group": [0.1, 0.3]}))
    assert row.level
