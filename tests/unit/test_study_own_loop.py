"""Studies over a training loop of the user's."""

from __future__ import annotations

import doctest
import json
import math
import os
import re
import sys

import own_loops
import pytest
import torch
from study_fakes import small_study
from torch import nn

from syncbn import BatchRenorm, SyncBatchNorm
from syncbn.study import commands
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.tuning import choices_of, trial_cells
from syncbn.study.run import own_loop
from syncbn.study.run.own_loop import OwnLoop, Setting, train_function
from syncbn.study.run.records import read_records
from syncbn.train.config import ConfigError, config_from_dict
from syncbn.train.data.generators import seed_generators
from syncbn.train.result import Metric, RunResult
from syncbn.train.tasks.named import TaskError

METRIC = {"name": "error", "percent": False}


def study(**changes):
    content = {
        "base": {"gpus": 4, "per_gpu_batch_size": 2, "device": "cpu", "optimizer": {"lr": 0.1}},
        "run": "own_loops:regression",
        "metric": METRIC,
        "arms": {
            "batch": {"overrides": {"norm": {"name": "batch"}}, "reference": True},
            "group": {"overrides": {"norm": {"name": "group", "groups": 2}}},
        },
        "seeds": [0, 1],
    }
    return small_study(**{**content, **changes})


def loop(run, **options):
    return OwnLoop(run=run, metric=Metric(**METRIC), **options)


def config(**changes):
    return config_from_dict({"gpus": 2, "per_gpu_batch_size": 2, "device": "cpu", "task": {"name": "a:b"}, **changes})


def test_examples_of_the_docstrings():
    found = doctest.testmod(own_loop)
    assert (found.failed, found.attempted > 0) == (0, True)


def test_a_study_of_a_users_loop(tmp_path, monkeypatch, capsys):
    made = study(axes={"task.options.width": [4, 8]})
    monkeypatch.setattr(commands, "load_study", lambda _: made)
    assert commands.run_study("study.yaml", tmp_path, workers=2) == 0
    records = read_records(tmp_path)
    assert len(records) == 2 * 2 * 2
    cells = {cell.key: cell for cell in study_cells(made)}
    for key, record in records.items():
        result = record.result
        assert result.config["task"]["options"]["width"] == dict(cells[key].point)["task.options.width"]
        assert (result.status, result.task, result.metric) == ("ok", "own_loops:regression", Metric(**METRIC))
        assert 0 < result.score < 5
        assert result.validation["error"] > 0
        assert [entry["step"] for entry in result.history] == [20, 40, 60]
        assert result.samples is None
    assert (tmp_path / "report.html").exists()
    capsys.readouterr()
    assert commands.run_study("study.yaml", tmp_path, workers=2) == 0
    assert "0 runs in" in capsys.readouterr().out


def test_seeds_are_the_runs_own_and_global_state_is_left(tmp_path):
    state = torch.get_rng_state()
    loop("own_loops:regression")(config(), tmp_path / "a")
    loop(own_loops.regression)(config(), tmp_path / "b")
    loop("own_loops:regression")(config(seed=1), tmp_path / "c")
    a, b, c = (RunResult.from_json(tmp_path / name / "result.json") for name in "abc")
    assert a.test == b.test != c.test
    assert b.task == "regression"
    assert torch.equal(torch.get_rng_state(), state)


def test_every_generator_is_seeded_for_the_run_and_left_as_it_was(tmp_path):
    drawn = []
    for runs in (0, 3):
        seed_generators(5)
        for name, seed in [("a", 0), ("b", 0), ("c", 1)][:runs]:
            loop("own_loops:draws")(config(seed=seed), tmp_path / name)
        drawn.append(own_loops.draws(None))
    assert drawn[0] == drawn[1]
    a, b, c = (RunResult.from_json(tmp_path / name / "result.json").test for name in "abc")
    assert a == b
    assert all(a[kind] != c[kind] for kind in ("torch", "numpy", "python"))


def test_each_setting_tunes_its_own_learning_rate(tmp_path):
    made = study(tune={"optimizer.lr": [0.01, 0.1], "seeds": 1})
    for cell in trial_cells(made):
        train_function(made)(cell.config, tmp_path / cell.key)
    results = {cell.key: RunResult.from_json(tmp_path / cell.key / "result.json") for cell in trial_cells(made)}
    choices = choices_of(made, results)
    for choice in choices.values():
        assert choice.chosen.mean == min(tried.mean for tried in choice.tried)


