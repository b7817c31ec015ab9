"""Tuning: what each setting tries and chooses, that validation alone chooses, and that it goes on after a kill."""

from __future__ import annotations

import collections
import csv
import dataclasses
import math
import re

import numpy as np
import pytest
from study_fakes import fake_result, small_study

from syncbn.study import commands
from syncbn.study.analysis.findings import findings_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan.grid import Place, study_cells, unique_cells
from syncbn.study.plan.tuning import choices_of, trial_cells
from syncbn.study.report.export import export
from syncbn.study.report.format import chosen_words
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import contrasts_table, print_table
from syncbn.study.report.tuning import choices_table
from syncbn.study.run.records import read_records
from syncbn.study.stages import stages
from syncbn.train.config import ConfigError, config_from_dict
from syncbn.train.result import Metric

BASE = {"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits", "validation_fraction": 0.2}}
GRID = {"optimizer.lr": [0.03, 0.1, 0.3]}
BEST = {"batch": 0.03, "sync": 0.3, "iid": 0.1}
"""By arm, the learning rate with the lowest validation error of the fake training."""


def tuned(**changes):
    return small_study(**{"base": BASE, "tune": {**GRID, "seeds": 2}, **changes})


def arm_of(config):
    return "iid" if config.norm.eps == 2e-5 else config.norm.name


def fake(config, test=0.5, higher_is_better=False):
    error = 0.1 if config.optimizer.lr == BEST[arm_of(config)] else 0.2 + config.seed % 2 * 0.01
    value = 1 - error if higher_is_better else error
    metric = Metric("score", higher_is_better=higher_is_better)
    values = {"validation": {"score": value, "loss": 1.0}, "test": {"score": test, "loss": 1.0}}
    return dataclasses.replace(fake_result(config), metric=metric, **values)


def chosen(study, results):
    return {place.arm: dict(choice.chosen.candidate) for place, choice in choices_of(study, results).items()}


def test_every_setting_tries_every_candidate_with_seeds_of_its_own():
    study = tuned()
    trials = trial_cells(study)
    assert len(trials) == 3 * 3 * 2
    assert study.tune.seeds == (1000, 1001)
    assert {cell.seed for cell in trials} == {1000, 1001}
    assert collections.Counter((cell.arm, cell.config.optimizer.lr) for cell in trials) == {
        (arm, lr): 2 for arm in BEST for lr in GRID["optimizer.lr"]
    }
    assert trials[0].label == "batch, optimizer.lr 0.03, seed 1000"
    assert tuned(seeds=[1000, 3]).tune.seeds == (1001, 1002)
    assert trial_cells(small_study()) == []


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_best_mean_of_the_validation_metric_is_chosen(higher_is_better):
    study = tuned()
    results = {cell.key: fake(cell.config, higher_is_better=higher_is_better) for cell in trial_cells(study)}
    assert chosen(study, results) == {arm: {"optimizer.lr": lr} for arm, lr in BEST.items()}
    choices = choices_of(study, results)
    assert choices[Place("batch", ())].at_edge == ["optimizer.lr"]
    assert choices[Place("iid", ())].at_edge == []
    cells = study_cells(study, choices={place: choice.chosen.candidate for place, choice in choices.items()})
    assert {(cell.arm, cell.config.optimizer.lr) for cell in cells} == set(BEST.items())
    assert {cell.seed for cell in cells} == {0, 1}
    assert not {cell.key for cell in cells} & results.keys()


def test_test_data_choose_nothing():
    """Whatever the test set says, the choices are the same."""
    study = tuned()
    honest = {cell.key: fake(cell.config) for cell in trial_cells(study)}
    rng = np.random.default_rng(0)
    poisoned = {cell.key: fake(cell.config, test=float(rng.random())) for cell in trial_cells(study)}
    assert chosen(study, honest) == chosen(study, poisoned)


def test_divergence_is_the_last_choice_and_a_missing_trial_leaves_it_open():
    study = tuned()
    trials = trial_cells(study)
    results = {cell.key: fake(cell.config) for cell in trials}
    for cell in trials:
        if cell.arm == "sync" and cell.config.optimizer.lr == 0.3 and cell.seed == 1001:
            results[cell.key] = fake_result(cell.config, status="diverged")
    assert chosen(study, results)["sync"] == {"optimizer.lr": 0.03}, "the first of equals"
    (tried,) = [t for t in choices_of(study, results)[Place("sync", ())].tried if ("optimizer.lr", 0.3) in t.candidate]
    assert math.isnan(tried.mean)
    del results[trials[0].key]
    assert "batch" not in chosen(study, results)
    without = {cell.key: fake_result(cell.config) for cell in trials}
    with pytest.raises(ConfigError, match=r"expected a task with validation data"):
        choices_of(study, without)


