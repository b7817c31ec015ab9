"""A run gives the same answer on any number of processes: losses, weights, buffers, evaluation."""

from __future__ import annotations

import dataclasses

import pytest

from syncbn.train import loop
from syncbn.train.config import config_from_dict
from syncbn.train.loop import train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs, parity_config
from syncbn.train.result import RunResult

# Class skew, augmentation, accumulation; 150 images in steps of 64: the last has 22, so a forward pass of 22, in which
# the third process of four is given 6 images and the fourth none. One epoch of 3 steps, then a second with other draws.
BASE = {
    "gpus": 8,
    "per_gpu_batch_size": 4,
    "accumulation_steps": 2,
    "data": {"name": "digits", "class_skew": 4, "augment": "crop", "train_samples": 150},
    "model": {"width": 4},
    "optimizer": {"lr": 0.05, "weight_decay": 1e-3, "label_smoothing": 0.1},
}

NORMS = {
    "none": {"name": "none"},
    "batch": {"name": "batch"},
    "batch-cumulative": {"name": "batch", "momentum": None},
    "sync": {"name": "sync"},
    "sync-2": {"name": "sync", "sync_group_size": 2},
    "sync-4": {"name": "sync", "sync_group_size": 4},
    "ghost": {"name": "ghost", "ghost_batch_size": 2},
    "ghost-sync": {"name": "ghost", "ghost_batch_size": 2, "sync": True},
    "ghost-sync-4": {"name": "ghost", "ghost_batch_size": 2, "sync": True, "sync_group_size": 4},
    "renorm": {"name": "renorm", "warmup_steps": 3, "r_ramp_end": 8, "d_ramp_end": 6},
    "renorm-sync": {"name": "renorm", "sync": True, "warmup_steps": 3, "r_ramp_end": 8, "d_ramp_end": 6},
    "batch-once": {"name": "batch", "update_per": "step"},
    "sync-2-once": {"name": "sync", "sync_group_size": 2, "update_per": "step"},
    "renorm-once": {"name": "renorm", "update_per": "step", "warmup_steps": 1, "r_ramp_end": 4, "d_ramp_end": 3},
    "group": {"name": "group", "groups": 2},
    "frozen": {"name": "frozen", "freeze_at": 0.5},
    "mabn": {"name": "mabn", "warmup_steps": 2, "window": 2},
    "instance": {"name": "instance"},
    "rms": {"name": "rms"},
    "weight": {"name": "weight"},
    "ws_group": {"name": "ws_group", "groups": 2},
    "nf": {"name": "nf"},
    "evonorm": {"name": "evonorm", "groups": 2},
    "frn": {"name": "frn"},
}
PLAIN = ("none", "group", "instance", "rms", "weight", "ws_group", "nf", "evonorm", "frn")
"""Norms without batch statistics: nothing of theirs depends on the processes, so two numbers of them are enough."""

RUNNING_ONLY = (*PLAIN, "mabn")
"""Norms that are evaluated in one way: those, and one that has no mean and variance to put in place of others."""


def configured(norm, **changes):
    norm = dict(norm)
    changes = {"sync_group_size": norm.pop("sync_group_size", None), **changes}
    return parity_config(config_from_dict({**BASE, "norm": norm, **changes}), steps=6)


def train_into(config, out):
    """Errors under every kind of statistics, and the layers' divergences."""
    result = train(config, out)
    assert result.evaluations[0]["test"] == result.test
    errors = [
        (e["statistics"], e["estimator"], e["samples"], e["test"] and e["test"]["error"]) for e in result.evaluations
    ]
    return errors, [(layer["count"], layer["kl"], layer["running_kl"]) for layer in result.layers]


def train_until_interrupted(config, out):
    """Train to the second epoch's evaluation, in whose place an error comes; returns the steps of the checkpoint."""
    evaluate = loop.evaluate

    def interrupt(*args):
        if (out / "checkpoint" / "latest").exists():
            raise KeyboardInterrupt
        return evaluate(*args)

    loop.evaluate = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
    finally:
        loop.evaluate = evaluate
    return int((out / "checkpoint" / "latest").read_text().removeprefix("step-"))


def resume(config, out):
    train(config, out, resume=True)


def flat(layers):
    return [value for layer in layers for value in layer]


