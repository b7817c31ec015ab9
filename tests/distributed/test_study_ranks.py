"""A study under torchrun: all processes do each cell together, and one that they cannot do is a failed cell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.study_file import study_from_dict
from syncbn.study.run.records import Records, read_records
from syncbn.study.run.status import study_outcomes
from syncbn.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
CONTENT = {
    "name": "ranks",
    "title": "Ranks",
    "question": "What?",
    "base": {
        "gpus": 2,
        "per_gpu_batch_size": 4,
        "device": "cpu",
        "precision": "fp64",
        "data": {"name": "synthetic", "synthetic_samples": 40, "image_size": 8},
        "model": {"width": 2},
        "optimizer": {"lr": 0.02},
        "budget": {"epochs": 2},
    },
    "arms": {
        "odd": {"overrides": {"norm": {"name": "batch"}, "gpus": 3}},
        "batch": {"overrides": {"norm": {"name": "batch"}}},
        "sync": {"overrides": {"norm": {"name": "sync"}}, "reference": True},
    },
    "seeds": [0],
    "parity": {"arm": "sync", "processes": [1, 2], "steps": 3},
}


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    paths = os.pathsep.join([str(ROOT / "tests" / "distributed"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command_under_torchrun(tmp_path):
    """One cell was done before, by one process; one cannot be done by two; all others are done by both."""
    config, out = tmp_path / "ranks.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(CONTENT))
    study = study_from_dict(CONTENT)
    cells = study_cells(study)
    odd, batch, sync = (cell.key for cell in cells)
    Records(out).add(sync, datetime.now(UTC), 1.0, train(cells[2].config))
    code, printed, said = torchrun("-m", "syncbn", "study", "run", "--config", str(config), "--out", str(out))
    assert code == 1, said
    message = "ConfigError: gpus: got 3, expected a multiple of the number of processes (2)"
    assert said.count(f"failed: odd, seed 0: {message} (log: {out}/logs/{odd}.log)") == 1
    assert printed.count("\nreport: ") == 1
    assert re.search(r"^1 runs in \d+ s, 1 kept from before, 1 failed$", printed, re.MULTILINE)
    records = read_records(out)
    assert len(list((out / "records").iterdir())) == 2
    assert {key: record.result.processes for key, record in records.items()} == {batch: 2, sync: 1}
    # Processes do not change the result.
    losses = zip(records[batch].result.losses, train(cells[1].config).losses, strict=True)
    assert max(abs(a - b) for a, b in losses) < 1e-10
    states = {key: outcome.state for key, outcome in study_outcomes(cells, out).items()}
    assert states == {odd: "failed", batch: "done", sync: "done"}
    # The check of the emulation was run after the cells, in processes of its own.
    parity = json.loads((out / "parity.json").read_text())
    assert (parity["key"], parity["processes"], parity["agrees"]) == (sync, [1, 2], True)
    assert parity["lines"][1] in printed


def run_with_failures(out, failing):
    """Every rank of a launcher runs a study of two arms and seeds; some of the processes cannot do one arm."""
    from syncbn.study.run import ranks
    from syncbn.study.run.runner import run_cells

    def fails(config, out=None, *, resume=False):
        if os.environ["RANK"] in failing and config.norm.name == "batch":
            raise ValueError("no disk here")
        return train(config, out, resume=resume)

    study = study_from_dict({**CONTENT, "seeds": [0, 1], "arms": {n: CONTENT["arms"][n] for n in ("batch", "sync")}})
    with ranks.process_group() as rank:
        if rank:
            ranks.follow(fails)
        else:
            run_cells(study_cells(study), Path(out), train=fails, together=True)
            ranks.share(None)


@pytest.mark.parametrize("failing", ["1", "01"])
@pytest.mark.fault(
    "mistake",
    "a run of a study fails on rank {failing}, under torchrun",
    moment="in a run",
    outcome="all ranks end with one line; the next time that run comes last",
    lost="the run",
)
def test_a_process_that_fails_ends_all_and_holds_nothing_up(tmp_path, failing):
    driver = ["-c", f"import test_study_ranks as t; t.run_with_failures({str(tmp_path)!r}, {failing!r})"]
    code, _, said = torchrun("--no-python", sys.executable, *driver)
    assert code != 0
    line = f"syncbn: error: batch, seed 0: process {failing[0]}: ValueError: no disk here; run the study again"
    assert said.count("syncbn: error: ") == said.count(line) == 1
    assert not read_records(tmp_path)
    # The next time it is tried last, so that all other cells are done.
    code, _, said = torchrun("--no-python", sys.executable, *driver)
    assert code != 0
    assert f"process {failing[0]}: ValueError: no disk here" in said
    assert {record.result.config["norm"]["name"] for record in read_records(tmp_path).values()} == {"sync"}