def test_a_setting_that_has_not_chosen_has_no_results():
    """Results of the arm without tuning, which may be there, are not those of the tuned arm."""
    plain = small_study(base=BASE)
    untuned = {cell.key: fake(cell.config) for cell in study_cells(plain)}
    study = tuned()
    trials, cells = stages(study, untuned)
    assert len(trials) == 18
    assert not {cell.key for cell in cells} & untuned.keys()
    summary = summary_of(study, cells, untuned)
    assert all(setting.missing == 2 for setting in summary.settings.values())
    assert all(finding.verdict is None for finding in findings_of(summary))


def test_a_diverged_test_set_chooses_nothing():
    study = tuned()
    results = {cell.key: fake(cell.config) for cell in trial_cells(study)}
    lost = {key: dataclasses.replace(result, status="diverged", test=None) for key, result in results.items()}
    assert chosen(study, lost) == chosen(study, results)


def test_settings_that_are_the_same_runs_share_their_trials():
    sweep = {"vary": "per_gpu_batch_size", "global_batch_size": 16, "values": [2, 8]}
    arms = {"group": {"overrides": {"norm": {"name": "group", "groups": 4}}}}
    base = {"data": BASE["data"]}
    study = small_study(base=base, sweep=sweep, arms=arms, tune=GRID)
    assert len(trial_cells(study)) == 6
    assert len(unique_cells(trial_cells(study))) == 3


def test_untuned_copies_and_grids_of_an_arm():
    arms = {
        "batch": {"overrides": {"norm": {"name": "batch"}}, "reference": True},
        "group": {
            "overrides": {"norm": {"name": "group"}},
            "tune": {"norm.groups": [4, 8, 16]},
        },
    }
    study = tuned(arms=arms, tune={**GRID, "untuned": True})
    assert [arm.name for arm in study.arms] == ["batch", "group", "batch untuned", "group untuned"]
    assert [arm.label for arm in study.arms][2:] == ["batch, untuned", "group, untuned"]
    assert [contrast.name for contrast in study.contrasts] == ["group against batch"]
    assert {cell.arm for cell in trial_cells(study)} == {"batch", "group"}
    assert {cell.config.norm.groups for cell in trial_cells(study) if cell.arm == "group"} == {4, 8, 16}


