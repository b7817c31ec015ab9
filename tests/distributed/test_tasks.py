"""A user's task gives the same answer on any number of processes: losses, weights, buffers, metrics."""

from __future__ import annotations

import pytest
import torch
from task_cases import Ranked, Sign, Trees, Uneven, Weighted

from syncbn.train import Datasets, Sum
from syncbn.train.config import LocalError, config_from_dict
from syncbn.train.loop import train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs, parity_config

# 64 samples in steps of 40: the last has 24, in batches of 20 and 4, so that the last GPUs get none.
BASE = {"gpus": 4, "per_gpu_batch_size": 5, "accumulation_steps": 2, "device": "cpu", "optimizer": {"lr": 0.05}}
TASKS = {"scalar": Sign, "counts": Weighted, "no mean": Uneven, "trees": Trees, "whole set": Ranked}


def configured(norm, **changes):
    norm = {"name": norm, "groups": 2} | (
        {"warmup_steps": 1, "r_ramp_end": 4, "d_ramp_end": 3} if norm == "renorm" else {}
    )
    return parity_config(config_from_dict({**BASE, "norm": norm, **changes}), steps=5)


def train_into(config, out, task):
    result = train(config, out, task=task)
    values = [entry["test"] for entry in result.evaluations]
    return values, result.validation, result.history


@pytest.mark.parametrize("norm", ["sync", "batch", "renorm", "group"])
@pytest.mark.parametrize("name", TASKS)
def test_same_answer(pools, name, norm, tmp_path):
    config, task = configured(norm), TASKS[name]()
    values, validation, history = train_into(config, tmp_path / "1", task)
    assert len(values) == (1 if norm == "group" else 3 if norm == "renorm" else 4)
    for world in (2, 4):
        for other in pools(world).run(train_into, config, tmp_path / str(world), task):
            for mine, theirs in zip([*values, validation], [*other[0], other[1]], strict=True):
                if mine is None:
                    assert theirs is None
                else:
                    assert theirs == pytest.approx(mine, abs=1e-10)  # sums of the last bits' order
            assert [entry["step"] for entry in other[2]] == [entry["step"] for entry in history]
        difference = compare_runs(Trained.read(tmp_path / "1"), Trained.read(tmp_path / str(world)))
        assert difference.largest <= TOLERANCE, difference


class Detector(Sign):
    """Outputs of no sample in particular, as the losses that torchvision's detectors return."""

    def outputs(self, model, inputs, targets):
        outputs = model(inputs)
        return {"loss": torch.nn.functional.cross_entropy(outputs, targets)} if model.training else {"all": outputs}

    def loss(self, outputs, targets):
        return outputs["loss"] if "loss" in outputs else Sum(outputs["all"].sum(), len(targets))

    def metrics(self, outputs, targets):
        return {"accuracy": Sum((outputs["all"].argmax(1) == targets).sum(), len(targets))}


def test_losses_that_are_not_of_samples_need_a_process_for_each_gpu(pools, tmp_path):
    config = configured("sync", per_gpu_batch_size=4, evaluation={"batch": False, "population_samples": []})
    with pytest.raises(LocalError, match="one process for each logical GPU"):
        train(config, task=Detector())
    found = pools(4).run(train_into, config, tmp_path, Detector())
    assert all(other == found[0] for other in found)


class Rows(torch.nn.Module):
    """As the heads of a detector, whose layers see several regions of each image."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)

    def forward(self, x):
        regions = self.norm(self.first(x).repeat_interleave(3, 0))
        return self.last(regions).view(len(x), 3, 2).mean(1)


class Regions(Sign):
    def model(self):
        return Rows()


def test_layers_whose_rows_are_not_samples_need_a_process_for_each_gpu(pools, tmp_path):
    config = configured("batch", per_gpu_batch_size=4, evaluation={"batch": False, "population_samples": []})
    with pytest.raises(LocalError, match=r"'norm'.* the rows of this layer are not samples; run one process for each"):
        train(config, task=Regions())
    assert all(found[0][0]["loss"] > 0 for found in pools(4).run(train_into, config, tmp_path, Regions()))
    # Statistics over all samples do not ask which sample a row is of.
    assert train(configured("sync", per_gpu_batch_size=4), task=Regions()).status == "ok"


class Longer(Sign):
    """The number of samples depends on the process."""

    def data(self, seed):
        found = super().data(seed)
        return Datasets(
            train=found.train, test=torch.utils.data.Subset(found.test, range(8 + torch.distributed.get_rank()))
        )


def message_of(config, task):
    with pytest.raises(ValueError, match="expected a task whose data") as raised:
        train(config, task=task)
    return str(raised.value)


def test_data_of_different_lengths(pools):
    for message in pools(2).run(message_of, configured("sync"), Longer()):
        assert "expected a task whose data are as many on every process, not [[64, None, 8], [64, None, 9]]" in message
