"""Tasks of users: what a loss is divided by, trees of tensors, the choice by validation, and mistakes in their code."""

from __future__ import annotations

import collections
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from task_cases import Drawn, Ranked, Sign, Trees, Uneven, Weighted, numbers
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from syncbn.cli import main
from syncbn.train import Datasets, Metric, RunResult, Sum, diagnose, train
from syncbn.train.batches import split
from syncbn.train.config import ConfigError, LocalError, config_from_dict, load_config
from syncbn.train.data.samples import Samples, batch_loader
from syncbn.train.parity import Trained, compare_runs

BASE = {"gpus": 4, "per_gpu_batch_size": 4, "precision": "fp64", "device": "cpu", "optimizer": {"lr": 0.05}}
BASE["budget"] = {"epochs": 2}


def config(**changes):
    return config_from_dict({**BASE, **changes})


def named(cls, **changes):
    return config(task={"name": f"task_cases:{cls.__name__}"}, **changes)


def test_sums_are_divided_at_the_end():
    assert Sum(3, 4).mean() == 0.75
    classes = Sum(torch.tensor([30.0, 0.0, 5.0]), torch.tensor([40, 0, 20]))
    assert classes.mean() == 0.5
    assert math.isnan(Sum(0, 0).mean())


def test_a_run_of_a_users_task(tmp_path):
    result = train(named(Sign), tmp_path)
    assert (result.status, result.task) == ("ok", "task_cases:Sign")
    assert result.metric == Metric("accuracy", higher_is_better=True, of_samples=True)
    assert (result.train_samples, result.validation_samples, result.test_samples) == (64, 24, 32)
    assert result.test.keys() == result.validation.keys() == {"loss", "accuracy"}
    assert result.score == result.test["accuracy"] > 0.6
    assert [entry["statistics"] for entry in result.evaluations] == ["running", "batch", "population", "population"]
    assert RunResult.from_json(tmp_path / "result.json") == result
    assert train(named(Sign), task=Sign()).losses == result.losses


def test_a_metric_of_the_whole_set():
    """An area under the curve is no mean over samples: it needs the scores of all of them, in the order of the set."""
    task = Ranked()
    result = train(config(budget={"epochs": 2, "eval_batch_size": 5}), task=task)
    assert result.metric.name == "auc"
    assert result.score == result.test["auc"] == result.history[-1]["test"]["auc"] > 0.6
    # Validation and test data in each of two epochs, then the test data with the statistics of batches, whose order is
    # that of a training, and with population statistics: always in the order of the set.
    (_, test), (_, validation) = task.data(0).test.tensors, task.data(0).validation.tensors
    assert [len(targets) for targets in task.seen].count(len(validation)) == 2
    assert len(task.seen) == 2 * 2 + 3
    assert all(torch.equal(targets, test if len(targets) == len(test) else validation) for targets in task.seen)
    kinds = [entry["statistics"] for entry in result.evaluations]
    assert kinds == ["running", "batch", "population", "population"]
    assert all(0 <= entry["test"]["auc"] <= 1 for entry in result.evaluations)


def test_a_run_that_diverges_has_no_metric_of_the_whole_set():
    """It is a result, by which tuning knows that this learning rate is no good, and not a mistake of the task."""
    result = train(config(optimizer={"lr": 1e38}, budget={"epochs": 2, "select": "best"}), task=Ranked())
    assert (result.status, result.test) == ("diverged", None)


def test_predictions_hold_nothing_but_themselves():
    """A view of the batch would carry the whole batch to every process."""
    task, found = Ranked(), []
    task.metrics_of_set = lambda predictions: found.extend(predictions) or {"auc": 0.5}
    train(config(budget={"epochs": None, "steps": 1}, evaluation={"batch": False}), task=task)
    assert found
    assert all(x.untyped_storage().nbytes() == x.element_size() for pair in found for x in pair)