MISTAKES = [
    ({"tune": {"optimizer.lr": []}}, r"tune\.optimizer\.lr: got \[\], expected a list of at least one value"),
    ({"tune": {"optimizer.rate": [1]}}, r"tune: key: got 'optimizer\.rate', expected a key of the run configuration"),
    ({"tune": {"seeds": 2}}, r"expected at least one key with the values to try"),
    ({"tune": {**GRID, "seeds": 0}}, r"tune\.seeds: got 0, expected a number of seeds"),
    ({"tune": {**GRID, "seeds": [1, 7]}}, r"tune\.seeds: got \[1, 7\], expected .* that are not the study's"),
    ({"tune": {**GRID, "untuned": 3}}, r"tune\.untuned: got 3, expected true or false"),
    (
        {"tune": {"optimizer.lr": [-1.0]}},
        r"arm batch, optimizer\.lr -1\.0: optimizer\.lr: got -1\.0, expected a positive",
    ),
    ({"tune": GRID, "axes": GRID}, r"tune: got 'optimizer\.lr', expected a key that the study does not vary"),
    ({"tune": GRID, "base": {}}, r"data\.validation_fraction: got 0, expected a fraction above 0"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        tuned(**changes)
    assert "\n" not in str(raised.value)


def test_a_trial_without_validation_is_done_again_when_there_is_one(tmp_path, monkeypatch, capsys):
    def without(config, out=None, *, resume=False):
        out.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(fake(config), validation=None).to_json(out / "result.json")

    monkeypatch.setattr(commands, "load_study", lambda _: tuned())
    monkeypatch.setattr(commands, "train_function", lambda _: without)
    assert commands.run_study("small", tmp_path, executor="here") == 1
    assert "no validation metric" in capsys.readouterr().err
    assert not read_records(tmp_path)
    assert commands.print_status("small", tmp_path) == 0
    monkeypatch.setattr(commands, "train_function", lambda _: train)
    assert commands.run_study("small", tmp_path, executor="here") == 0
    assert len(read_records(tmp_path)) == 24


def test_no_arm_has_a_larger_budget():
    arms = {"batch": {}, "group": {"overrides": {"norm": {"name": "group"}}, "tune": {"norm.groups": [4, 8]}}}
    with pytest.raises(ConfigError, match=r"as many candidates for each arm.*\{'batch': 3, 'group': 2\}"):
        tuned(arms=arms)
    with pytest.raises(ConfigError, match=r"none without a `tune` of the study"):
        tuned(arms=arms, tune=None)


def train(config, out=None, *, resume=False):
    with (out.parent.parent / "calls.txt").open("a") as file:
        file.write(f"{out.name}\n")
    out.mkdir(parents=True)
    fake(config).to_json(out / "result.json")


def train_until(number):
    def stop(config, out=None, *, resume=False):
        calls = out.parent.parent / "calls.txt"
        if calls.exists() and len(calls.read_text().split()) >= number:
            raise KeyboardInterrupt
        train(config, out)

    return stop


def test_a_tuned_study_is_run_in_two_stages_and_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    study = tuned()
    monkeypatch.setattr(commands, "load_study", lambda _: study)
    monkeypatch.setattr(commands, "train_function", lambda _: train_until(20))
    with pytest.raises(KeyboardInterrupt):
        commands.run_study("small", tmp_path, executor="here")
    assert len(read_records(tmp_path)) == 20, "18 trials and 2 of the study's runs"
    monkeypatch.setattr(commands, "train_function", lambda _: train)
    assert commands.run_study("small", tmp_path, executor="here") == 0
    calls = (tmp_path / "calls.txt").read_text().split()
    assert len(calls) == len(set(calls)) == 18 + 6
    shown = capsys.readouterr().out
    assert "batch, optimizer.lr 0.03, seed 1000: validation score 10.0 %" in shown
    assert "batch, optimizer.lr 0.03, seed 0: test score 50.0 %" in shown
    page = (tmp_path / "report.html").read_text()
    assert "What each arm chose" in page
    assert "Each arm at each place chose optimizer.lr among 3 candidates by validation data and 2 other seeds." in page
    assert "No arm's learning rate was tuned" not in page
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {(row["arm"], row["tuned"]) for row in rows} == {(arm, f"optimizer.lr {lr}") for arm, lr in BEST.items()}
    capsys.readouterr()
    assert commands.plan_study("small", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "tuning: 18 cells, 18 different runs" in printed
    assert "6 cells, 24 different runs: 24 done, 0 to do" in printed
    assert commands.print_status("small", tmp_path) == 0
    assert "done       24" in capsys.readouterr().out


def test_a_failed_trial_stops_its_setting_alone(tmp_path, monkeypatch, capsys):
    def fails(config, out=None, *, resume=False):
        if config.norm.name == "sync" and config.optimizer.lr == 0.1:
            raise RuntimeError("no luck")
        train(config, out)

    monkeypatch.setattr(commands, "load_study", lambda _: tuned())
    monkeypatch.setattr(commands, "train_function", lambda _: fails)
    assert commands.run_study("small", tmp_path, executor="here") == 1
    assert "sync, optimizer.lr 0.1, seed 1000 and 1 other alike: RuntimeError: no luck" in capsys.readouterr().err
    arms = {
        arm_of(config_from_dict(record.result.config))
        for record in read_records(tmp_path).values()
        if record.result.config["seed"] == 0
    }
    assert arms == {"batch", "iid"}
    assert "not yet" in (tmp_path / "report.html").read_text()


def test_tuning_on_noise_makes_no_false_claims():
    """Arms that are alike, each with the luckiest candidate: the final seeds know nothing of the luck."""
    study = tuned(seeds=[0, 1, 2])
    trials = trial_cells(study)
    rng = np.random.default_rng(0)

    def drawn(cells):
        found = {}
        for cell in cells:
            test, validation = 0.1 + 0.01 * rng.standard_normal(2)
            values = {"test": {"score": test, "loss": 1.0}, "validation": {"score": validation, "loss": 1.0}}
            found[cell.key] = dataclasses.replace(fake_result(cell.config), metric=Metric("score"), **values)
        return found

    claims, studies = 0, 100
    for _ in range(studies):
        results = drawn(trials)
        _, cells = stages(study, results)
        found = findings_of(summary_of(study, cells, results | drawn(cells)))
        claims += any(finding.verdict in ("better", "worse") for finding in found)
    # Of 100 studies, 5 are 5 %; a rate of 5 % gives more than 10 with probability 0.01.
    assert claims <= 10
    assert len({tuple(choice.chosen.candidate) for choice in choices_of(study, results).values()}) >= 1


def finished(study, score=fake):
    """All results of a study, whose settings choose by ``score``."""
    results = {cell.key: score(cell.config) for cell in trial_cells(study)}
    _, cells = stages(study, results)
    return cells, results | {cell.key: score(cell.config) for cell in cells}


def test_what_each_side_of_a_contrast_chose_stands_beside_it(tmp_path, capsys):
    study = tuned(seeds=[0, 1, 2], tune={**GRID, "seeds": 2, "untuned": True})
    cells, results = finished(study)
    summary = summary_of(study, cells, results)
    table = contrasts_table(summary, findings_of(summary))
    assert table.head[-2:] == ["chosen", "chosen against"]
    assert [row[-2:] for row in table.rows] == [
        ["optimizer.lr 0.03", "optimizer.lr 0.1"],
        ["optimizer.lr 0.3", "optimizer.lr 0.1"],
    ]
    print_table(study, cells, results)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "(optimizer.lr 0.03 against optimizer.lr 0.1)" in " ".join(re.sub(r"[^\w.()]", " ", printed).split())
    page = write_report(study, cells, results, tmp_path, command="").read_text()
    assert '<th class="words">chosen</th><th class="words">chosen against</th>' in page
    side = '<td class="words" data-head="{}">{}</td>'
    assert side.format("chosen", "optimizer.lr 0.03") + side.format("chosen against", "optimizer.lr 0.1") in page
    export(study, cells, results, "csv", tmp_path / "table.csv")
    rows = {row["arm"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert (rows["batch"]["chosen"], rows["batch"]["chosen_against"]) == ("optimizer.lr 0.03", "optimizer.lr 0.1")
    assert (rows["iid"]["chosen"], rows["iid"]["chosen_against"]) == ("optimizer.lr 0.1", "")
    assert rows["iid untuned"]["chosen"] == ""


def test_a_side_may_be_untuned_or_undecided_and_a_difference_of_differences_has_four():
    content = [
        {"arm": "batch", "against": {"arm": "batch untuned"}},
        {"arm": "batch", "against": {"arm": "sync"}, "minus": {"at": {"per_gpu_batch_size": 8}}},
    ]
    base = {"data": BASE["data"]}
    sweep = {"values": [2, 8], "global_batch_size": 16}
    study = tuned(base=base, sweep=sweep, tune={**GRID, "untuned": True}, contrasts=content)
    cells, results = finished(study)
    summary = summary_of(study, cells, results)
    assert [chosen_words(summary, contrast) for contrast in study.contrasts] == [
        ("optimizer.lr 0.03", "untuned"),
        ("optimizer.lr 0.03 − optimizer.lr 0.3", "optimizer.lr 0.03 − optimizer.lr 0.3"),
    ]
    _, cells = stages(study, {})
    assert chosen_words(summary_of(study, cells, {}), study.contrasts[0]) == ("not yet", "untuned")
    plain = small_study()
    summary = summary_of(plain, study_cells(plain), {})
    assert "chosen" not in contrasts_table(summary, findings_of(summary)).head


def test_candidates_as_good_as_the_chosen_one_are_named():
    def ties(config):
        error = {0.03: 0.3, 0.1: 0.2, 0.3: 0.2}[config.optimizer.lr] + (0.1 if config.seed == 1000 else 0.0)
        if config.optimizer.lr == 0.3:  # the same scores with the seeds exchanged
            error += -0.1 if config.seed == 1000 else 0.1
        return dataclasses.replace(fake(config), validation={"score": error, "loss": 1.0})

    study = tuned()
    _, results = finished(study, ties)
    for choice in choices_of(study, results).values():
        assert (dict(choice.chosen.candidate), choice.tied) == ({"optimizer.lr": 0.1}, [(("optimizer.lr", 0.3),)])
    assert choices_table(study, results).rows[0][2] == "optimizer.lr 0.1, tied with optimizer.lr 0.3"
    _, results = finished(study)
    assert choices_table(study, results).rows[0][2] == "optimizer.lr 0.03"
