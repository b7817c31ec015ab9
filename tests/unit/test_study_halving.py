"""Successive halving: what each rung compares and keeps, that it goes on after a kill, and that it claims nothing."""

from __future__ import annotations

import collections
import dataclasses
import doctest
import itertools
import re

import numpy as np
import own_loops
import pytest
from study_fakes import fake_result, small_study

from syncbn.study import Study, commands
from syncbn.study.analysis.findings import findings_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan import halving
from syncbn.study.plan.grid import Place, study_cells
from syncbn.study.plan.halving import Rung, rungs_of
from syncbn.study.plan.tuning import UNDECIDED, choices_of, trial_cells, tunings_of
from syncbn.study.report import report
from syncbn.study.report.tuning import choices_table, rung_lines
from syncbn.study.run.jobs import Job
from syncbn.study.run.logs import note_failure
from syncbn.study.run.own_loop import train_function
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import run_cells
from syncbn.study.stages import run_stages, stages
from syncbn.train.config import ConfigError, config_from_dict
from syncbn.train.result import Metric

BASE = {
    "gpus": 4,
    "per_gpu_batch_size": 4,
    "data": {"name": "digits", "validation_fraction": 0.2},
    "budget": {"epochs": 6},
}
ARMS = {"batch": {"overrides": {"norm": {"name": "batch"}}}, "sync": {"overrides": {"norm": {"name": "sync"}}}}
RATES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
"""With a factor of 3, two rungs: seven candidates at 2 epochs, three at 6."""


def halved(rates=RATES, factor=3, seeds=1, **changes):
    tune = {"optimizer.lr": rates, "seeds": seeds, "halving": factor}
    return small_study(**{"base": BASE, "arms": ARMS, "tune": tune, **changes})


def result(config, validation, test=0.5):
    if validation is None:
        return dataclasses.replace(fake_result(config, status="diverged"), metric=Metric("score"))
    scores = {"validation": {"score": validation, "loss": 1.0}, "test": {"score": test, "loss": 1.0}}
    return dataclasses.replace(fake_result(config), metric=Metric("score"), **scores)


def tune(study, score, test=lambda config: 0.5):
    """The results of the tuning, rung by rung; ``score`` of a configuration is its validation metric."""
    results = {}
    while new := [cell for cell in trial_cells(study, results) if cell.key not in results]:
        results |= {cell.key: result(cell.config, score(cell.config), test(cell.config)) for cell in new}
    return results


def rates(tried):
    return [dict(each.candidate)["optimizer.lr"] for each in tried]


def test_examples_of_the_docstrings():
    found = doctest.testmod(halving)
    assert (found.failed, found.attempted > 0) == (0, True)


@pytest.mark.parametrize(
    ("candidates", "factor", "whole", "expected"),
    [
        (9, 3, 9, [(9, 3), (3, 9)]),
        (27, 3, 9, [(27, 1), (9, 3), (3, 9)]),
        (10, 3, 6, [(10, 1), (4, 2), (2, 6)]),
        (5, 2, 8, [(5, 2), (3, 4), (2, 8)]),
        (16, 4, 100, [(16, 25), (4, 100)]),
        (27, 3, 2, [(27, 1), (3, 2)]),
        (27, 3, 1, [(27, 1)]),
        (3, 3, 9, [(3, 9)]),
        (9, None, 9, [(9, 9)]),
    ],
)
def test_rungs_by_hand(candidates, factor, whole, expected):
    assert rungs_of(candidates, factor, whole) == [Rung(*pair) for pair in expected]


def test_rungs_of_any_grid():
    for candidates, factor, whole in itertools.product(range(1, 60), range(2, 6), range(2, 30)):
        rungs = rungs_of(candidates, factor, whole)
        assert rungs[0].candidates == candidates, "every candidate runs at least one rung"
        assert 1 <= rungs[-1].candidates <= factor
        assert rungs[-1].budget == whole
        assert rungs[0].budget >= 1
        for one, other in itertools.pairwise(rungs):
            assert one.budget < other.budget <= one.budget * factor or one.budget == 1
            assert one.candidates > other.candidates