def test_options_are_arguments_and_the_model_keeps_its_initial_weights():
    wide = train(config(task={"name": "task_cases:Sign", "options": {"width": 16}}))
    assert wide.parameters == 4 * 16 + 16 + 2 * 16 + 16 * 2 + 2
    # The normalization does not enter the initial weights: nothing is normalized in evaluation before the first step.
    torch.manual_seed(0)
    expected = Sign().model()[0].weight
    budget = {"epochs": None, "steps": 1}
    runs = [train(named(Sign, norm={"name": name, "groups": 2}, budget=budget)) for name in ("sync", "group")]
    assert runs[0].losses != runs[1].losses
    torch.manual_seed(0)
    assert torch.equal(Sign().model()[0].weight, expected)


def trained_by_hand(task, config, steps):
    """The weights after plain SGD on the global batches, each logical GPU normalized by itself."""
    from syncbn.train.data.order import epoch_order

    torch.manual_seed(config.seed)
    model = task.model().double()
    x, y = task.data(0).train.tensors
    order = epoch_order(y, 1, config.seed, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optimizer.lr, momentum=0.9)
    whole, size = config.global_batch_size, config.per_gpu_batch_size
    for step in range(steps):
        batch = order[step * whole : (step + 1) * whole]
        outputs = [model(x[gpu].double()) for gpu in batch.split(size)]
        loss = task.loss_by_hand(outputs, y[batch].split(size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class WeightedByHand(Weighted):
    def loss_by_hand(self, outputs, targets):
        found = super().loss(torch.cat(outputs), torch.cat(targets))
        return found.total / found.count


class UnevenByHand(Uneven):
    def loss_by_hand(self, outputs, targets):
        largest = [
            functional.cross_entropy(out, y, reduction="none").max() for out, y in zip(outputs, targets, strict=True)
        ]
        return torch.stack(largest).mean()


@pytest.mark.parametrize("task", [WeightedByHand(), UnevenByHand()], ids=lambda task: type(task).__name__)
def test_what_a_loss_is_divided_by(task, tmp_path):
    """Against a loop in float64: rounding differs, as sums are taken in another order."""
    run = config(
        budget={"epochs": None, "steps": 4}, optimizer={"lr": 0.05, "schedule": "constant"}, norm={"name": "batch"}
    )
    train(run, tmp_path, task=task)
    expected = trained_by_hand(task, run, 4)
    found = Trained.read(tmp_path).tensors
    for name, parameter in expected.named_parameters():
        assert (found[name] - parameter).abs().max() < 1e-12, name


def test_accumulated_batches_are_divided_as_one(tmp_path):
    """Two batches of 4 GPUs are one of 8, to rounding, where the normalization does not depend on the batch."""
    norm = {"name": "group", "groups": 2}
    for gpus, number in ((4, 2), (8, 1)):
        train(named(Weighted, gpus=gpus, accumulation_steps=number, norm=norm), tmp_path / str(number))
    assert compare_runs(Trained.read(tmp_path / "1"), Trained.read(tmp_path / "2")).largest < 1e-12


def test_a_step_in_which_nothing_is_counted():
    class Ignored(Sign):
        def loss(self, outputs, targets):
            return Sum(0 * outputs.sum(), torch.zeros(()))

    result = train(config(budget={"epochs": 1}), task=Ignored(validation=0))
    assert result.losses == [0.0] * 4
    assert result.status == "diverged", "the loss of the test set is 0 / 0"


def test_trees_and_a_last_batch_that_leaves_gpus_empty(tmp_path):
    result = train(named(Trees, per_gpu_batch_size=2), tmp_path)
    assert result.status == "ok"
    assert (result.samples, result.test_samples) == (44, 10)
    assert result.score == result.test["loss"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_an_item_draws_depends_on_its_key_alone(workers):
    state = torch.get_rng_state()
    samples = Samples(Drawn(8), None, 3, "train")
    batches = [[(0, 1), (0, 2)], [(1, 1)], [(0, 2), (0, 5), (0, 1)], []]
    (first, _), (other, _), (again, targets), (none, nothing) = batch_loader(samples, batches, workers)
    assert torch.equal(first["x"][[1, 0]], again["x"][[0, 2]])
    assert not torch.equal(first["x"][0], other["x"][0])
    assert again["index"].tolist() == [2, 5, 1]
    assert (none["x"].shape, nothing[0]["y"].shape) == ((0, 5), (0,))
    assert (none["x"].dtype, nothing[0]["y"].dtype) == (again["x"].dtype, targets[0]["y"].dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(Samples(Drawn(8), None, 4, "train").__getitems__([(0, 1)])[0]["x"], first["x"][:1])


def test_parts_of_a_tree():
    tree = {"a": torch.arange(5), "b": [torch.ones(5, 2), "name"]}
    parts = split(tree, [2, 2, 1])
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[2]["b"][0].shape == (1, 2)
    with pytest.raises(TypeError, match="one process for each logical GPU"):
        split([torch.ones(5), torch.ones(3)], [2, 3])


def test_classes_of_the_users_data_can_arrive_in_runs():
    class Labelled(Sign):
        def data(self, seed):
            found = super().data(seed)
            for part in (found.train, found.test):
                part.targets = part.tensors[1].tolist()
            return found

    skewed = config(data={"class_skew": 4})
    assert train(skewed, task=Labelled()).losses != train(config(), task=Labelled()).losses
    with pytest.raises(ConfigError, match=r"data\.class_skew: got 4, expected 1, as the training data have no classes"):
        train(skewed, task=Sign())


def test_labels_that_are_no_classes():
    data = Drawn(2)
    for targets in (["a.png", "b.png"], [{"boxes": 1}, {"boxes": 2}], [[1], [2]]):
        data.targets = targets
        assert Samples(data, None, 0, "train").labels is None


def test_parts_of_the_data_draw_other_numbers():
    train, test = (Samples(Drawn(8), None, 0, part).__getitems__([(0, 3)])[0]["x"] for part in ("train", "test"))
    assert not torch.equal(train, test)


Point = collections.namedtuple("Point", "x y")


def test_an_empty_batch_has_the_types_of_others():
    pairs = [({"a": torch.ones(3), "b": Point(torch.ones(2), 1.0)}, torch.tensor(1))] * 4
    full, empty = (Samples(pairs, None, 0, "train").__getitems__(keys) for keys in ([(0, 1)] * 2, []))
    assert (empty[0]["a"].shape, empty[1].shape) == ((0, 3), (0,))
    assert type(empty[0]["b"]) is type(full[0]["b"]) is Point
    assert empty[0]["b"].x.shape == (0, 2)


class Split(Sign):
    """Draws its own split, with generators that it does not seed."""

    def data(self, seed):
        order = np.random.permutation(96)  # noqa: NPY002
        random.shuffle(rest := list(range(96)))
        x, y = numbers(96, 0).tensors
        parts = (TensorDataset(x[part], y[part]) for part in (order[:64], rest[:32]))
        return Datasets(*parts)


def test_what_a_task_draws_for_its_data_and_model_is_the_runs_own():
    states = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = train(config(), task=Split())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    assert train(config(), task=Split()).losses == first.losses
    assert train(config(seed=1), task=Split()).losses != first.losses


def test_tensors_of_the_tasks_own_keep_their_type_in_evaluation():
    class Balanced(Sign):
        def loss(self, outputs, targets):
            return functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0]))

    assert train(config(precision="fp32"), task=Balanced()).status == "ok"


def test_a_mean_over_nothing_in_evaluation_asks_for_a_sum():
    class Masked(Sign):
        def loss(self, outputs, targets):
            return functional.cross_entropy(outputs, targets, ignore_index=1)

    with pytest.raises(LocalError, match=r"loss\(\) gave NaN for finite outputs.* return a Sum of totals and counts"):
        train(config(gpus=1, per_gpu_batch_size=16), task=Masked())


@pytest.mark.fault(
    "mistake",
    "another task at `--resume`",
    moment="before the first step",
    outcome="one line",
    lost="nothing",
)
def test_another_task_is_another_run(tmp_path):
    train(config(), tmp_path, task=Sign())
    with pytest.raises(ConfigError, match=r"task: got 'Weighted', expected Sign, the task of the run in"):
        train(config(), tmp_path, task=Weighted(), resume=True)
    with pytest.raises(ConfigError, match=r"a run of the task Trees, whose model has other weights; give `task`"):
        diagnose(tmp_path, task=Trees())


class Volumes(Sign):
    """A network of three-dimensional convolutions."""

    def model(self):
        convolution = nn.Conv3d(1, 4, 3, padding=1, bias=False)
        return nn.Sequential(
            nn.Unflatten(1, (1, 1, 2, 2)), convolution, nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(16, 2)
        )


@pytest.mark.parametrize("norm", ["batch", "sync", "renorm", "group", "layer", "instance", "weight", "mabn", "none"])
def test_norms_of_volumes(norm):
    run = config(norm={"name": norm, "groups": 2, "warmup_steps": 16}, budget={"epochs": 1})
    assert train(run, task=Volumes()).status == "ok"


@pytest.mark.parametrize("norm", ["rms", "ws_group", "nf"])
def test_norms_that_are_for_images_alone(norm):
    with pytest.raises(ConfigError, match=rf"norm\.name: got '{norm}', expected (a norm for|a ResNet)"):
        train(config(norm={"name": norm, "groups": 2}), task=Volumes())


def test_one_option_on_the_command_line_leaves_the_others(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: {name: a:b, options: {width: 4, depth: 2}}")
    assert load_config(file, {"task.options": {"width": 8}}).task.options == {"width": 8, "depth": 2}


# ---- the choice of an epoch


class Rising(Sign):
    """Validation prefers the second epoch: its metric is high only while the weights of the last layer are as then."""

    metric = Metric("preferred", higher_is_better=True)
    prefers = 2

    def __init__(self):
        super().__init__()
        self.calls = 0

    def metrics(self, outputs, targets):
        if len(targets) != 24:  # the test set
            return {"preferred": Sum(1.0, 1.0)}
        self.calls += 1
        return {"preferred": Sum(1.0 if self.calls == self.prefers else 0.0, 1.0)}


def test_the_best_epoch_by_validation(tmp_path):
    task = Rising()
    result = train(config(budget={"epochs": 5, "select": "best"}), tmp_path / "best", task=task)
    assert [entry["validation"]["preferred"] for entry in result.history] == [0, 1, 0, 0, 0]
    assert (result.test, result.validation) == (result.history[1]["test"], result.history[1]["validation"])
    assert result.evaluations[0]["test"] == result.test
    assert (result.steps, len(result.losses)) == (20, 20)
    # The weights are those of a run that ends there, at a constant learning rate.
    constant = {"optimizer": {"lr": 0.05, "schedule": "constant"}}
    train(config(budget={"epochs": 5, "select": "best"}, **constant), tmp_path / "a", task=Rising())
    train(config(budget={"epochs": 2}, **constant), tmp_path / "b", task=Rising())
    a, b = Trained.read(tmp_path / "a"), Trained.read(tmp_path / "b")
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)


def test_patience_ends_a_run():
    result = train(config(budget={"epochs": 9, "select": "best", "patience": 2}), task=Rising())
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"budget\.patience: got 2, expected null, unless budget\.select is best"):
        config(budget={"patience": 2})


