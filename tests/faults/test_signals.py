"""Signals and deaths of real processes, as users and schedulers meet them: the run goes on where it was."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import finish, running, start, wait_for, workers_of

from syncbn.cli import main
from syncbn.study import load_study
from syncbn.study.commands import run_study
from syncbn.study.plan.grid import study_cells
from syncbn.study.run.status import study_outcomes
from syncbn.train import load_config, loop, train
from syncbn.train.batches import fetched
from syncbn.train.parity import TOLERANCE, Trained, compare_runs
from syncbn.train.stopping import STOP_SIGNALS
from syncbn.train.tasks.named import TaskError

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


@pytest.mark.fault(
    "signal",
    "SIGTERM to torchrun",
    moment="in training",
    outcome="exit code 85 and one line; `--resume` goes on",
    lost="nothing",
)
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


@pytest.mark.fault(
    "signal",
    "SIGTERM to torchrun",
    moment="while its processes start",
    outcome="exit code 85; `--resume` starts",
    lost="nothing",
)
def test_torchrun_is_terminated_before_the_first_step(config, tmp_path):
    out = tmp_path / "out"
    process = start("torchrun.sh", config, out, NPROC="2")
    assert wait_for(lambda: len(workers_of(out)) == 2)
    process.terminate()
    code, output = finish(process)
    assert code == 85, output
    assert "Traceback" not in output
    assert workers_of(out) == []


@pytest.mark.fault(
    "death",
    "a rank under `launch/torchrun.sh` is killed",
    moment="in training",
    outcome="exit code 1; the last line names the rank and the signal",
    lost="the steps since the last checkpoint",
)
def test_torchrun_names_the_process_that_was_killed(config, tmp_path):
    out = tmp_path / "out"
    process = start("torchrun.sh", config, out, NPROC="2")
    assert trains(out)
    killed = workers_of(out)[0]
    os.kill(killed, signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output
    assert re.fullmatch(
        rf"syncbn: error: rank [01] \(process {killed}\) was killed by SIGKILL", output.splitlines()[-1]
    )
    assert "Traceback" not in output
    assert workers_of(out) == []


@pytest.mark.fault(
    "signal",
    "SIGTERM to a process and its loaders",
    moment="in training",
    outcome="the loaders work on until the checkpoint is written; exit code 85",
    lost="nothing",
)
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


@pytest.mark.fault(
    "signal",
    "SIGUSR1 from Slurm to all processes",
    moment="in training",
    outcome="the job is queued again, and goes on",
    lost="nothing",
)
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


@pytest.mark.fault(
    "death",
    "a rank is killed, with `MAX_RESTARTS=1`",
    moment="while it loads data",
    outcome="all start again, and go on without `--resume`",
    lost="the steps since the last checkpoint",
)
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


@pytest.mark.fault(
    "signal",
    "SIGTERM to accelerate",
    moment="in training",
    outcome="accelerate ends with 1, and the file of `SYNCBN_STOPPED` tells that the run was stopped",
    lost="nothing",
)
def test_accelerate_is_terminated(config, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "stopped"
    process = start("accelerate.sh", config, out, NPROC="2", SYNCBN_STOPPED=str(mark))
    assert trains(out)
    assert not mark.exists()
    process.terminate()
    code, output = finish(process)
    assert code == 1, output
    assert 1 < step_of(output, "SIGTERM", out) < 100
    assert mark.exists()
    assert workers_of(out) == []
    train(load_config(config), out, resume=True)
    check_whole(config, out)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, -signal.SIGHUP)])
@pytest.mark.fault(
    "signal",
    "{how.name} to `syncbn train`, as by Ctrl-C (SIGINT) or a closed terminal (SIGHUP)",
    moment="in training",
    outcome="the process ends at once; `--resume` goes on",
    lost="the steps since the last checkpoint",
)
def test_a_signal_that_ends_a_run_at_once(config, tmp_path, how, code):
    out = tmp_path / "out"
    words = ["train", "--config", str(config), "--out", str(out), "--budget.checkpoint_every_steps", "1"]
    before = [(each, signal.signal(each, signal.SIG_DFL)) for each in (signal.SIGINT, signal.SIGHUP)]
    try:  # a process inherits that a signal is ignored, as in the background or with nohup
        process = subprocess.Popen([sys.executable, "-m", "syncbn", *words], stderr=subprocess.PIPE, text=True)
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    assert trains(out)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    said = f"syncbn: stopped by Ctrl-C; to go on from the last checkpoint: syncbn train --resume --out {out}\n"
    assert errors.endswith(said) == (how == signal.SIGINT)
    assert "Traceback" not in errors
    assert not (out / "result.json").exists()
    train(load_config(config), out, resume=True)
    check_whole(config, out)


@pytest.mark.fault(
    "death",
    "a loader process is killed",
    moment="while it loads data",
    outcome="one line; `--resume` goes on",
    lost="the steps since the last checkpoint",
    # When a connection breaks, torch opens temporary files to see whether it may, and its signal handler may come then.
    keeps=["tmp????????"],
)
def test_a_loader_is_killed(config, tmp_path, capfd):
    out, mark = tmp_path / "out", tmp_path / "mark"
    options = f"{{samples: 1600, seconds: 0.0, deadly: 17, mark: {mark}}}"
    words = ["--task.options", options, "--data.workers", "1", "--progress", "false", "--out", str(out)]
    assert main(["train", "--config", str(config), *words, "--budget.checkpoint_every_steps", "1"]) == 2
    error = capfd.readouterr().err
    assert mark.exists(), "no process died"
    said = r"^syncbn: error: .* DataLoader worker .*(?:killed by signal|exited unexpectedly)"
    assert len(re.findall(said, error, re.M)) == 1, error
    assert "Traceback" not in error
    assert main(["train", "--out", str(out), "--resume", "--progress", "false"]) == 0
    check_whole(config, out)


DIED = "DataLoader worker (pid 7) is killed by signal: Killed."


def test_a_connection_of_a_dead_loader_waits_for_the_signal_that_names_it():
    def broken():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        yield

    def handler(signum, frame):
        raise RuntimeError(DIED)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TaskError, match=f"mine: its data raised RuntimeError: {re.escape(DIED)}"):
            next(fetched(SimpleNamespace(task_name="mine"), broken()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_signal_of_a_dead_loader_may_come_from_anywhere(config, tmp_path, capfd, monkeypatch):
    def step(*arguments):
        raise RuntimeError(DIED)

    monkeypatch.setattr(loop, "_step", step)
    assert main(["train", "--config", str(config), "--progress", "false", "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"syncbn: error: {DIED}"


# ---- studies

STUDY = """\
name: stopped
title: Stopped
question: What?
base:
  {gpus: 2, per_gpu_batch_size: 8, precision: fp64, device: cpu, budget: {epochs: 1},
   task: {name: "fault_tasks:Faulty", options: {samples: 1600, seconds: 0.005}}}
