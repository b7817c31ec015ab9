"""Runs that are killed or stopped at given steps and then resumed, for the worker processes of the tests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syncbn.train import Stopped, loop, train
from syncbn.train.config import RunConfig, config_from_dict

STEPS = 24
# One epoch of 24 steps, so every checkpoint lies within it; the last step has 3 samples, of 6 logical GPUs.
BASE: dict[str, Any] = {
    "gpus": 6,
    "per_gpu_batch_size": 2,
    "precision": "fp64",
    "device": "cpu",
    "data": {"name": "synthetic", "synthetic_samples": 279, "image_size": 8, "augment": "crop"},
    "model": {"width": 4},
    "optimizer": {"schedule": "one_cycle", "lr": 0.05},
    "evaluation": {"population_samples": [36]},
}
NORMS: dict[str, dict[str, Any]] = {
    "batch": {"name": "batch"},
    "batch-cumulative": {"name": "batch", "momentum": None},
    "sync": {"name": "sync"},
    "ghost": {"name": "ghost", "ghost_batch_size": 1},
    "renorm": {"name": "renorm", "warmup_steps": 4, "r_ramp_end": 20, "d_ramp_end": 18},
    "frozen": {"name": "frozen", "freeze_at": 0.5},
    "mabn": {"name": "mabn", "warmup_steps": 3, "window": 3},
    "nf": {"name": "nf"},  # has no buffers
}


EXACT = ("losses", "history", "evaluations", "layers", "test", "samples", "steps")


class Killed(BaseException):
    """What a process is killed by: nothing may catch it."""


def configured(norm: str, **changes: Any) -> RunConfig:
    budget = {"epochs": 1, **changes.pop("budget", {})}
    return config_from_dict({**BASE, "norm": NORMS[norm], "budget": budget, **changes})


@contextmanager
def at_steps(steps: Iterable[int], act: Any) -> Any:
    """Call ``act`` once in each of these steps (from 0), before it is taken."""
    train_step, left = loop._train_step, list(steps)

    def watched(run: Any, *rest: Any) -> None:
        if run.progress.step in left:
            left.remove(run.progress.step)
            act()
        train_step(run, *rest)

    loop._train_step = watched
    try:
        yield
    finally:
        loop._train_step = train_step


def die() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train_whole(config: RunConfig, out: Path) -> None:
    train(config, out)


def train_killed(config: RunConfig, out: Path, kills: list[int]) -> list[list[str]]:
    """Train, killed in each of these steps once and resumed; returns the checkpoints that each kill left."""
    left = []
    with at_steps(kills, die):
        while True:
            try:
                train(config, out, resume=True)
            except Killed:
                left.append(sorted(path.name for path in out.glob("checkpoint/step-*")))
            else:
                return left


def train_stopped(config: RunConfig, out: Path, steps: list[int], ranks: list[int]) -> list[tuple[int, str]]:
    """Train, with SIGTERM in these steps to these ranks, and resumed; the steps that it stopped at, and the words."""
    found = []
    with at_steps(steps if int(os.environ.get("RANK", "0")) in ranks else [], terminate):
        while True:
            try:
                train(config, out, resume=True, stop_on=[signal.SIGTERM])
            except Stopped as error:
                found.append((error.step, str(error)))
            else:
                return found


def stop_once(config: RunConfig, out: Path) -> int:
    """Train until SIGTERM in step 14; returns the step that the run stopped at."""
    with at_steps([14], terminate):
        try:
            train(config, out, stop_on=[signal.SIGTERM])
        except Stopped as error:
            return error.step
    raise AssertionError("not stopped")


def check_same_bits(whole: Path, broken: Path) -> None:
    """Two folders of runs hold the same."""
    first, second = (json.loads((out / "result.json").read_text()) for out in (whole, broken))
    assert {name: second[name] for name in EXACT} == {name: first[name] for name in EXACT}
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
