"""One run as a function: what it returns and writes, how it goes on when interrupted, how it diverges."""

from __future__ import annotations

import dataclasses
import doctest
import fcntl
import importlib
import json
import math
import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

import syncbn.train
from syncbn.train import Datasets, Task, loop
from syncbn.train.config import ConfigError, LocalError, RunWarning, config_from_dict, load_config
from syncbn.train.data import files as data_files
from syncbn.train.loop import train
from syncbn.train.optim import lr_factor, make_optimizer, peak_lr
from syncbn.train.parity import Trained, compare_runs
from syncbn.train.result import RunResult
from syncbn.train.schedule import keys_beyond
from syncbn.train.tasks.classification import Classification
from syncbn.train.tasks.named import TaskError

SMALL = {
    "gpus": 4,
    "per_gpu_batch_size": 8,
    "precision": "fp64",
    "device": "cpu",
    "data": {"name": "digits", "train_samples": 150, "augment": "crop", "class_skew": 2},
    "model": {"width": 4},
    "norm": {"name": "renorm", "warmup_steps": 2, "r_ramp_end": 9, "d_ramp_end": 7},
    "budget": {"epochs": 3},
}


def small(**changes):
    return config_from_dict({**SMALL, **changes})


def test_result_and_files(tmp_path):
    config = small()
    result = train(config, tmp_path, trackers=["tensorboard"])
    assert result.status == "ok"
    assert (result.steps, result.samples, len(result.losses)) == (15, 450, 15)
    assert (result.train_samples, result.validation_samples, result.test_samples) == (150, 0, 355)
    assert [h["epoch"] for h in result.history] == [1, 2, 3]
    assert (result.task, result.metric.name, result.validation) == ("classification", "error", None)
    assert result.test == result.history[-1]["test"]
    assert 0 <= result.score == result.test["error"] <= 1
    assert result.environment["torch"].startswith(torch.__version__.split("+")[0])
    assert RunResult.from_json(tmp_path / "result.json") == result
    assert load_config(tmp_path / "config.yaml") == config
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["train_loss"] for r in records if r["kind"] == "step"] == result.losses
    assert [r["step"] for r in records if r["kind"] == "eval"] == [5, 10, 15]
    assert list(tmp_path.rglob("events.out.tfevents*")), "TensorBoard wrote nothing"
    tensors = Trained.read(tmp_path).tensors
    assert sum(t.numel() for n, t in tensors.items() if "running" not in n and "tracked" not in n) == result.parameters


@pytest.mark.parametrize("model", [{"width": 4}, {"name": "mobilenet_v3_small", "options": {"dropout": 0.5}}], ids=str)
def test_interrupted_and_resumed_is_the_same_run(tmp_path, monkeypatch, model):
    data = SMALL["data"] if "width" in model else {"name": "synthetic", "synthetic_samples": 64}
    config = small(model=model, data=data, optimizer={"schedule": "one_cycle", "name": "adamw", "lr": 0.01})
    train(config, tmp_path / "whole")
    evaluate, calls = loop.evaluate, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken")
    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(ConfigError, match="resume"):
        train(config, tmp_path / "broken")
    train(config, tmp_path / "broken", resume=True)
    assert compare_runs(Trained.read(tmp_path / "whole"), Trained.read(tmp_path / "broken")).largest == 0
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken"))
    assert whole == broken