def check_same(pools, config, worlds, tmp_path):
    errors, layers = train_into(config, tmp_path / "1")
    kinds = 3 if config.norm.name == "renorm" else 4  # it has no evaluation by the batch's own statistics
    assert len(errors) == (1 if config.norm.name in RUNNING_ONLY else kinds)
    assert bool(layers) == (config.norm.name not in RUNNING_ONLY)
    for world in worlds:
        for other_errors, other_layers in pools(world).run(train_into, config, tmp_path / str(world)):
            assert other_errors == errors
            # Differences of logarithms and squares of float64 statistics of order 1.
            assert flat(other_layers) == pytest.approx(flat(layers), rel=1e-8, abs=1e-10)
        difference = compare_runs(Trained.read(tmp_path / "1"), Trained.read(tmp_path / str(world)))
        assert difference.largest <= TOLERANCE, f"{world} processes: {difference}"
    return Trained.read(tmp_path / "1")


@pytest.mark.parametrize("name", NORMS)
def test_same_answer_on_1_2_4_processes(pools, name, tmp_path):
    trained = check_same(pools, configured(NORMS[name]), (2,) if name in PLAIN else (2, 4), tmp_path)
    assert len(trained.losses) == 6
    assert (name in RUNNING_ONLY) == (not any("running_var" in key for key in trained.tensors))


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 2)])
def test_a_run_goes_on_with_another_number_of_processes(pools, first, then, tmp_path):
    """What each logical GPU remembers is in the checkpoint, whoever wrote it and whoever hosts it next."""
    config = configured(NORMS["mabn"])
    config = dataclasses.replace(config, budget=dataclasses.replace(config.budget, checkpoint_every=1))
    train(config, tmp_path / "whole")
    assert pools(first).run(train_until_interrupted, config, tmp_path / "broken") == [3] * first
    pools(then).run(resume, config, tmp_path / "broken")
    difference = compare_runs(Trained.read(tmp_path / "whole"), Trained.read(tmp_path / "broken"))
    assert difference.largest <= TOLERANCE, difference
    tracked = Trained.read(tmp_path / "whole").tensors["layer6.norm.num_batches_tracked"]
    assert tracked.tolist() == [10] * 6 + [8] * 2


@pytest.mark.parametrize(("gpus", "sync_group_size", "world"), [(6, 2, 2), (6, 3, 3), (12, 4, 3)])
def test_sync_groups_that_span_processes_unevenly(pools, gpus, sync_group_size, world, tmp_path):
    config = configured({"name": "sync"}, gpus=gpus, sync_group_size=sync_group_size, per_gpu_batch_size=3)
    check_same(pools, config, (world,), tmp_path)


@pytest.mark.parametrize("model", ["resnet20", "resnet18", "timm:test_efficientnet"])
def test_same_answer_of_larger_models(pools, model, tmp_path):
    config = configured({"name": "sync"}, model={"name": model}, data={"name": "synthetic", "synthetic_samples": 40})
    check_same(pools, dataclasses.replace(config, per_gpu_batch_size=2), (2,), tmp_path)


def test_evaluation_counts_every_image_once(pools, tmp_path):
    """396 training images leave 99 test images, which four processes cannot share equally."""
    config = config_from_dict(
        {
            "gpus": 4,
            "per_gpu_batch_size": 16,
            "data": {"name": "synthetic", "synthetic_samples": 396, "image_size": 8},
            "model": {"width": 4},
            "budget": {"epochs": None, "steps": 1, "eval_batch_size": 10},
        }
    )
    pools(4).run(train_into, config, tmp_path / "out")
    result = RunResult.from_json(tmp_path / "out" / "result.json")
    wrong = 99 * result.score
    assert result.test_samples == 99
    assert wrong == pytest.approx(round(wrong), abs=1e-9)
    assert wrong > 0


def test_a_test_batch_that_some_processes_cannot_normalize(pools, tmp_path):
    """355 test images in batches of 4: the last leaves one image, of 1x1 maps, to the second GPU alone."""
    config = configured(
        {"name": "batch"}, model={"name": "resnet18"}, gpus=2, per_gpu_batch_size=2, accumulation_steps=1
    )
    results = [train_into(config, tmp_path / "1"), *pools(2).run(train_into, config, tmp_path / "2")]
    for errors, layers in results:
        by_kind = {kind: error for kind, _, _, error in errors}
        assert by_kind["batch"] is None
        assert by_kind["running"] is not None
        assert by_kind["population"] is not None
        assert layers
