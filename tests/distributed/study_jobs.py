"""A tiny study that is really trained, and what its runs leave for a test to count; workers import this."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.study_file import study_from_dict
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import run_cells
from syncbn.train.result import RunResult

SEEDS = list(range(6))
EPOCHS = 40


def tiny_study(**changes):
    """Cells of about a second with a checkpoint every few steps."""
    content = {
        "name": "tiny",
        "title": "Tiny",
        "question": "What?",
        "base": {
            "gpus": 3,
            "per_gpu_batch_size": 4,
            "device": "cpu",
            "precision": "fp64",
            "data": {"name": "synthetic", "synthetic_samples": 48, "image_size": 8},
            "model": {"width": 2},
            "optimizer": {"lr": 0.02},
            "budget": {"epochs": EPOCHS, "checkpoint_every": 1, "eval_every": 10},
            "evaluation": {"batch": False, "population_samples": []},
        },
        "arms": {
            "batch": {"overrides": {"norm": {"name": "batch"}}},
            "sync": {"overrides": {"norm": {"name": "sync"}}, "reference": True},
        },
        "seeds": SEEDS,
    }
    return study_from_dict({**content, **changes})


def traced_train(config, out=None, *, resume=False):
    """The real trainer; notes from which checkpoint a run goes on, and when it is trained to its end."""
    from syncbn.train.loop import train

    write = RunResult.to_json

    def counted(result, path):
        write(result, path)
        note(out, "ended")

    latest = out / "checkpoint" / "latest"
    note(out, "began", latest.read_text() if latest.exists() else "step-0")
    RunResult.to_json = counted
    try:
        return train(config, out, resume=resume)
    finally:
        RunResult.to_json = write


def note(out, *words):
    with (out.parent.parent / "trace.txt").open("a") as file:
        file.write(" ".join([out.name, str(os.getpid()), *words]) + "\n")


def trace(out):
    """What was noted: (key, process, word, checkpoint) a line."""
    path = Path(out) / "trace.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def run_tiny(out, workers=2):
    return run_cells(study_cells(tiny_study()), Path(out), workers=workers, train=traced_train)


def computed(out):
    """What the runs of a study computed, by key, without what depends on the machine's speed or on who did them."""
    measured = ("seconds", "samples_per_second", "peak_memory_bytes")
    results = {key: asdict(record.result) for key, record in read_records(out).items()}
    return {key: {k: v for k, v in result.items() if k not in measured} for key, result in results.items()}
