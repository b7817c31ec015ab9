"""A small study and a stand-in for training, for the study's tests."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime

from syncbn.study.plan.study_file import study_from_dict
from syncbn.train.config import config_to_dict
from syncbn.train.result import Metric, RunResult

ERROR = Metric("error", of_samples=True)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def small_study(**changes):
    content = {
        "name": "small",
        "title": "Small <study> & more",
        "question": "What?",
        "base": {"gpus": 4, "per_gpu_batch_size": 4, "data": {"name": "digits"}},
        "arms": {
            "batch": {"label": "Local BatchNorm", "overrides": {"norm": {"name": "batch"}}},
            "sync": {"label": "SyncBatchNorm", "overrides": {"norm": {"name": "sync"}}},
            "iid": {"label": "Reference <b>", "overrides": {"norm": {"name": "batch", "eps": 2e-5}}, "reference": True},
        },
        "seeds": [0, 1],
    }
    return study_from_dict({**content, **changes})


def fake_result(config, error=0.1, status="ok", losses=(1.0, 0.5), processes=1):
    diverged = status == "diverged"
    test = {"loss": 0.3, "error": error}
    return RunResult(
        status=status,
        task="classification",
        metric=ERROR,
        test=None if diverged else test,
        steps=2,
        samples=8,
        seconds=0.1,
        samples_per_second=80.0,
        parameters=10,
        losses=list(losses),
        history=[] if diverged else [{"epoch": 1, "step": 2, "train_loss": 0.5, "test": test}],
        train_samples=8,
        validation_samples=0,
        test_samples=0,
        processes=processes,
        environment={"torch": "2"},
        config=config_to_dict(config),
    )


def train(config, out=None, *, resume=False):
    """Takes a moment, records the call, and has an error that depends on the arm."""
    time.sleep(0.1)
    out.mkdir(parents=True, exist_ok=True)
    with (out.parent.parent / "calls.txt").open("a") as file:
        file.write(f"{out.name}\n")
    error = {"batch": 0.4, "sync": 0.03}[config.norm.name] if config.norm.eps == 1e-5 else 0.02
    result = fake_result(config, error + 0.01 * config.seed)
    result.to_json(out / "result.json")
    return result


def train_with_accidents(config, out=None, *, resume=False):
    """Raises in one cell, kills its worker in another, and diverges in a third."""
    if config.norm.name == "sync" and config.seed == 0:
        raise RuntimeError("no luck")
    if config.norm.name == "sync":
        os.kill(os.getpid(), signal.SIGKILL)
    out.mkdir(parents=True, exist_ok=True)
    status = "diverged" if config.norm.eps == 1e-5 else "ok"
    fake_result(config, 0.02, status, losses=(1.0, float("nan"))).to_json(out / "result.json")


def train_then_killed(config, out=None, *, resume=False):
    """Finishes the first seed's runs and is killed before they can be recorded."""
    train(config, out, resume=resume)
    if config.seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