@pytest.fixture
def launched(monkeypatch):
    """The processes of a launcher find this folder's modules, as a user's find those of the working directory."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def test_several_processes(tmp_path, launched):
    sync = config(norm={"name": "sync"})
    loop("own_loops:distributed", processes=2)(sync, tmp_path / "sync")
    result = RunResult.from_json(tmp_path / "sync" / "result.json")
    assert (result.processes, result.test["world"], result.test["size"], result.score) == (2, 2, 2, 0.0)
    loop("own_loops:distributed", processes=2)(config(norm={"name": "batch"}), tmp_path / "batch")
    assert RunResult.from_json(tmp_path / "batch" / "result.json").score > 0


def test_how_logical_gpus_of_one_process_are_normalized():
    def layer(**changes):
        setting = Setting(config=config(gpus=4, **changes), out=None, resume=False)
        return setting.normalize(nn.Sequential(nn.BatchNorm1d(8)))[0], setting.batch_size

    local, size = layer(norm={"name": "batch"})
    assert (type(local).__name__, local.ghost_batch_size, size) == ("GhostBatchNorm", 2, 8)
    pairs, _ = layer(norm={"name": "sync"}, sync_group_size=2)
    assert (type(pairs).__name__, pairs.ghost_batch_size) == ("GhostBatchNorm", 4)
    assert isinstance(layer(norm={"name": "sync"})[0], SyncBatchNorm)
    assert isinstance(layer(norm={"name": "renorm", "sync": True})[0], BatchRenorm)
    assert type(layer(norm={"name": "group", "groups": 4})[0]) is nn.GroupNorm
    with pytest.raises(ConfigError, match=r"gpus: got 4, expected one process for each of the 4 logical GPUs"):
        layer(norm={"name": "renorm"})
    for name in ("mabn", "nf", "frozen"):
        with pytest.raises(ConfigError, match="a norm that does not change the training loop"):
            layer(norm={"name": name})


def test_weights_are_kept():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    nn.init.normal_(model[1].weight)
    weights = [p.detach().clone() for p in model.parameters()]
    normalized = Setting(config=config(norm={"name": "group", "groups": 2}), out=None, resume=False).normalize(model)
    assert all(torch.equal(a, b) for a, b in zip(weights, normalized.parameters(), strict=True))


def test_divergence_and_curves_after_a_kill(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "error": 9}\n{"step": 30, "error": 8}\n{"step": 40, "err')
    loop("own_loops:regression")(config(), tmp_path, resume=True)
    result = RunResult.from_json(tmp_path / "result.json")
    assert [entry["step"] for entry in result.history] == [20, 30, 40, 60]
    assert result.history[0]["test"]["error"] < 9, "what was reported last"
    loop("own_loops:diverges")(config(), tmp_path / "nan")
    found = RunResult.from_json(tmp_path / "nan" / "result.json")
    assert found.status == "diverged"
    assert math.isnan(found.score)


def test_a_corrected_direction_counts_from_then_on(tmp_path):
    made = study()
    for cell in study_cells(made):
        train_function(made)(cell.config, tmp_path / cell.key)
    results = {cell.key: RunResult.from_json(tmp_path / cell.key / "result.json") for cell in study_cells(made)}
    turned = study(metric={**METRIC, "higher_is_better": True})
    assert summary_of(turned, study_cells(turned), results).metric.higher_is_better
    renamed = study(metric={"name": "accuracy"})
    with pytest.raises(
        ConfigError, match=r"metric: got 'accuracy', expected error, as runs in the study's folder have it"
    ):
        summary_of(renamed, study_cells(renamed), results)


@pytest.mark.fault(
    "mistake",
    "a user's loop has changed since runs that are kept",
    moment="before the study goes on",
    outcome="a note that names the file",
    lost="nothing",
)
def test_a_changed_file_is_noted(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_loop.py").write_text("def run(setting):\n    return {'error': 0.5}\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = study(run="my_loop:run", seeds=[0])
    monkeypatch.setattr(commands, "load_study", lambda _: made)
    assert commands.run_study("study.yaml", tmp_path / "out", executor="here") == 0
    assert commands.run_study("study.yaml", tmp_path / "out", executor="here") == 0
    assert "has changed" not in capsys.readouterr().out
    (tmp_path / "my_loop.py").write_text("def run(setting):\n    return {'error': 0.25}\n")
    assert commands.plan_study("study.yaml", tmp_path / "out") == 0
    assert "note: my_loop.py has changed since 2 of the runs, which are kept" in capsys.readouterr().out


def test_code_that_is_not_there_stops_the_study_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "load_study", lambda _: study(run="own_loops:missing"))
    for command in (commands.plan_study, commands.run_study):
        with pytest.raises(ConfigError, match=r"run: got 'own_loops:missing', expected an attribute of own_loops"):
            command("study.yaml", tmp_path)


def test_groups_that_do_not_fit_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    uneven = config(gpus=12, sync_group_size=6, norm={"name": "sync"})
    with pytest.raises(ConfigError, match=r"sync_group_size: got 6, expected a multiple of the 4 GPUs of a process"):
        Setting(config=uneven, out=None, resume=False).normalize(nn.Sequential(nn.BatchNorm1d(3)))


def test_every_process_is_told_whether_the_run_was_begun(tmp_path, launched):
    two = loop("own_loops:resumes", processes=2)
    two(config(), tmp_path, resume=True)
    assert RunResult.from_json(tmp_path / "result.json").test["error"] == 0
    two(config(), tmp_path, resume=True)
    assert RunResult.from_json(tmp_path / "result.json").test["error"] == 2, "both processes"


WRONG = {
    "without_validation": r"returned \['error'\], expected 'validation_error' too, which the study's tuning chooses by",
    "wrong_name": r"returned \['accuracy'\], expected a dict of metrics with 'error'",
    "wrong_value": r"returned \{'error': 'small'\}, expected numbers",
    "returns_a_number": r"returned 0\.5, expected a dict of metrics",
    "raises": r"the function raised RuntimeError: no luck today",
    "missing": r"run: got 'own_loops:missing', expected an attribute of own_loops",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_loop_is_one_line(name, tmp_path):
    with pytest.raises((TaskError, ConfigError), match=WRONG[name]) as raised:
        loop(f"own_loops:{name}", tunes=name == "without_validation")(config(), tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"error": 37.25}, "returned 37.25 for 'error', which is in percent"),
        ({"error": -0.2}, "returned -0.2 for 'error'"),
        ({"error": 0.2, "validation_error": 1.01}, "returned 1.01 for 'validation_error'"),
    ],
)
def test_a_metric_in_percent_is_a_fraction(values, problem, tmp_path):
    with pytest.raises(TaskError) as raised:
        OwnLoop(run=lambda setting: values, metric=Metric("error"))(config(), tmp_path)
    expected = f"{problem}.* expected a fraction from 0 to 1; for any other metric, the study says `percent: false`"
    assert re.search(expected, str(raised.value))
    assert not (tmp_path / "result.json").exists()
    OwnLoop(run=lambda setting: values, metric=Metric(**METRIC))(config(), tmp_path)
    assert RunResult.from_json(tmp_path / "result.json").score == values["error"]


@pytest.mark.parametrize("value", [0.0, 1.0, 1.0004, -1e-7, math.nan, math.inf])
def test_rounding_and_divergence_are_no_mistakes_of_a_fraction(value, tmp_path):
    OwnLoop(run=lambda setting: {"error": value, "other": 1e9}, metric=Metric("error"))(config(), tmp_path)
    result = RunResult.from_json(tmp_path / "result.json")
    assert result.status == ("ok" if math.isfinite(value) else "diverged")


def test_only_what_was_returned_is_a_result(tmp_path):
    OwnLoop(run=lambda setting: {"error": 0.5, "validation_error": 0.25}, metric=Metric("error"))(config(), tmp_path)
    result = RunResult.from_json(tmp_path / "result.json")
    assert (result.test, result.validation) == ({"error": 0.5}, {"error": 0.25})


def test_a_mistake_in_one_of_several_processes(tmp_path, launched):
    from syncbn.train.launch_error import LaunchError

    with pytest.raises(LaunchError, match="the function raised RuntimeError: no luck today"):
        loop("own_loops:raises", processes=2)(config(), tmp_path)
    assert "no luck today" in (tmp_path / "processes.log").read_text()


FILE = [
    ({"run": "regression"}, r"run: got 'regression', expected module:function"),
    ({"metric": None}, r"metric: got nothing, expected a mapping"),
    ({"metric": {"name": "error", "better": "low"}}, r"metric: key: got 'better', expected one of name"),
    ({"run": 3}, r"run: got 3, expected module:function"),
    (
        {"metric": {"name": "validation_error"}},
        r"metric\.name: got 'validation_error', expected the name of a test metric",
    ),
    ({"metric": {"name": "error", "percent": 1}}, r"metric\.percent: got 1, expected true or false"),
    ({"processes": 0}, r"processes: got 0, expected a positive integer"),
    ({"run": None}, r"metric: got .*, expected none without `run`"),
    ({"parity": {"arm": "batch"}}, r"parity: got .*, expected none with `run`"),
    ({"base": {"task": {"name": "x:y"}}}, r"base\.task: key: got 'name', expected one of options"),
]


@pytest.mark.parametrize(("changes", "message"), FILE, ids=lambda value: json.dumps(value)[:30])
def test_a_mistake_in_the_file(changes, message):
    with pytest.raises(ConfigError, match=message):
        study(**changes)