def test_the_rule_by_hand():
    """Means over the seeds rank the first rung; the last one decides, whatever was best before."""
    short = {0.01: 0.5, 0.02: 0.2, 0.03: 0.4, 0.04: 0.1, 0.05: 0.6, 0.06: 0.3, 0.07: 0.7}
    whole = {0.02: 0.25, 0.04: 0.35, 0.06: 0.15}

    def score(config):
        return (short if config.budget.epochs == 2 else whole)[config.optimizer.lr] + 0.3 * (config.seed == 1000)

    study = halved(seeds=2)
    assert study.tune.halving == 3
    results = tune(study, score)
    for choice in choices_of(study, results).values():
        assert [rates(rung) for rung in choice.rungs] == [RATES, [0.02, 0.04, 0.06]]
        assert dict(choice.chosen.candidate) == {"optimizer.lr": 0.06}
        assert choice.chosen.mean == pytest.approx(0.3)
        assert rates(choice.tried) == RATES
        assert choice.at_edge == []
    ran = collections.Counter((run.config["budget"]["epochs"], run.config["seed"]) for run in results.values())
    assert ran == {(2, 1000): 14, (2, 1001): 14, (6, 1000): 6, (6, 1001): 6}
    _, cells = stages(study, results)
    assert {(cell.config.optimizer.lr, cell.config.budget.epochs, cell.seed) for cell in cells} == {
        (0.06, 6, 0),
        (0.06, 6, 1),
    }


def test_of_equals_the_first_go_on_and_what_diverged_comes_last():
    scores = {0.01: None, 0.02: 0.5, 0.03: 0.2, 0.04: 0.5, 0.05: 0.5, 0.06: None, 0.07: 0.9}
    study = halved(seeds=2)

    def score(config):
        lost = config.seed == 1001 and config.optimizer.lr == 0.03 and config.budget.epochs == 6
        return None if lost else scores[config.optimizer.lr]

    (choice, _) = choices_of(study, tune(study, score)).values()
    assert rates(choice.rungs[1]) == [0.02, 0.03, 0.04]
    assert dict(choice.chosen.candidate) == {"optimizer.lr": 0.02}, "0.03 diverged with the whole budget"
    assert choice.tied == [(("optimizer.lr", 0.04),)]
    everywhere = choices_of(study, tune(study, lambda config: None))[Place("batch", ())]
    assert rates(everywhere.rungs[1]) == [0.01, 0.02, 0.03]
    assert (dict(everywhere.chosen.candidate), everywhere.tied) == ({"optimizer.lr": 0.01}, [])


def test_higher_may_be_better():
    study = halved()

    def higher(config):
        return config.optimizer.lr

    results = tune(study, higher)
    flipped = {
        key: dataclasses.replace(each, metric=Metric("score", higher_is_better=True)) for key, each in results.items()
    }
    left = [cell for cell in trial_cells(study, flipped) if cell.key not in flipped]
    assert {cell.config.optimizer.lr for cell in left} == {0.05, 0.06, 0.07}


def test_the_full_grid_chooses_the_same_if_the_ranking_is_the_same_at_all_budgets():
    place = np.random.default_rng(0).permutation(len(RATES))

    def score(config):
        return 0.1 * float(place[RATES.index(config.optimizer.lr)]) + 1 / config.budget.epochs

    study, full = halved(seeds=2), halved(seeds=2, factor=False)
    assert full.tune.halving is None
    halves, every = tune(study, score), tune(full, score)
    chosen = {place: choice.chosen.candidate for place, choice in choices_of(study, halves).items()}
    assert chosen == {place: choice.chosen.candidate for place, choice in choices_of(full, every).items()}
    last = {cell.key for tuning in tunings_of(study, halves).values() for t in tuning.compared[-1] for cell in t.cells}
    assert last <= every.keys(), "runs with the whole budget are those of the full grid"
    assert len(halves) == 2 * 2 * (7 + 3)


def test_budgets_in_steps_and_of_each_place():
    steps = {**BASE, "budget": {"epochs": None, "steps": 100}}
    (tuning, _) = tunings_of(halved(base=steps, factor=2)).values()
    assert tuning.rungs == ((7, 25), (4, 50), (2, 100))
    assert {cell.config.budget.steps for cell in tuning.cells} == {25}
    assert tuning.cells[0].label == "batch, optimizer.lr 0.01, 25 steps, seed 1000"
    sweep = {"kind": "coupled", "values": [2, 4], "hold": ["epochs", "steps"], "steps": 90}
    base = {key: value for key, value in BASE.items() if key != "per_gpu_batch_size"}
    study = halved(base=base, sweep=sweep)
    budgets = {dict(place.point)["hold"]: tuning.rungs[0].budget for place, tuning in tunings_of(study).items()}
    assert budgets == {"epochs": 2, "steps": 30}
    assert rung_lines(study) == [
        "each setting compares 7 at 2 epochs and 3 at 6 epochs",
        "each setting compares 7 at 30 steps and 3 at 90 steps",
    ]


