"""The launch scripts and the command line with real processes, as a user starts them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from scripts import finish, running, start, wait_for, workers_of

from syncbn.cli import main
from syncbn.train.config import load_config
from syncbn.train.loop import train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launch scripts are for bash")

CONFIG = """\
gpus: 2
per_gpu_batch_size: 8
precision: fp64
device: cpu
data: {name: synthetic, synthetic_samples: 60, image_size: 8}
model: {width: 4}
norm: {name: sync}
budget: {epochs: 2}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def check_run(config, out, processes):
    """The run has the answer of one process, and was made by as many as were asked for."""
    import json

    assert json.loads((out / "result.json").read_text())["processes"] == processes
    train(load_config(config), out.parent / "alone")
    assert compare_runs(Trained.read(out.parent / "alone"), Trained.read(out)).largest <= TOLERANCE


@pytest.mark.works_with("accelerate", "`accelerate launch` on 2 processes: the weights of one process")
@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh"])
def test_one_node(script, config, tmp_path):
    code, output = finish(start(script, config, tmp_path / "out", NPROC="2"))
    assert code == 0, output
    assert "test error" in output
    check_run(config, tmp_path / "out", 2)


def test_two_nodes_on_one_host(config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [
        start("torchrun_multinode.sh", config, tmp_path / "out", NNODES="2", NPROC="1", RDZV_ENDPOINT=endpoint)
        for _ in range(2)
    ]
    for code, output in [finish(node) for node in nodes]:
        assert code == 0, output
    check_run(config, tmp_path / "out", 2)


def test_slurm_with_stand_ins_for_its_commands(config, tmp_path):
    for name, body in {
        "scontrol": "echo 127.0.0.1",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "NPROC": "2"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    code, output = finish(start("slurm.sbatch", config, tmp_path / "out", PATH=path, **slurm))
    assert code == 0, output
    check_run(config, tmp_path / "out", 2)


@pytest.mark.fault(
    "death",
    "a rank is killed",
    moment="in training",
    outcome="all ranks end; `--resume` goes on, also on fewer processes",
    lost="the steps since the last checkpoint",
)
def test_a_killed_rank_ends_the_run_and_it_can_be_resumed(config, tmp_path):
    out = tmp_path / "out"
    process = start("torchrun.sh", config, out, "--budget.epochs", "400", NPROC="2")
    deadline = time.monotonic() + 90
    while not (out / "checkpoint/latest").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = workers_of(out)
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    code, output = finish(process)
    assert code != 0, output
    assert workers_of(out) == []
    assert not (out / "result.json").exists()
    code, output = finish(start("torchrun.sh", config, out, "--resume", "--budget.epochs", "400", NPROC="1"), 240)
    assert code == 0, output


@pytest.mark.fault(
    "death",
    "torchrun is killed by SIGKILL",
    moment="in training",
    outcome="its ranks end with it; a folder of its logs stays among the temporary files",
    lost="the steps since the last checkpoint",
    keeps=("syncbn-torchrun-*",),
)
def test_no_rank_trains_on_after_its_launcher_was_killed(config, tmp_path):
    out = tmp_path / "out"
    process = start("torchrun.sh", config, out, "--budget.epochs", "4000", NPROC="2")
    assert wait_for((out / "checkpoint/latest").exists)
    assert len(workers_of(out)) == 2
    for launcher in running("syncbn.train.torchrun", str(out)):
        os.kill(launcher, signal.SIGKILL)
    assert wait_for(lambda: workers_of(out) == [], 10)
    finish(process)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.fault(
    "death",
    "`syncbn parity` ends by {how.name}",
    moment="while it trains",
    outcome="torchrun and its ranks end with it",
    lost="the check",
)
def test_a_command_ends_with_the_processes_it_started(config, tmp_path, how):
    words = ["parity", "--config", str(config), "--processes", "2,1", "--steps", "100000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and a process inherits that
    try:
        process = subprocess.Popen([sys.executable, "-m", "syncbn", *words], env=environment, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    mark = str(tmp_path / "syncbn-parity-")
    try:
        assert wait_for(lambda: len(running(mark, "0-of-2")) == 3), "the launcher and two ranks"
        process.send_signal(how)
        process.wait(20)
        assert wait_for(lambda: running(mark) == [], 30)
    finally:
        process.kill()


@pytest.mark.fault(
    "mistake",
    "a configuration that the processes cannot run",
    moment="before the first step",
    outcome="one line, also at the end of torchrun's summary",
    lost="nothing",
)
def test_a_mistake_is_said_once_by_all_processes(config, tmp_path):
    code, output = finish(start("torchrun.sh", config, tmp_path / "out", "--gpus", "3", NPROC="2"))
    assert code != 0
    check_said_once(output, "gpus: got 3, expected a multiple of the number of processes (2)")


def check_said_once(output: str, start_of_sentence: str) -> None:
    """By one process, and at the end of torchrun's summary."""
    said = f"syncbn: error: {start_of_sentence}"
    (line,) = (line for line in output.splitlines() if line.startswith(said))
    assert output.count(said) == 2
    assert output.splitlines()[-2].endswith(line)


@pytest.mark.fault(
    "mistake",
    "a batch that a layer of one rank cannot normalize",
    moment="in the second step",
    outcome="that rank's line, also at the end of torchrun's summary",
    lost="the steps since the last checkpoint",
)
def test_a_mistake_of_another_rank_is_said_by_it(config, tmp_path):
    """The second step has one 1x1 map on the last logical GPU, which the second process hosts."""
    words = ["--gpus", "2", "--norm.name", "batch", "--model.name", "resnet18", "--data.synthetic_samples", "25"]
    words += ["--data.image_size", "32"]
    code, output = finish(start("torchrun.sh", config, tmp_path / "out", *words, NPROC="2"))
    assert code != 0
    check_said_once(output, "per_gpu_batch_size: got 8, expected batches that every layer can normalize")


def test_parity_command(config, capfd):
    assert main(["parity", "--config", str(config), "--processes", "1,2", "--steps", "3"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("sync: 2 logical GPUs, 3 steps in fp64")
    assert lines[1].startswith("  2 processes against 1 process:")
    assert ": same (tolerance 1e-10)" in lines[1]


def test_parity_command_fails_on_a_difference(config, capfd):
    """Dropout is drawn on each process for itself, which is the one thing that a number of processes may change."""
    words = ["--model.name", "mobilenet_v3_small", "--data.image_size", "32", "--model.options", "{dropout: 0.9}"]
    assert main(["parity", "--config", str(config), "--processes", "1,2", "--steps", "2", *words]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert "DIFFERENT" in lines[1]
    assert any(line.strip().startswith("classifier.3.weight: ") for line in lines[2:])