arms:
  batch: {overrides: {norm: {name: batch}}}
  sync: {overrides: {norm: {name: sync}}, reference: true}
seeds: [0]
"""


def begun(out):
    """Wait until a run of a study trains; returns whether one does."""
    files = out.glob
    return wait_for(lambda: any('"step": 2,' in file.read_text() for file in files("runs/*/metrics.jsonl")), 200)


def check_study(path, out, errors, cause):
    """The study was stopped within a run, says so in one line, and goes on to the numbers of an undisturbed one."""
    again = rf"syncbn study run --config {path} --out {out}$"
    said = rf"^syncbn: stopped by (?:{cause}|a signal to another process) with 0 of 2 runs done; to go on: {again}"
    assert len(re.findall(said, errors, re.M)) == 1, errors
    steps = [int(file.read_text()[5:]) for file in out.glob("runs/*/checkpoint/latest")]
    assert steps
    assert all(0 < step < 100 for step in steps)
    log = "".join(file.read_text() for file in out.glob("logs/*.log"))
    assert f"stopped by {cause}" in log
    assert "failed" not in log
    cells = study_cells(load_study(path).plan)
    assert {outcome.state for outcome in study_outcomes(cells, out).values()} == {"missing"}
    assert run_study(str(path), out, workers=1) == 0
    for cell in cells:
        train(cell.config, out.parent / "whole" / cell.key)
        ours = Trained.read(out / "runs" / cell.key)
        assert compare_runs(Trained.read(out.parent / "whole" / cell.key), ours).largest <= TOLERANCE


@pytest.mark.fault(
    "signal",
    "SIGTERM to a study",
    moment="in a run",
    outcome="its worker writes a checkpoint; exit code 85 and one line; the same command goes on",
    lost="nothing",
)
def test_a_study_is_terminated(config, tmp_path, capfd):
    """This process is the study's."""
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(STUDY)
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    killer = threading.Thread(target=lambda: begun(out) and os.kill(os.getpid(), signal.SIGTERM))
    killer.start()
    try:
        assert run_study(str(path), out, workers=1) == 85
    finally:
        killer.join()
        ignored = {each: signal.signal(each, handler) for each, handler in before.items()}
    assert set(ignored.values()) == {signal.SIG_IGN}, "the process ends anyway"
    check_study(path, out, capfd.readouterr().err, "SIGTERM")


@pytest.mark.fault(
    "signal",
    "SIGUSR1 to torchrun, which runs a study",
    moment="in a run of all ranks",
    outcome="the ranks write a checkpoint; exit code 85 and one line; the same command goes on",
    lost="nothing",
)
def test_a_study_under_torchrun_is_stopped(config, tmp_path):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(STUDY)
    launcher = [sys.executable, "-m", "syncbn.train.torchrun", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "syncbn", "study", "run", "--config", str(path), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert begun(out)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 85, errors
    check_study(path, out, errors, "SIGUSR1")