def test_cells_of_later_rungs_are_counted_before_they_are_known():
    study = halved()
    trials, cells = stages(study, {})
    undecided = [cell for cell in trials if cell.key.startswith(UNDECIDED)]
    assert (len(trials), len(undecided)) == (2 * (7 + 3), 2 * 3)
    assert {cell.config.budget.epochs for cell in undecided} == {6}
    assert all(cell.key.startswith(UNDECIDED) for cell in cells)
    first = {cell.key: result(cell.config, cell.config.optimizer.lr) for cell in trial_cells(study)}
    trials, cells = stages(study, first)
    assert not [cell for cell in trials if cell.key.startswith(UNDECIDED)]
    assert all(cell.key.startswith(UNDECIDED) for cell in cells)


def test_test_scores_choose_nothing():
    rng = np.random.default_rng(0)
    noise = {}

    def score(config):
        return noise.setdefault((config.norm.name, config.optimizer.lr, config.budget.epochs), float(rng.random()))

    study = halved()
    honest = tune(study, score)
    poisoned = tune(study, score, test=lambda config: float(rng.random()))
    assert honest.keys() == poisoned.keys()
    assert [c.chosen.candidate for c in choices_of(study, honest).values()] == [
        c.chosen.candidate for c in choices_of(study, poisoned).values()
    ]


def train(config, out=None, *, resume=False):
    with (out.parent.parent / "calls.txt").open("a") as file:
        file.write(f"{out.name}\n")
    out.mkdir(parents=True)
    found = result(config, abs(config.optimizer.lr - 0.03) + 1 / config.budget.epochs)
    dataclasses.replace(found, seconds=float(config.budget.epochs)).to_json(out / "result.json")


def train_until(number):
    def stop(config, out=None, *, resume=False):
        calls = out.parent.parent / "calls.txt"
        if calls.exists() and len(calls.read_text().split()) >= number:
            raise KeyboardInterrupt
        train(config, out)

    return stop


