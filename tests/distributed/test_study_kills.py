"""A study is killed at random moments, and goes on each time where it was: no run is lost, none is done twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from study_jobs import SEEDS, computed, run_tiny, trace

KILLS = 10
CELLS = 2 * len(SEEDS)


def start(out, workers):
    # Forked from a server that has imported torch, a runner starts at once; its workers are new processes, as always.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "study_jobs"])
    process = context.Process(target=run_tiny, args=(str(out), workers))
    process.start()
    return process


def workers_of(process):
    """Process ids of a runner's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        pids = [int(word) for word in children.read_text().split()]
        return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def wait_for_work(out, process):
    """Until a run has come a step further in this session of the study."""
    began, deadline = time.time(), time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        for path in (*out.glob("runs/*/checkpoint/latest"), *out.glob("runs/*/result.json")):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > began:
                    return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.fault(
    "death",
    "a study, a worker or both are killed, twelve times",
    moment="at random moments",
    outcome="run again, the records of an undisturbed study; no run is done twice",
    lost="the steps since the last checkpoint",
)
def test_a_study_that_is_killed_again_and_again(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    undisturbed = start(whole, 2)
    undisturbed.join(120)
    assert undisturbed.exitcode == 0

    draw = random.Random(20260301)
    hits = Counter()
    # After the runner's kills: a worker alone, which fails its run, and all at once.
    for number, victim in enumerate(["runner"] * KILLS + ["worker", "all"]):
        process = start(killed, 1 + number % 2)
        if number % 3:  # one in three while it starts
            wait_for_work(killed, process)
        time.sleep(draw.uniform(0.0, 0.8))
        workers = workers_of(process)
        pids = {"runner": [process.pid], "worker": workers[:1], "all": [process.pid, *workers]}[victim]
        hits[victim] += process.is_alive() and sum(map(kill, pids)) > 0
        process.join(60)
    assert hits == {"runner": KILLS, "worker": 1, "all": 1}
    last = start(killed, 2)
    last.join(120)
    assert last.exitcode == 0

    assert computed(killed) == computed(whole)
    lines = [line for path in (killed / "records").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == len(computed(killed)) == CELLS
    # A kill between the end of a training and its note leaves none.
    ended = Counter(key for key, _, word, *_ in trace(killed) if word == "ended")
    assert set(ended.values()) == {1}
    assert len(ended) >= CELLS - KILLS
    begun = [(key, step[0]) for key, _, word, *step in trace(killed) if word == "began"]
    assert len(begun) > CELLS
    # A run that was begun again went on from a checkpoint, which it has from its first epoch on.
    again = [step for number, (key, step) in enumerate(begun) if key in dict(begun[:number])]
    assert sum(step != "step-0" for step in again) > len(again) / 2
    assert not list((killed / "runs").glob("*/.result.json.*"))
    assert all((killed / "runs" / key / "model.safetensors").exists() for key in ended)
