"""Trackers: what accelerate's own code sends to W&B and MLflow, and where it ends up without a network."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from accelerate.utils import LoggerType

from syncbn.train import RunConfig, train
from syncbn.train.config import config_from_dict

TRACKING = "accelerate.tracking._available_trackers"


def small() -> RunConfig:
    data = {"name": "digits", "train_samples": 60, "validation_fraction": 0.2}
    return config_from_dict({"device": "cpu", "data": data, "model": {"width": 4}, "budget": {"epochs": 1}})


class Calls:
    """A stand-in for a package: every call of a function in it is kept."""

    def __init__(self, name, **results):
        self.calls = []
        self.module = ModuleType(name)
        self.results = results
        self.module.__getattr__ = self.function

    def function(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*words, **options):
            self.calls.append((name, words, options))
            return self.results.get(name)

        return call

    def of(self, name):
        return [(words, options) for each, words, options in self.calls if each == name]


def test_wandb_is_told_the_run_its_folder_and_all_metrics(tmp_path, monkeypatch):
    wandb = Calls("wandb")
    run = SimpleNamespace(log=wandb.function("log"), finish=wandb.function("finish"))
    wandb.results["init"] = run
    wandb.module.config = SimpleNamespace(update=wandb.function("update"))
    monkeypatch.setattr(TRACKING, [LoggerType.WANDB])
    monkeypatch.setitem(sys.modules, "wandb", wandb.module)
    out = tmp_path / "first"
    result = train(small(), out, trackers=["wandb"])
    assert wandb.of("init") == [((), {"project": "syncbn", "name": "first", "dir": str(out)})]
    (values,), _ = wandb.of("update")[0]
    assert (values["norm.name"], values["device"]) == ("batch", "cpu")
    logged = [(set(values), options["step"]) for (values,), options in wandb.of("log")]
    kinds = {"train_loss", "lr"}, {"validation_loss", "validation_error"}, {"test_loss", "test_error"}
    assert logged == [(kind, result.steps) for kind in kinds]
    assert len(wandb.of("finish")) == 1


def test_mlflow_is_told_the_run_and_all_metrics(tmp_path, monkeypatch):
    mlflow = Calls("mlflow", search_experiments=[], create_experiment="7")
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    mlflow.module.utils = SimpleNamespace(validation=limits)
    monkeypatch.setattr(TRACKING, [LoggerType.MLFLOW])
    monkeypatch.setitem(sys.modules, "mlflow", mlflow.module)
    result = train(small(), tmp_path / "first", trackers=["mlflow"])
    assert mlflow.of("create_experiment")[0][1]["name"] == "syncbn"
    assert {"experiment_id": "7", "run_name": "first"}.items() <= mlflow.of("start_run")[0][1].items()
    assert mlflow.of("log_params")[0][0][0]["norm.name"] == "batch"
    names = {name for (values,), _ in mlflow.of("log_metrics") for name in values}
    assert names == {"train_loss", "lr", *(f"{part}_{x}" for part in ("validation", "test") for x in ("loss", "error"))}
    assert {options["step"] for _, options in mlflow.of("log_metrics")} == {result.steps}
    assert len(mlflow.of("end_run")) == 1


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; the test above has a stand-in for it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(small(), tmp_path / "first", trackers=["wandb"])
    wandb.teardown()  # its own process writes the file
    (file,) = (tmp_path / "first" / "wandb").glob("offline-run-*/*.wandb")
    assert b"validation_error" in file.read_bytes()


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; the test above has a stand-in for it")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny writes no database")
    place = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    result = train(small(), tmp_path / "first", trackers=["mlflow"])
    client = mlflow.MlflowClient(place)
    (run,) = client.search_runs([client.get_experiment_by_name("syncbn").experiment_id])
    assert run.info.run_name == "first"
    assert run.data.metrics["test_error"] == pytest.approx(result.score)
    assert run.data.params["norm.name"] == "batch"