def test_an_interrupted_choice_goes_on(tmp_path, monkeypatch):
    from syncbn.train import loop

    run = named(Sign, budget={"epochs": 4, "select": "best"}, optimizer={"lr": 0.5})
    whole = train(run, tmp_path / "whole")
    checkpoint, calls = loop._checkpoint, []

    def interrupt(*args):
        checkpoint(*args)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "broken")
    monkeypatch.setattr(loop, "_checkpoint", checkpoint)
    broken = train(run, tmp_path / "broken", resume=True)
    assert (broken.test, broken.validation, broken.history) == (whole.test, whole.validation, whole.history)
    assert compare_runs(Trained.read(tmp_path / "whole"), Trained.read(tmp_path / "broken")).largest == 0


def test_test_data_choose_nothing():
    """With the test labels turned round, every choice and all weights stay the same."""

    class Poisoned(Sign):
        def data(self, seed):
            found = super().data(seed)
            x, y = found.test.tensors
            return Datasets(train=found.train, validation=found.validation, test=TensorDataset(x, 1 - y))

    run = config(budget={"epochs": 6, "select": "best", "patience": 2}, optimizer={"lr": 0.5})
    honest, poisoned = train(run, task=Sign()), train(run, task=Poisoned())
    assert honest.validation == poisoned.validation
    assert honest.losses == poisoned.losses
    assert honest.score == pytest.approx(1 - poisoned.score)