@pytest.mark.parametrize("stop", [5, 14, 16, 20])
def test_a_study_that_was_killed_goes_on(tmp_path, monkeypatch, capsys, stop):
    """In the first rung, between the rungs, in the last rung, and before the study's own runs."""
    study = halved(factor=True)
    monkeypatch.setattr(report, "drawings", lambda *_: {})  # figures take most of the time
    monkeypatch.setattr(commands, "load_study", lambda _: study)
    monkeypatch.setattr(commands, "train_function", lambda _: train_until(stop))
    with pytest.raises(KeyboardInterrupt):
        commands.run_study("small", tmp_path, executor="here")
    assert len(read_records(tmp_path)) == stop
    capsys.readouterr()
    assert commands.plan_study("small", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "tuning: 20 cells, 20 different runs" in printed
    assert "each setting compares 7 at 2 epochs and 3 at 6 epochs" in printed
    assert f"4 cells, 24 different runs: {stop} done, {24 - stop} to do" in printed
    assert "left, one run at a time" in printed
    assert commands.print_status("small", tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"missing  {24 - stop:4}" in printed
    assert f"done     {stop:4}" in printed
    assert commands.report_study("small", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert ("not yet: 0 of 2 rungs" in page) == (stop < 14)
    monkeypatch.setattr(commands, "train_function", lambda _: train)
    assert commands.run_study("small", tmp_path, executor="here") == 0
    calls = (tmp_path / "calls.txt").read_text().split()
    assert len(calls) == len(set(calls)) == 24
    shown = capsys.readouterr().out
    assert "tuning first: 20 runs" in shown
    assert "no longer in the study" not in shown
    page = (tmp_path / "report.html").read_text()
    assert "among 7 candidates by validation data and 1 other seed, by successive halving." in page
    assert re.search("7 at 2 epochs, of which optimizer.lr .* went on; 3 at 6 epochs", page)
    own = [record.result.config for record in read_records(tmp_path).values() if record.result.config["seed"] < 1000]
    assert {(config["optimizer"]["lr"], config["budget"]["epochs"]) for config in own} == {(0.03, 6)}


def test_the_estimate_knows_that_later_rungs_take_longer(tmp_path, monkeypatch, capsys):
    study = halved()
    records = {}
    for cell in trial_cells(study):
        ended = result(cell.config, cell.config.optimizer.lr)
        records[cell.key] = type("Record", (), {"result": ended, "seconds": 10.0})
    monkeypatch.setattr(commands, "load_study", lambda _: study)
    monkeypatch.setattr(commands, "read_records", lambda _: records)
    monkeypatch.setattr(
        commands, "recorded_stages", lambda *_: stages(study, {k: r.result for k, r in records.items()})
    )
    assert commands.plan_study("small", tmp_path, workers=1) == 0
    # Two epochs took 10 s; six runs of the tuning and four of the study have six.
    assert "about 5 min left, one run at a time" in capsys.readouterr().out


def test_a_failed_run_of_a_rung_stops_its_setting_alone(tmp_path, monkeypatch, capsys):
    def fails(config, out=None, *, resume=False):
        if config.norm.name == "sync" and config.budget.epochs == 6 and config.seed == 1000:
            raise RuntimeError("no luck")
        train(config, out)

    monkeypatch.setattr(commands, "load_study", lambda _: halved())
    monkeypatch.setattr(commands, "train_function", lambda _: fails)
    assert commands.run_study("small", tmp_path, executor="here") == 1
    assert (
        "sync, optimizer.lr 0.02, 6 epochs, seed 1000 and 2 others alike: RuntimeError: no luck"
        in capsys.readouterr().err
    )
    page = (tmp_path / "report.html").read_text()
    assert "none: 3 runs failed" in page
    assert "Without a choice, as runs of the tuning failed: sync (3 runs)." in page
    assert "sync, optimizer.lr 0.02, 6 epochs, seed 1000 and 2 others alike: RuntimeError: no luck" in page
    configs = [config_from_dict(record.result.config) for record in read_records(tmp_path).values()]
    assert {config.norm.name for config in configs if config.seed < 1000} == {"batch"}


def test_a_rung_that_ends_in_a_tie_says_so():
    """Which of equally good candidates goes on is the order of the grid, and no finding."""
    study = halved()
    results = tune(study, lambda config: 0.9 if config.optimizer.lr <= 0.05 else 1.0)
    table = choices_table(study, results)
    rungs = table.rows[0][table.head.index("candidates by rung")]
    assert "optimizer.lr 0.03 (90.0) went on, as good as 2 others that did not; 3 at 6 epochs" in rungs


def test_what_failed_is_tried_again_when_nothing_else_is_left(tmp_path):
    """Under a launcher a failure ends all processes: a tuning run that always fails must not keep others waiting."""
    study, tried = halved(rates=RATES[:4]), []

    def trained(config, out, *, resume):
        out.mkdir(parents=True)
        result(config, 0.5).to_json(out / "result.json")

    def launched(cells, out):
        for cell in cells:
            tried.append(cell)
            job = Job(cell=cell, out=out)
            if cell.arm == "sync" and cell.config.optimizer.lr == 0.02:
                note_failure(job.log, "no luck")
                raise SystemExit(1)
        return run_cells(cells, out, train=trained, executor="here")

    for attempt in range(2):
        with pytest.raises(SystemExit):
            run_stages(study, tmp_path, launched)
        own = {cell.arm for cell in tried if not cell.tuning}
        assert own == (set(), {"batch"})[attempt]
    assert tried[-1].config.optimizer.lr == 0.02, "last"


def test_a_training_loop_of_the_user_finds_its_budget(tmp_path, monkeypatch):
    """Whatever order the runs of a rung end in, the same runs and the same choices."""
    monkeypatch.setattr(report, "drawings", lambda *_: {})

    def made():
        return Study(
            run=own_loops.budgeted,
            metric={"name": "error", "percent": False},
            base={"gpus": 2, "per_gpu_batch_size": 4, "device": "cpu", "budget": {"epochs": 9}},
            arms=ARMS,
            seeds=range(3),
            tune={"optimizer.lr": [0.001, 0.01, 0.05, 0.1, 0.5], "halving": True},
        )

    def backwards(cells, out):
        return run_cells(cells[::-1], out, train=train_function(made().plan), executor="here")

    made().run(tmp_path / "1", progress=False)
    run_stages(made().plan, tmp_path / "2", backwards)
    records = [read_records(tmp_path / name) for name in "12"]
    assert records[0].keys() == records[1].keys()
    trained = collections.Counter(record.result.test["epochs"] for record in records[0].values())
    assert trained == {3: 2 * 5, 9: 2 * 2 + 2 * 3}
    for name in "12":
        assert set(made().frame(tmp_path / name)["tuned"]) == {"optimizer.lr 0.1"}


def test_the_table_has_rungs_and_cost():
    study = halved(seeds=2)
    results = tune(study, lambda config: config.optimizer.lr)
    results = {key: dataclasses.replace(r, seconds=2.0 * r.config["budget"]["epochs"]) for key, r in results.items()}
    table = choices_table(study, results)
    assert table.head[-5:] == ["runs", "seconds", "candidates by rung", "trained", "full grid"]
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["chosen"], row["at the edge"], row["validation"]) == ("optimizer.lr 0.01", "optimizer.lr", "1.0")
    assert row["other candidates"] == "2.0 to 3.0", "of the last rung"
    assert (row["runs"], row["seconds"]) == ("20", "128")
    went = "optimizer.lr 0.01 (1.0), optimizer.lr 0.02 (2.0) and optimizer.lr 0.03 (3.0)"
    assert row["candidates by rung"] == f"7 at 2 epochs, of which {went} went on; 3 at 6 epochs"
    assert (row["trained"], row["full grid"]) == ("64 of 84 epochs", "about 168 s")
    half = choices_table(study, {cell.key: results[cell.key] for cell in trial_cells(study)})
    assert half.rows[0][2] == "not yet: 1 of 2 rungs"
    assert {len(row) for row in half.rows} == {len(half.head)}


MISTAKES = [
    ({"factor": 1}, r"tune\.halving: got 1, expected true, false, or a factor of at least 2"),
    ({"factor": "yes"}, r"tune\.halving: got 'yes', expected true, false, or a factor"),
    ({"factor": 2.5}, r"tune\.halving: got 2\.5, expected true"),
    ({"factor": 7}, r"tune\.halving: got 7, expected a factor below the number of candidates \(7\)"),
    ({"rates": [0.1, 0.2], "factor": True}, r"tune\.halving: got 3, expected a factor below .* \(2\)"),
    ({"base": {**BASE, "budget": {"epochs": 1}}}, r"budget\.epochs: got 1, expected at least 2 epochs"),
    (
        {"tune": {"budget.epochs": [1, 2, 3, 4], "halving": True}},
        r"tune: got \['budget\.epochs'\], expected no budget with halving",
    ),
    (
        {"run": "own_loops:budgeted", "metric": {"name": "error"}, "base": {"gpus": 2}},
        r"base: budget: got nothing, expected epochs or steps in `base`.*setting\.config\.budget\.epochs",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        halved(**changes)
    assert "\n" not in str(raised.value)


def test_halving_on_noise_makes_no_false_claims():
    """Arms that are alike, tuned on noise: the study's seeds know nothing of the luck of a rung."""
    study = halved(rates=[0.01, 0.02, 0.03, 0.04], factor=2, arms=ARMS | {"iid": ARMS_IID}, seeds=1)
    study = dataclasses.replace(study, seeds=(0, 1, 2))
    rng = np.random.default_rng(0)

    def noise(_):
        return 0.1 + 0.01 * float(rng.standard_normal())

    claims, chosen, studies = 0, set(), 60
    for _ in range(studies):
        results = tune(study, noise, noise)
        choices = {place: choice.chosen.candidate for place, choice in choices_of(study, results).items()}
        cells = study_cells(study, choices=choices)
        results |= {cell.key: result(cell.config, noise(cell.config), noise(cell.config)) for cell in cells}
        found = findings_of(summary_of(study, cells, results))
        assert len(found) == 2
        claims += any(finding.verdict in ("better", "worse") for finding in found)
        chosen |= set(choices.values())
    # Of 60 studies, 3 are 5 %; a rate of 5 % gives more than 7 with probability 0.01.
    assert claims <= 7
    assert len(chosen) == 4, "every candidate was lucky once"


ARMS_IID = {"overrides": {"norm": {"name": "batch", "eps": 2e-5}}, "reference": True}
