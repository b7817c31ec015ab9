"""Signals and deaths of real processes, as users and schedulers meet them: the run goes on where it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import finish, running, start, wait_for, workers_of

from syncbn.train import load_config, train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launch scripts are for bash")

HERE = Path(__file__).parent
# One epoch of 100 steps, which takes at least 4 seconds.
CONFIG = """\
gpus: 2
per_gpu_batch_size: 8
precision: fp64
device: cpu
task: {name: "fault_tasks:Faulty", options: {samples: 1600, seconds: 0.005}}
norm: {name: batch}
budget: {epochs: 1}
"""
STOPPED = r"^syncbn: stopped by (\w+) at step (\d+); the checkpoint is in (\S+); --resume continues$"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [HERE.parents[1], HERE, HERE.parent])))
    monkeypatch.syspath_prepend(HERE)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def trains(out):
    """Whether a run has come to its second step at least."""
    path = out / "metrics.jsonl"
    return wait_for(lambda: path.exists() and '"step": 2,' in path.read_text(), 120)


def check_whole(config, out):
    """The run has the answer of one that was never stopped."""
    values = load_config(config)
    values.task.options["seconds"] = 0.0
    train(values, out.parent / "whole")
    assert compare_runs(Trained.read(out.parent / "whole"), Trained.read(out)).largest <= TOLERANCE


def step_of(output, cause, out):
    """The step that the run says it was stopped at, in one line."""
    (found,) = re.findall(STOPPED, output, re.M)
    assert (found[0], found[2]) == (cause, str(out / "checkpoint"))
    assert (out / "checkpoint" / "latest").read_text() == f"step-{int(found[1]):08d}"
    return int(found[1])


def test_torchrun_is_terminated(config, tmp_path):
    """As `kill`, Kubernetes and Docker do it: torchrun tells its processes."""
    out = tmp_path / "out"
    process = start("torchrun.sh", config, out, NPROC="2")
    assert trains(out)
    process.terminate()
    code, output = finish(process)
    assert code == 85, output
    assert 1 < step_of(output, "SIGTERM", out) < 100
    assert workers_of(out) == []
    code, output = finish(start("torchrun.sh", config, out, "--resume", NPROC="2"))
    assert code == 0, output
    check_whole(config, out)


def test_one_process_and_its_loaders_are_terminated(config, tmp_path):
    """As Slurm does it: every process of the job gets the signal. The loaders work on, as the step needs them."""
    out = tmp_path / "out"
    words = ["train", "--config", str(config), "--out", str(out), "--data.workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "syncbn", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trains(out)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85, errors
    step_of(errors, "SIGTERM", out)
    assert errors.strip().count("\n") == 0, "one line"
    assert running(str(out)) == [], "no loader is left"
    again = subprocess.run([sys.executable, "-m", "syncbn", *words, "--resume"], timeout=120, check=False)
    assert again.returncode == 0
    check_whole(config, out)


def test_slurm_warns_of_the_time_limit(config, tmp_path):
    """All processes of the job's step get SIGUSR1; the job is queued again, and goes on by itself."""
    out = tmp_path / "out"
    for name, body in {
        "scontrol": """case "$1 $2" in
            "show hostnames") echo 127.0.0.1 ;;
            "show job") echo JobState=RUNNING ;;
            *) echo "scontrol $*" ;;
        esac""",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "NPROC": "2"}
    slurm["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = start("slurm.sbatch", config, out, **slurm)
    assert trains(out)
    step = [pid for pid in running(str(out)) if pid != process.pid]  # the shell of the batch script is spared
    assert len(step) >= 4, "srun's shell, torchrun and two processes"
    for pid in step:
        os.kill(pid, signal.SIGUSR1)
    code, output = finish(process)
    assert code == 0, output
    assert output.splitlines()[-1] == f"scontrol requeue {os.getpid()}"
    step_of(output, "SIGUSR1", out)
    code, output = finish(start("slurm.sbatch", config, out, **slurm, SLURM_RESTART_COUNT="1"))
    assert code == 0, output
    assert "requeue" not in output
    check_whole(config, out)


def test_torchrun_starts_the_processes_again(config, tmp_path):
    """A process dies once. All of them are started again, and go on without being told to."""
    out = tmp_path / "out"
    options = f"{{samples: 1600, seconds: 0.0, deadly: 17, mark: {tmp_path / 'mark'}}}"
    words = ["--task.options", options, "--budget.checkpoint_every_steps", "1"]
    code, output = finish(start("torchrun.sh", config, out, *words, NPROC="2", MAX_RESTARTS="1"))
    assert code == 0, output
    assert (tmp_path / "mark").exists(), "no process died"
    assert "nothing to resume" not in output
    check_whole(config, out)