def test_a_choice_needs_validation_data():
    with pytest.raises(ConfigError, match=r"budget\.select: got 'best', expected last, as the task has no validation"):
        train(config(budget={"select": "best"}), task=Sign(validation=0))


def test_classification_holds_out_a_fraction_of_each_class():
    data = {"name": "digits", "train_samples": 200, "validation_fraction": 0.25}
    result = train(config_from_dict({"data": data, "model": {"width": 4}, "budget": {"epochs": 1}, "device": "cpu"}))
    assert result.train_samples + result.validation_samples == 200
    assert abs(result.validation_samples - 50) <= 10, "each of the ten classes to within one"
    assert 0 <= result.validation["error"] <= 1


# ---- diagnosis


def test_diagnosis_of_a_users_task(tmp_path, capsys):
    train(named(Sign), tmp_path)
    found = diagnose(tmp_path, samples=32)
    assert found.scores["running"] > 0.6
    assert list(found.layers) == [2, 4, 8, 16]
    found.print()
    assert "test accuracy with running statistics" in capsys.readouterr().out
    assert found.advice
    assert found.per_sample["running"].shape == (32, 2, 1)


def test_advice_honours_the_direction_of_the_metric(tmp_path):
    from dataclasses import replace

    train(named(Sign), tmp_path)
    found = diagnose(tmp_path, samples=32)
    kinds = [("running", None, 0.6), ("batch", None, 0.9), ("population", "mean", 0.7), ("population", "total", 0.8)]
    entries = [{"statistics": s, "estimator": e, "samples": 9, "test": {"accuracy": x}} for s, e, x in kinds]
    found = replace(found, evaluations=entries, per_sample={}, test_samples=1000)
    words = found.advice
    assert words[0].startswith("Estimation: with population statistics the accuracy is 80.0 % and not 60.0 %")
    assert "the accuracy is 90.0 %, with fixed ones at most 80.0 %" in words[1]
    entries[1]["test"] = {"accuracy": 0.5}
    assert not any(line.startswith("Mismatch") for line in found.advice)


