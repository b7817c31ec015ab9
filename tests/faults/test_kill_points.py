"""A training that is killed at random moments, within writes too, ends with the bits of an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_runs import check_same_bits
from kill_points import Attempt, Event, Kill, Nursery, Outcome

from syncbn.train.config import RunConfig, config_from_dict

KILLS = int(os.environ.get("SYNCBN_KILL_POINTS", "20"))
"""On 1, 2, 3 and 4 processes together. Without the variable they are the same each time."""
CHAIN = 5
"""Kills of one training, at most."""
NORM = {
    1: {"name": "renorm", "warmup_steps": 2, "r_ramp_end": 10, "d_ramp_end": 9},
    2: {"name": "batch"},  # each process has running statistics of its own
    3: {"name": "batch"},
    4: {"name": "sync"},
}
"""By number of processes."""


def configured(world: int) -> RunConfig:
    """12 steps of 3 an epoch. Checkpoints lie within epochs and at their ends, the last one after the last step."""
    values = {
        "gpus": 12,
        "per_gpu_batch_size": 2,
        "precision": "fp64",
        "device": "cpu",
        "norm": NORM[world],
        "optimizer": {"lr": 0.05, "schedule": "one_cycle"},
        "budget": {"epochs": 4, "checkpoint_every_steps": 2, "select": "best"},
        "evaluation": {"population_samples": [16]},
    }
    return config_from_dict(values)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.stop()


def drawn_kill(draw: random.Random, log: list[Event], sizes: dict[str, int], world: int) -> Kill:
    """A moment of an undisturbed run, or of a resumed one's preparation: in a write, at a file, or in a call.

    Calls are drawn by phase, so that the few of an evaluation are met as often as the many of a step.
    """
    kind = draw.choice(["write", "write", "file", "call", "call"])
    rank = 0 if kind != "call" else draw.randrange(world)
    events = [event for event in log if kind == kind_of(event)]
    if kind == "write":
        events = [event for event in events if sizes.get(event.what.removeprefix("write "))]
    phase = draw.choice(sorted({event.phase for event in events}))
    event = draw.choice([event for event in events if event.phase == phase])
    size = draw.randrange(sizes[event.what.removeprefix("write ")]) if kind == "write" else None
    return Kill(rank, event, everyone=draw.random() < 0.5, size=size)


def kind_of(event: Event) -> str:
    return "call" if event.what == "call" else "write" if event.what.startswith("write ") else "file"


def sizes_in(out: Path) -> dict[str, int]:
    """The bytes of each kind of file; of the metrics, which grow, those of a line."""
    found = {path.name: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    return found | {"metrics.jsonl": len((out / "metrics.jsonl").read_text().splitlines()[0])}


def last_state(out: Path) -> tuple[bytes, bytes, str]:
    """The last checkpoint: weights and running statistics, the optimizer's state, and all else but the time."""
    folder = out / "checkpoint" / (out / "checkpoint/latest").read_text()
    state = re.sub(r'\["seconds", [^]]+\]', "", (folder / "state.json").read_text())
    return (folder / "model.safetensors").read_bytes(), (folder / "state.safetensors").read_bytes(), state


def ended(outcome: Outcome) -> bool:
    return outcome.codes == [0] * len(outcome.codes)


@pytest.mark.timeout(600 + 10 * KILLS)
@pytest.mark.parametrize("world", NORM)
def test_killed_at_any_moment(nursery: Nursery, world: int, tmp_path: Path) -> None:
    config, whole = configured(world), tmp_path / "whole"
    recorded = nursery.run(Attempt(config, whole, world, tmp_path, record=True))
    assert ended(recorded), recorded.said
    sizes, draw = sizes_in(whole), random.Random(f"{KILLS} on {world}")
    deaths, seen, trainings = 0, Counter[str](), 0
    while deaths < KILLS // len(NORM):
        out, trainings = tmp_path / f"killed-{trainings}", trainings + 1
        length = min(CHAIN, KILLS // len(NORM) - deaths)
        chain = [drawn_kill(draw, recorded.events, sizes, world) for _ in range(length)]
        for kill in sorted(chain, key=lambda kill: kill.event[:2]):
            outcome = nursery.run(Attempt(config, out, world, tmp_path, kill))
            if ended(outcome):  # the kill before came when the result was written
                break
            assert outcome.death is not None, outcome.said
            assert outcome.codes[kill.rank] < 0, outcome.said
            deaths += 1
            seen.update(described(kill, outcome))
        outcome = nursery.run(Attempt(config, out, world, tmp_path))
        assert ended(outcome), outcome.said
        check_same_bits(whole, out)
        assert last_state(out) == last_state(whole)
    print(f"{world} processes: {deaths} kills of {trainings} trainings: {dict(sorted(seen.items()))}")


def described(kill: Kill, outcome: Outcome) -> list[str]:
    """The kinds that a death counts to."""
    assert outcome.death is not None
    event, saved = outcome.death
    cut = outcome.codes[kill.rank] == -signal.SIGXFSZ
    what = (
        "cut within a write"
        if cut
        else {"write": "around a write", "file": "at a file", "call": "in a call"}[kind_of(event)]
    )
    when = "after a checkpoint" if saved else "before the first checkpoint"
    return [what, f"during: {event.phase}", when, "all processes" if kill.everyone else "one process"]
