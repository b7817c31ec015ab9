"""The launch scripts and the container files, as far as one machine without a scheduler or an engine can tell."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
BASH = shutil.which("bash")
TRAIN = ["-m", "syncbn", "train", "--config", "run.yaml", "--norm.momentum", "0.05", "--data.root", "a folder"]
"""How every script ends, given these two options: one of them holds a space."""

pytestmark = pytest.mark.skipif(BASH is None, reason="the launch scripts are for bash")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder of stand-ins on PATH: each prints its arguments, one a line, and what it finds in the environment."""

    def stand_in(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!{BASH}\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    stand_in("python", 'echo "OMP_NUM_THREADS=$OMP_NUM_THREADS"; printf "%s\\n" "$@"')
    stand_in("scontrol", '[[ "$1 $2" == "show hostnames" ]] && printf "%s\\n" head-7 other-8')
    # As srun does for one task: its own options up to the command, then the command itself.
    stand_in("srun", 'while [[ "$1" == --* ]]; do echo "srun $1"; shift; done; exec "$@"')
    return tmp_path


def launch(script: str, fake: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert BASH is not None
    clean = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHON", "NPROC")}
    return subprocess.run(
        [BASH, str(LAUNCH / script), *TRAIN[5:], *options],
        cwd=ROOT,
        env={**clean, "PATH": f"{fake}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def arguments(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.is_file()))
def test_script_is_well_formed(script: str) -> None:
    assert BASH is not None
    path = LAUNCH / script
    done = subprocess.run([BASH, "-n", str(path)], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    assert "MASTER_PORT" not in path.read_text()


def test_torchrun_meets_on_a_free_port(fake: Path) -> None:
    got = arguments(launch("torchrun.sh", fake, CONFIG="run.yaml"))
    start = ["OMP_NUM_THREADS=1", "-m", "syncbn.train.torchrun", "--standalone", "--local-addr", "localhost"]
    assert got == [*start, "--nproc-per-node", "auto", "--max-restarts", "0", *TRAIN]
    got = arguments(launch("torchrun.sh", fake, CONFIG="run.yaml", MAX_RESTARTS="3"))
    assert got[got.index("--max-restarts") + 1] == "3"


@pytest.mark.parametrize("script", ["torchrun.sh", "torchrun_multinode.sh", "accelerate.sh"])
def test_a_resumed_run_needs_no_configuration(script: str, fake: Path) -> None:
    nodes = {"NNODES": "2", "RDZV_ENDPOINT": "node0:1"}
    got = arguments(launch(script, fake, "--out", "runs/one", "--resume", **nodes))
    assert got[-10:] == [*TRAIN[:3], *TRAIN[5:], "--out", "runs/one", "--resume"]


def test_defaults_can_be_overridden(fake: Path) -> None:
    shutil.copy(fake / "python", fake / "my-python")
    (fake / "python").write_text("#!/bin/sh\nexit 1\n")
    python = str(fake / "my-python")
    got = arguments(launch("torchrun.sh", fake, CONFIG="run.yaml", NPROC="3", OMP_NUM_THREADS="4", PYTHON=python))
    assert got[0] == "OMP_NUM_THREADS=4"
    assert got[got.index("--nproc-per-node") + 1] == "3"


def test_accelerate_meets_on_a_free_port(fake: Path) -> None:
    got = arguments(launch("accelerate.sh", fake, CONFIG="run.yaml", NPROC="4"))
    assert got[1:6] == ["-m", "accelerate.commands.launch", "--num_processes", "4", "--multi_gpu"]
    assert got[got.index("--main_process_port") + 1] == "0"
    assert got[-len(TRAIN) :] == TRAIN
    # accelerate refuses --multi_gpu for one process.
    assert "--multi_gpu" not in arguments(launch("accelerate.sh", fake, CONFIG="run.yaml", NPROC="1"))


def test_multinode_meets_at_the_endpoint(fake: Path) -> None:
    environment = {"CONFIG": "run.yaml", "NNODES": "2", "RDZV_ENDPOINT": "node0:29511", "NPROC": "4"}
    got = arguments(launch("torchrun_multinode.sh", fake, **environment))
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29511", "--rdzv-id", "syncbn"]
    assert got[1:] == [
        *["-m", "syncbn.train.torchrun", "--nnodes", "2", "--nproc-per-node", "4", "--max-restarts", "0"],
        *rendezvous,
        *TRAIN,
    ]


@pytest.mark.parametrize("missing", ["RDZV_ENDPOINT", "NNODES", "CONFIG"])
def test_multinode_names_what_is_missing(fake: Path, missing: str) -> None:
    environment = {"CONFIG": "run.yaml", "NNODES": "2", "RDZV_ENDPOINT": "node0:29511"}
    del environment[missing]
    done = launch("torchrun_multinode.sh", fake, **environment)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"{missing}: is not set" in done.stderr


def test_multinode_refuses_an_endpoint_without_a_port(fake: Path) -> None:
    done = launch("torchrun_multinode.sh", fake, CONFIG="run.yaml", NNODES="2", RDZV_ENDPOINT="node0")
    assert done.returncode != 0
    assert "RDZV_ENDPOINT: got 'node0', expected host:port" in done.stderr


def slurm_job(fake: Path, job: str, **environment: str) -> subprocess.CompletedProcess[str]:
    scheduler = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "head-7,other-8", "SLURM_JOB_NUM_NODES": "2"}
    return launch("slurm.sbatch", fake, CONFIG="run.yaml", **scheduler, **environment)


def slurm(fake: Path, job: str, **environment: str) -> list[str]:
    return arguments(slurm_job(fake, job, **environment))


def test_slurm_runs_torchrun_once_a_node(fake: Path) -> None:
    got = slurm(fake, "12345", SLURM_CPUS_PER_TASK="8")
    assert got[:3] == ["srun --ntasks-per-node=1", "srun --kill-on-bad-exit=1", "srun --cpus-per-task=8"]
    assert got[got.index("--nnodes") + 1] == "2"
    assert got[got.index("--rdzv-endpoint") + 1] == "head-7:22345"
    assert got[got.index("--rdzv-id") + 1] == "12345"
    train = [*TRAIN[:5], "--out", "runs/slurm-12345", *TRAIN[5:]]
    assert got[-len(train) :] == train
    assert slurm(fake, "12345", SLURM_RESTART_COUNT="0")[-len(train) :] == train
    assert slurm(fake, "12345", SLURM_RESTART_COUNT="1")[-len(train) - 1 :] == [*train, "--resume"]


@pytest.mark.parametrize(("code", "queued"), [(0, False), (1, False), (85, True)])
def test_slurm_queues_a_stopped_job_again(fake: Path, code: int, queued: bool) -> None:
    (fake / "srun").write_text(f"#!{BASH}\nexit {code}\n")
    answer = (
        """case "$1 $2" in "show job") echo JobState=RUNNING ;; show*) echo here ;; *) echo "scontrol $*" ;; esac"""
    )
    (fake / "scontrol").write_text(f"#!{BASH}\n{answer}\n")
    done = slurm_job(fake, "7")
    assert (done.returncode, done.stdout) == ((0, "scontrol requeue 7\n") if queued else (code, ""))


def test_slurm_gives_each_job_a_port_of_its_own(fake: Path) -> None:
    def port(job: str) -> int:
        got = slurm(fake, job)
        return int(got[got.index("--rdzv-endpoint") + 1].split(":")[1])

    ports = [port(job) for job in ("19999", "20000", "1234567")]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= each < 30_000 for each in ports)


# -- containers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads docker/compose.yaml")
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_compose_nodes_run_the_multinode_script(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"node0", "node1", "gpu0", "gpu1"}
    for name, service in compose["services"].items():
        assert service["hostname"] == name
        assert service["entrypoint"] == ["bash", "launch/torchrun_multinode.sh"]
        assert (ROOT / service["entrypoint"][1]).is_file()
        environment = service["environment"]
        # The first of the two is where they meet, the other starts after it.
        first = environment["RDZV_ENDPOINT"].split(":")[0]
        assert service.get("depends_on", [first]) == [first]
        assert re.fullmatch(r"(node|gpu)0:29500", environment["RDZV_ENDPOINT"])
        assert environment["CONFIG"] == Path(service["configs"][0]["target"]).name
        assert service.get("profiles") == (["gpu"] if name.startswith("gpu") else None)


def test_compose_run_is_a_valid_configuration(compose: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the configuration")
    from syncbn.train.config import config_from_dict

    config = config_from_dict(yaml.safe_load(compose["configs"]["run"]["content"]))
    environment = compose["services"]["node0"]["environment"]
    config.check_processes(environment["NNODES"] * environment["NPROC"])


def test_image_is_built_from_files_that_are_there() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.M)
    sources = [name for line in copied for name in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for name in sources:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, f".dockerignore leaves out {name}"


def test_image_ends_as_a_user_without_privileges() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.findall(r"^USER (\w+)$", dockerfile, re.M)[-1] == "syncbn"
    assert "-c pins.txt" in dockerfile