# ---- mistakes


def bad(**methods):
    return type("Bad", (Sign,), methods)()


def raises(error):
    def method(self, *args):
        raise error

    return method


class Broken(Drawn):
    def __init__(self):
        super().__init__(4)

    def __getitem__(self, index):
        raise KeyError("no such image")


BAD = {
    "no metric of this name": (bad(metric=Metric("dice")), "its metric is 'dice', but its metrics are"),
    "metric is a text": (bad(metric="accuracy"), "whose `metric` is a syncbn.train.Metric, not 'accuracy'"),
    "NaN metric": (bad(metrics=lambda s, o, t: {"accuracy": Sum(math.nan, 1)}), "metric 'accuracy' is NaN"),
    "percent, not a fraction": (
        bad(metrics=lambda s, o, t: {"accuracy": Sum(torch.tensor(3720.0), 100)}),
        "got 37.2 for 'accuracy', which is in percent: expected a fraction from 0 to 1; for any other metric, "
        "the task's Metric has percent=False",
    ),
    "a negative fraction": (bad(metrics=lambda s, o, t: {"accuracy": Sum(-1, 2)}), "got -0.5 for 'accuracy', which is"),
    "nothing counted": (bad(metrics=lambda s, o, t: {"accuracy": Sum(0, 0)}), "metric 'accuracy' is NaN"),
    "metric is no Sum": (bad(metrics=lambda s, o, t: {"accuracy": 0.5}), "'accuracy' is 0.5, expected a Sum"),
    "metrics is no dict": (bad(metrics=lambda s, o, t: 0.5), "metrics() raised TypeError: it returned 0.5"),
    "shapes of a Sum": (bad(metrics=lambda s, o, t: {"accuracy": Sum(torch.ones(3), 1)}), "have shapes (3,) and ()"),
    "too few predictions": (
        bad(predictions=lambda s, o, t: [1.0]),
        "predictions() raised TypeError: it returned a list",
    ),
    "predictions is a dict": (bad(predictions=lambda s, o, t: {}), "expected a list of 24, one entry for each sample"),
    "no metrics of the set": (
        bad(predictions=lambda s, o, t: o, metrics_of_set=lambda s, p: 0.5),
        "it returned 0.5, expected a dict",
    ),
    "a metric of both": (
        bad(predictions=lambda s, o, t: o, metrics_of_set=lambda s, p: {"accuracy": 1.0}),
        "with other names than ['accuracy', 'loss']",
    ),
    "metrics of the set raise": (
        bad(predictions=lambda s, o, t: o, metrics_of_set=raises(ZeroDivisionError("no class"))),
        "metrics_of_set() raised ZeroDivisionError: no class",
    ),
    "loss is a vector": (
        bad(loss=lambda s, o, t: o.sum(1)),
        "float64 tensor of shape (16,), expected a Sum or a scalar",
    ),
    "loss is a number": (bad(loss=lambda s, o, t: 1.5), "it returned 1.5, expected a Sum or a scalar tensor"),
    "loss is detached": (bad(loss=lambda s, o, t: o.sum().detach()), "a tensor without gradient"),
    "loss raises": (bad(loss=raises(KeyError("depth"))), "loss() raised KeyError: 'depth'"),
    "wrong shapes": (
        bad(model=lambda s: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 2))),
        "the model raised RuntimeError",
    ),
    "wrong channels": (
        bad(model=lambda s: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))),
        "the model raised ValueError: GhostBatchNorm '0' (num_features=3), input of shape (16, 4): expected 3 channels",
    ),
    "an error that only looks like a layer's": (
        bad(outputs=raises(ValueError("num_features=8 are not samples"))),
        "the model raised ValueError: num_features=8 are not samples",
    ),
    "model is no module": (bad(model=lambda s: "unet"), "a task whose model() is a Module, not 'unet'"),
    "model raises": (
        bad(model=raises(FileNotFoundError("weights.pt"))),
        "model() raised FileNotFoundError: weights.pt",
    ),
    "nothing to normalize": (bad(model=lambda s: nn.Linear(4, 2)), "a task whose model has BatchNorm layers"),
    "data raise": (bad(data=raises(OSError("no such disk"))), "data() raised OSError: no such disk"),
    "data is a list": (bad(data=lambda s, seed: [1, 2]), "a task whose data() returns Datasets, not"),
    "empty training": (bad(data=lambda s, seed: Datasets(numbers(0, 0), numbers(8, 0))), "train data are not empty"),
    "empty validation": (
        bad(data=lambda s, seed: Datasets(numbers(8, 0), numbers(8, 0), numbers(0, 0))),
        "validation data are not empty",
    ),
    "an iterator": (bad(data=lambda s, seed: Datasets(iter(()), numbers(8, 0))), "have a length and are indexed"),
    "items are no pairs": (
        bad(data=lambda s, seed: Datasets(TensorDataset(torch.ones(64, 4)), numbers(8, 0))),
        "a batch is a list, expected a pair (inputs, targets)",
    ),
    "an item raises": (
        bad(data=lambda s, seed: Datasets(numbers(64, 0), Broken())),
        "its data raised KeyError: 'no such image'",
    ),
    "too few samples": (bad(data=lambda s, seed: Datasets(numbers(3, 0), numbers(8, 0))), None),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.fault(
    "mistake",
    "a user's error in a model, data, an item, a loss or metrics",
    moment="in training or before",
    outcome="one line that names the method",
    lost="the steps since the last checkpoint",
)
def test_a_mistake_in_a_task_is_one_line(name, tmp_path):
    task, words = BAD[name]
    if words is None:
        assert train(config(), task=task).status == "ok", "a last, smaller step is a step"
        return
    with pytest.raises(ValueError, match=r"task|norm|got") as raised:
        train(config(), tmp_path, task=task)
    message = str(raised.value)
    assert words in message, message
    assert "\n" not in message
    assert "Bad" in message or "task.name" in message
    if raised.type.__name__ == "TaskError" and "raised" in message:
        (log,) = tmp_path.glob("error-0.log")
        assert "Traceback" in log.read_text()