@pytest.mark.fault(
    "mistake",
    "another option at `--resume`",
    moment="before the first step",
    outcome="one line that names the key and both values",
    lost="nothing",
)
def test_resume_of_a_finished_run_returns_its_result(tmp_path):
    first = train(small(), tmp_path)
    stamp = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(small(), tmp_path, resume=True) == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="finished run"):
        train(small(), tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: got 0\.2, expected 0\.1"):
        train(small(optimizer={"lr": 0.2}), tmp_path, resume=True)


@pytest.mark.fault(
    "together",
    "two runs in one folder",
    moment="when the second one starts",
    outcome="one line; the first goes on",
    lost="nothing",
)
def test_two_runs_in_one_folder(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="no other run"):
            train(small(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]


@pytest.mark.fault(
    "data",
    "a learning rate makes the loss NaN",
    moment="in training",
    outcome="the run ends with status `diverged`, which is a result",
    lost="nothing",
)
def test_divergence_is_a_result(tmp_path):
    result = train(small(norm={"name": "none"}, optimizer={"lr": 1e30}), tmp_path)
    assert result.status == "diverged"
    assert result.test is None
    assert math.isnan(result.score)
    assert not math.isfinite(result.losses[-1])
    read = RunResult.from_json(tmp_path / "result.json")
    assert read.status == "diverged"
    assert len(read.losses) == len(result.losses)
    assert "NaN" not in (tmp_path / "result.json").read_text()


def test_global_state_is_left_as_found():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train(small())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert train(small()).losses == first.losses
    assert train(small(precision="bf16")).status == "ok", "one process can change the precision between runs"


def test_accelerates_environment_does_not_enter(monkeypatch):
    """`accelerate launch` may export it, and its loss division would silently change the gradients."""
    expected = train(small()).losses
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(small()).losses == expected


def test_settings_that_do_not_enter_the_training_may_change_on_resuming(tmp_path):
    train(small(), tmp_path)
    budget = {"epochs": 3, "eval_batch_size": 7, "checkpoint_every": 2}
    assert train(small(budget=budget), tmp_path, resume=True).steps == 15


def test_a_damaged_result_is_made_again(tmp_path):
    whole = train(small(), tmp_path)
    (tmp_path / "result.json").write_text('{"status": "ok"')
    assert train(small(), tmp_path, resume=True).losses == whole.losses


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.fault(
    "data",
    "an image cannot be read, with {workers} loader(s)",
    moment="in training",
    outcome="one line with its path",
    lost="the steps since the last checkpoint",
)
def test_an_image_that_cannot_be_read(tmp_path, monkeypatch, workers):
    """In a folder too large to be held, where each process meets its own images, and in a small one."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_text("no image")
    data = {"name": "imagefolder", "root": str(tmp_path), "image_size": 8, "workers": workers}
    with pytest.raises(ConfigError, match=r"data\.root: got .*0\.png"):
        train(small(data=data))
    monkeypatch.setattr(data_files, "HELD_BYTES", 0)
    with pytest.raises(LocalError, match=r"data\.root: got .*0\.png"):
        train(small(data=data))


def test_evaluations_tell_the_kinds_of_statistics_apart(tmp_path):
    """Batches of one class: with their own statistics they are seen as in training, and inference is not."""
    evaluation = {"population_samples": [32, 100, 10_000]}
    result = train(small(norm={"name": "batch"}, evaluation=evaluation), tmp_path)
    kinds = [(e["statistics"], e["estimator"], e["samples"]) for e in result.evaluations]
    # Whole global batches of 32, and no more than the 150 images have: 128.
    expected = [("population", estimator, n) for n in (32, 128) for estimator in ("mean", "total")]
    assert kinds == [("running", None, None), ("batch", None, None), *expected]
    assert result.evaluations[0]["test"] == result.test
    assert len({e["test"]["loss"] for e in result.evaluations}) == len(kinds)
    assert [layer["layer"] for layer in result.layers] == [f"layer{i}.norm" for i in range(1, 7)]
    assert [layer["count"] for layer in result.layers] == [8 * 64] * 2 + [8 * 16] * 2 + [8 * 4] * 2
    assert all(layer["kl"] > 0 and layer["effective"] > 1 and layer["dead"] == 0 for layer in result.layers)
    assert RunResult.from_json(tmp_path / "result.json") == result


def test_a_frozen_layer_stops_moving(monkeypatch):
    seen = []
    tell = loop.Run.tell_groups

    def watch(run, samples):
        tell(run, samples)
        seen.append((run.progress.step, run.norms[0].training, run.norms[0].running_mean.clone()))

    monkeypatch.setattr(loop.Run, "tell_groups", watch)
    train(small(norm={"name": "frozen", "freeze_at": 0.4}, evaluation={"batch": False, "population_samples": []}))
    assert [(step, training) for step, training, _ in seen] == [(step, step < 6) for step in range(15)]
    assert all(torch.equal(mean, seen[6][2]) for _, _, mean in seen[6:])
    assert not torch.equal(seen[5][2], seen[6][2])


def test_drop_last_leaves_out_the_smaller_step():
    data = {**SMALL["data"], "drop_last": True}
    assert train(small(data=data)).samples == 3 * 128
    with pytest.raises(ConfigError, match="per_gpu_batch_size"):
        train(small(data=data, per_gpu_batch_size=64))


def test_a_last_batch_that_cannot_be_normalized_is_a_mistake_with_a_remedy():
    """33 images: the second step has one, and resnet18 ends in 1x1 maps at this size."""
    data = {"name": "synthetic", "synthetic_samples": 33}
    config = small(model={"name": "resnet18"}, data=data, norm={"name": "batch"}, budget={"epochs": 1})
    with pytest.raises(LocalError, match=r"per_gpu_batch_size: got 8.*'layer4\.0\.bn1'.*one value per channel"):
        train(config)


def test_same_weights_for_every_norm():
    """Arms of a comparison start from the same weights and data: their first losses differ by the norm alone."""
    names = ({"name": "batch"}, {"name": "sync"}, {"name": "group", "groups": 2})
    losses = [train(small(norm=n, budget={"epochs": None, "steps": 1}), None).losses[0] for n in names]
    assert len({round(loss, 12) for loss in losses}) == 3
    again = train(small(norm=names[0], budget={"epochs": None, "steps": 1})).losses[0]
    assert again == losses[0]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "step"])
def test_schedules(schedule):
    config = small(optimizer={"schedule": schedule}).optimizer
    factors = [lr_factor(config, step, 100) for step in range(100)]
    assert max(factors) == pytest.approx(1.0, abs=1e-3)
    ends = {"constant": 1.0, "cosine": 0.0, "one_cycle": 0.0, "step": 0.01}
    assert factors[-1] == pytest.approx(ends[schedule], abs=1e-3)


def test_one_cycle_is_torchs():
    config = small(optimizer={"schedule": "one_cycle"}).optimizer
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    truth = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50, cycle_momentum=False)
    for step in range(50):
        assert lr_factor(config, step, 50) == pytest.approx(truth.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        if step < 49:
            truth.step()


def test_warmup_and_scaling():
    config = small(optimizer={"warmup_steps": 4, "schedule": "constant", "lr": 0.1, "lr_scaling": "linear"})
    assert [lr_factor(config.optimizer, s, 10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert peak_lr(config) == pytest.approx(0.1 * 32 / 256)
    root = dataclasses.replace(config.optimizer, lr_scaling="sqrt")
    assert peak_lr(dataclasses.replace(config, optimizer=root)) == pytest.approx(0.1 * (32 / 256) ** 0.5)


def test_weight_decay_spares_norms_and_biases_if_asked():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    spare = make_optimizer(small(optimizer={"weight_decay": 0.1, "decay_norm_and_bias": False}), model)
    assert [(g["weight_decay"], len(g["params"])) for g in spare.param_groups] == [(0.1, 1), (0.0, 3)]


def test_parity_comparison_sees_a_small_difference():
    a = Trained([1.0, 0.5], {"w": torch.ones(3, dtype=torch.float64), "bn.running_var": torch.ones(2)})
    moved = {"w": a.tensors["w"] + torch.tensor([0, 0, 2e-10]), "bn.running_var": torch.ones(2)}
    assert compare_runs(a, a).largest == 0
    assert compare_runs(a, Trained(a.losses, moved)).weights == pytest.approx(2e-10, rel=1e-3)
    assert compare_runs(a, Trained([1.0, 0.5 + 1e-9], a.tensors)).losses == pytest.approx(1e-9, rel=1e-3)
    assert compare_runs(a, Trained([1.0], a.tensors)).losses == math.inf
    assert compare_runs(a, Trained([1.0, math.nan], a.tensors)).losses == math.inf
    assert compare_runs(a, Trained(a.losses, {"w": a.tensors["w"]})).buffers == math.inf


def test_a_model_spoilt_by_its_last_step_has_diverged():
    optimizer = {"lr": 3e38, "schedule": "constant"}
    budget = {"epochs": None, "steps": 1}
    result = train(small(precision="fp32", norm={"name": "none"}, optimizer=optimizer, budget=budget))
    assert math.isfinite(result.losses[0])
    assert (result.status, result.test, result.evaluations) == ("diverged", None, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": None}, "optimizer: got nothing, expected a mapping"),
        ({"data": 3}, "data: got 3, expected a mapping"),
        ({"norm": [1]}, r"norm: got \[1\], expected a mapping"),
        ({"evaluation": {"population_samples": [4, 2]}}, "population_samples"),
        ({"evaluation": {"population_samples": 4}}, "population_samples"),
        ({"evaluation": {"population_samples": None}}, "population_samples"),
    ],
)
def test_sections_that_are_none(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize("module", ["config", "diagnosis", "loop", "model_diagnosis", "result", "task"])
def test_examples_of_the_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"syncbn.train.{module}"))
    assert (found.failed, found.attempted > 0) == (0, True)


def test_only_a_batch_that_is_too_small_is_called_one(monkeypatch):
    """Torch's instance normalization has no class of error for a map of one value; other errors are the model's."""
    run = {"model": {"name": "resnet18"}, "gpus": 1, "per_gpu_batch_size": 2, "budget": {"epochs": None, "steps": 1}}
    with pytest.raises(LocalError, match=r"per_gpu_batch_size: got 2, expected batches .* 1 spatial element"):
        train(small(norm={"name": "instance"}, **run))

    def wrong(self, model, inputs, targets):
        raise ValueError("Expected more than 1 channel")

    monkeypatch.setattr(Classification, "outputs", wrong)
    with pytest.raises(TaskError, match="task classification: the model raised ValueError: Expected more than 1 chan"):
        train(small(**run))


def test_public_names():
    names = ["Datasets", "Metric", "RunConfig", "RunResult", "Stopped", "Sum", "Task"]
    names += ["diagnose", "diagnose_model", "load_config", "train"]
    assert syncbn.train.__all__ == names
    assert all(callable(getattr(syncbn.train, name)) for name in syncbn.train.__all__)


def warned(config, task=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, task=task)
    return [str(warning.message) for warning in caught if issubclass(warning.category, RunWarning)]


STEPS = {"budget": {"epochs": None, "steps": 1}, "norm": {"name": "sync"}}


def test_a_batch_that_is_larger_than_the_data_is_remarked_on():
    few = {"name": "digits", "train_samples": 20}
    (words,) = warned(small(data=few, **STEPS))
    assert words.startswith("per_gpu_batch_size: an optimizer step has 32 samples, but there are only 20 training")
    assert words.endswith("and 1 of the 4 logical GPUs have none of them")
    (words,) = warned(small(data={**few, "train_samples": 40}, accumulation_steps=2, **STEPS))
    assert words.endswith("40 training samples: each epoch is one smaller step")
    assert not warned(small(data={**few, "train_samples": 32}, **STEPS))
    with pytest.raises(ConfigError, match="an optimizer step of at most the 20 training samples"):
        train(small(data={**few, "drop_last": True}))
    # More than the test set has is what an evaluation batch may be.
    assert not warned(small(budget={"epochs": None, "steps": 1, "eval_batch_size": 10_000}, norm={"name": "sync"}))


BEYOND = {
    "one step before": ("renorm", {"warmup_steps": 7, "r_ramp_end": 8, "d_ramp_end": 8}, {}),
    "a ramp": ("renorm", {"warmup_steps": 7, "r_ramp_end": 9, "d_ramp_end": 8}, {"norm.r_ramp_end": 9}),
    "the defaults": (
        *("renorm", {}, {"norm.warmup_steps": 5000, "norm.r_ramp_end": 40_000, "norm.d_ramp_end": 25_000}),
    ),
    "a norm without ramps": ("sync", {}, {}),
    "windows": ("mabn", {"window": 8, "warmup_steps": 7}, {"norm.window": 8}),
    "a warm-up of windows": ("mabn", {"window": 2, "warmup_steps": 8}, {"norm.warmup_steps": 8}),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_lies_beyond_the_end_of_a_run(name):
    norm, given, expected = BEYOND[name]
    for steps, accumulation in ((8, 1), (4, 2)):
        values = {"norm": {"name": norm, **given}, "accumulation_steps": accumulation}
        assert keys_beyond(config_from_dict(values), steps) == expected, "norms count forwards"


@pytest.mark.parametrize("name", ["batch", "renorm", "ghost"])
def test_one_update_a_step_makes_accumulation_the_same_as_more_gpus(name, tmp_path):
    """With ragged last steps, of 22 samples: two GPUs in two passes are four in one."""
    norm = {"name": name, "update_per": "step", "ghost_batch_size": 2 if name == "ghost" else None}
    norm |= {"warmup_steps": 1, "r_ramp_end": 4, "d_ramp_end": 3} if name == "renorm" else {}
    for gpus, passes in ((4, 1), (2, 2)):
        train(small(gpus=gpus, accumulation_steps=passes, norm=norm), tmp_path / str(gpus))
    one, two = (Trained.read(tmp_path / str(gpus)) for gpus in (4, 2))
    assert compare_runs(one, two).largest < 1e-12
    with pytest.raises(ConfigError, match=r"update_per: got 'step', expected forward with norm\.name group"):
        small(norm={"name": "group", "update_per": "step"})


def test_a_warm_up_beyond_the_end_is_remarked_on():
    values = {"optimizer": {"warmup_steps": 3, "schedule": "constant"}, "norm": {"name": "sync"}}
    assert keys_beyond(config_from_dict(values), 4) == {}
    (words,) = warned(small(budget={"epochs": None, "steps": 3}, **values))
    assert words == "optimizer.warmup_steps 3: beyond the end of the run at step 3"


class Labelled(Task):
    """Ten classes, and so many test samples."""

    def __init__(self, test):
        self.test = test

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 10))

    def data(self, seed):
        x, y = torch.randn(40, 4), torch.arange(40) % 10
        data = TensorDataset(x, y)
        data.targets = y
        return Datasets(train=data, test=torch.utils.data.Subset(data, range(self.test)))

    def loss(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets)


def test_fewer_test_samples_than_classes_are_remarked_on():
    config = config_from_dict({"gpus": 2, "per_gpu_batch_size": 4, "device": "cpu", "precision": "fp64", **STEPS})
    fewer = "fewer than the 10 classes of the training set"
    assert warned(config, Labelled(9)) == [f"the test set has 9 samples, {fewer}"]
    assert not warned(config, Labelled(10))
    with pytest.raises(ConfigError, match="a task whose test data are not empty"):
        train(config, task=Labelled(0))
