"""Studies from Python: one object that runs, compares and gives frames."""

from __future__ import annotations

import doctest

import own_loops
import pytest

import syncbn.study.api
from syncbn.study import Study, compare, load_study
from syncbn.train.config import ConfigError

ARMS = {
    "batch": {"overrides": {"norm": {"name": "batch"}}, "reference": True},
    "group": {"overrides": {"norm": {"name": "group", "groups": 2}}},
}
BASE = {"gpus": 2, "per_gpu_batch_size": 4, "device": "cpu"}


def made(**changes):
    metric = {"name": "error", "percent": False}
    return Study(
        **{"run": own_loops.regression, "metric": metric, "arms": ARMS, "base": BASE, "seeds": range(3), **changes}
    )


def test_examples_of_the_docstrings():
    found = doctest.testmod(syncbn.study.api)
    assert (found.failed, found.attempted > 0) == (0, True)


def test_a_study_runs_compares_and_gives_frames(tmp_path, capsys):
    study = made(tune={"optimizer.lr": [0.01, 0.1], "seeds": 1})
    report = study.run(tmp_path, progress=False)
    assert capsys.readouterr().out == ""
    assert report == tmp_path / "report.html"
    assert report.exists()
    contrasts = study.compare()
    assert contrasts["contrast"].tolist() == ["group against batch"]
    assert contrasts["verdict"][0] in ("better", "worse", "no difference shown")
    learning_rates = {"optimizer.lr 0.01", "optimizer.lr 0.1"}
    assert {contrasts["chosen"][0], contrasts["chosen_against"][0]} <= learning_rates
    assert contrasts["low"][0] < contrasts["difference"][0] < contrasts["high"][0]
    runs = study.frame()
    assert sorted(zip(runs["arm"], runs["seed"], strict=True)) == [(arm, seed) for arm in ARMS for seed in range(3)]
    assert (runs["status"] == "done").all()
    assert runs["tuned"].str.startswith("optimizer.lr ").all()
    assert compare(study, tmp_path)[0].difference == contrasts["difference"][0]
    again = made(tune={"optimizer.lr": [0.01, 0.1], "seeds": 1})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    again.run(tmp_path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")} == before


def test_a_comparison_of_nothing_says_how_to_plan_one(tmp_path):
    study = made(arms={name: {**arm, "reference": False} for name, arm in ARMS.items()})
    with pytest.raises(ConfigError, match=r"contrasts: got \[\], expected at least one .* `reference: true`"):
        study.compare(tmp_path)


def test_workers_are_given_a_function_of_a_module(tmp_path):
    study = made(seeds=[0])
    study.run(tmp_path, workers=2, progress=False)
    assert len(study.frame()) == 2


def test_failures_come_last_and_name_the_run(tmp_path):
    def sometimes(setting):
        if setting.config.norm.name == "group":
            raise ValueError("no luck")
        return own_loops.regression(setting)

    study = made(run=sometimes, seeds=[0, 1])
    with pytest.raises(
        RuntimeError, match=r"2 of 4 runs failed; the first, group, seed 0: .*ValueError: no luck \(log: "
    ):
        study.run(tmp_path, progress=False)
    assert (study.frame()["status"] == "done").sum() == 2
    assert (tmp_path / "report.html").exists()


def test_what_is_asked_before_a_run():
    with pytest.raises(ValueError, match="out: got nothing, expected the folder of the study"):
        made().frame()
    assert made().compare("nowhere")["verdict"].tolist() == [None]
    assert "chosen" not in made().compare("nowhere"), "it does not tune"
    assert made(tune={"optimizer.lr": [0.01, 0.1]}).compare("nowhere")["chosen"].tolist() == [None]


def test_a_packaged_study_has_the_same_methods():
    study = load_study("quickstart")
    assert (study.name, study.seeds, len(study.arms)) == ("quickstart", (0, 1, 2), 5)
    assert repr(study) == "Study('quickstart': 5 arms, 3 seeds)"
    assert [contrast.first.arm for contrast in study.contrasts][:1] == ["sync"] or study.contrasts