def test_a_loss_that_counts_otherwise_on_a_later_batch():
    class Changing(Sign):
        calls = 0

        def loss(self, outputs, targets):
            self.calls += 1
            total = functional.cross_entropy(outputs, targets, reduction="sum")
            return Sum(total, len(targets) if self.calls == 1 else torch.tensor(3.0))

    with pytest.raises(LocalError, match="whose loss counts samples in every batch"):
        train(config(), task=Changing())


NAMES = {
    "nowhere:Liver": "task.name: got 'nowhere:Liver', expected a module that Python finds",
    "task_cases:Liver": "an attribute of task_cases, which has none called Liver",
    "liver": "expected classification",
    "task_cases:numbers": "keyword arguments of task_cases:numbers (missing a required argument: 'samples')",
    "task_cases:np": "expected a class or a function",
    "task_cases:Drawn": "keyword arguments of task_cases:Drawn",
    "syncbn.train:Task": "it has no model",
    "broken_task:Liver": "task broken_task:Liver: its module raised ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_task_that_cannot_be_found(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_task.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--task.name", name, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("syncbn: error: ")
    assert NAMES[name] in printed
    assert printed.count("\n") == 1


def test_the_command_line_trains_a_task_of_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_task.py").write_text("from task_cases import Sign\n\n\ndef make(width):\n    return Sign(width)\n")
    (tmp_path / "run.yaml").write_text(json.dumps({**BASE, "task": {"name": "my_task:make", "options": {"width": 4}}}))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "run.yaml", "--out", "run", "--progress", "false"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert RunResult.from_json(tmp_path / "run" / "result.json").parameters == 4 * 4 + 4 + 2 * 4 + 4 * 2 + 2


def test_sections_of_classification_are_refused_for_other_tasks():
    with pytest.raises(ConfigError, match=r"model\.width: got 4, expected nothing, as it is for classification"):
        named(Sign, model={"width": 4})
    with pytest.raises(ConfigError, match=r"data\.name: got 'digits', expected nothing"):
        named(Sign, data={"name": "digits"})
    assert named(Sign, data={"class_skew": 2, "workers": 1}).data.workers == 1
    with pytest.raises(ConfigError, match=r"task\.options: got .*Path.*, expected names, and values as YAML has them"):
        config(task={"name": "a:b", "options": {"root": Path("data")}})
    with pytest.raises(ConfigError, match=r"task\.options: got .*, expected none for classification"):
        train(config(task={"options": {"width": 3}}))


def test_a_batch_that_a_layer_of_a_users_model_cannot_normalize():
    """One sample of single values on each GPU: the remedy is the batch's size, not the task's code."""
    with pytest.raises(LocalError, match=r"per_gpu_batch_size: got 1, expected batches that every layer can normalize"):
        train(config(per_gpu_batch_size=1), task=Sign())
