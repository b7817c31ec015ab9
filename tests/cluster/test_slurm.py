"""Jobs of a real Slurm on two nodes of this machine: what is stopped is put back, and what is cancelled stays so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network
from scripts import wait_for
from slurm import Slurm

from syncbn.train import load_config, train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs

pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes to start launchers and ranks

# Stands in for Python: says that it has begun, and answers a signal as a run does. A second start finds nothing to do.
STAND_IN = """\
#!/usr/bin/env bash
echo "$(hostname) ${SLURM_RESTART_COUNT:-0} ${@: -1}" >> "$MARKS"
trap 'sleep 0.5; exit 85' TERM USR1
((${SLURM_RESTART_COUNT:-0})) || for _ in {1..600}; do sleep 0.1; done
"""
STUDY = """\
name: tiny
title: Tiny
question: Does a real Slurm run it?
base:
  gpus: 2
  per_gpu_batch_size: 4
  device: cpu
  data: {name: synthetic, synthetic_samples: 16, image_size: 8}
  model: {width: 2}
  budget: {epochs: 1}
  evaluation: {batch: false, population_samples: []}
arms:
  batch: {overrides: {norm: {name: batch}}}
  sync: {overrides: {norm: {name: sync}}, reference: true}
seeds: [0]
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with Network(2, folder) as network:
        yield Slurm(network, folder / "state")


def submit(slurm: Slurm, config: Path, out: Path, *arguments: str, **environment: str) -> str:
    log = out.parent / "job.log"
    options = ["--nodes=2", f"--output={log}", "--open-mode=append"]
    words = ["--out", str(out), *arguments]
    return slurm.submit("slurm.sbatch", *words, options=options, CONFIG=str(config), NPROC="1", **environment)


@pytest.mark.parametrize(
    ("ends", "state", "resumes"),
    [
        (["scancel", "--signal=TERM"], "COMPLETED", True),
        (["scancel", "--signal=USR1"], "COMPLETED", True),
        (["scontrol", "requeue"], "COMPLETED", True),
        (["srun", "--partition=urgent", "--nodes=2", "--exclusive", "echo"], "COMPLETED", True),
        (["scancel"], "CANCELLED", False),
    ],
    ids=["terminated", "warned", "put back", "preempted", "cancelled"],
)
def test_what_slurm_does_to_a_job(slurm: Slurm, tmp_path: Path, ends: list[str], state: str, resumes: bool) -> None:
    marks, python = tmp_path / "marks", tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    job = submit(slurm, tmp_path / "run.yaml", tmp_path / "out", PYTHON=str(python), MARKS=str(marks))
    assert wait_for(lambda: marks.exists() and len(marks.read_text().splitlines()) == 2, 60)
    slurm.ask(*ends, job)
    assert wait_for(lambda: slurm.state(job) == state, 60), slurm.ask("scontrol", "show", "job", job)
    begun = {tuple(line.split()) for line in marks.read_text().splitlines()}
    nodes = ("node0", "node1")
    expected = {(node, "0", str(tmp_path / "out")) for node in nodes}
    expected |= {(node, "1", "--resume") for node in nodes} if resumes else set()
    assert begun == expected


@pytest.mark.slow  # two starts of two nodes
def test_a_job_that_is_terminated_is_put_back_and_has_the_answer_of_one_process(
    slurm: Slurm, config: Path, tmp_path: Path
) -> None:
    """With --full the signal comes to srun too, which kills the processes: the job goes on from the last checkpoint."""
    out = tmp_path / "out"
    job = submit(slurm, config, out)
    path = out / "metrics.jsonl"
    assert wait_for(lambda: path.exists() and '"step": 15,' in path.read_text(), 300), (
        tmp_path / "job.log"
    ).read_text()
    slurm.ask("scancel", "--signal=TERM", "--full", job)
    assert wait_for(lambda: slurm.state(job) == "COMPLETED", 300), (tmp_path / "job.log").read_text()
    assert "Restarts=1 " in slurm.ask("scontrol", "show", "job", job)
    assert json.loads((out / "result.json").read_text())["processes"] == 2
    values = load_config(config)
    values.task.options["seconds"] = 0.0
    train(values, tmp_path / "alone")
    assert compare_runs(Trained.read(tmp_path / "alone"), Trained.read(out)).largest <= TOLERANCE


def test_a_study_runs_as_jobs_of_slurm(slurm: Slurm, tmp_path: Path) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(STUDY)
    words = ["study", "run", "--config", str(file), "--out", str(out), "--workers", "2", "--executor", "slurm"]
    command = [*slurm.head.enter, sys.executable, "-m", "syncbn", *words, "--slurm-options", "{partition: main}"]
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Does a real Slurm run it?" in (out / "report.html").read_text()
    arrays = {path.name.split("_")[0] for path in (out / "submitted").glob("*_result.pkl")}
    assert len(arrays) == 1, "one array has both jobs"
