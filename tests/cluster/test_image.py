"""The container image: docker/Dockerfile is built, and what it is for is done in it, by users without privileges.

The base image has no torch and no CUDA: pip installs the torch that it finds first, a build for the CPU or for CUDA.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from container_image import COMMANDS, Buildah, machine_volumes, make_base

import syncbn

ROOT = Path(__file__).resolve().parents[2]
BASE, IMAGE = "localhost/base", "localhost/syncbn"
MISSING = [command for command in COMMANDS if shutil.which(command) is None]
SMALL_RUN = [
    *("--gpus", "2", "--per_gpu_batch_size", "4", "--data.name", "synthetic", "--data.synthetic_samples", "64"),
    *("--model.name", "convnet", "--model.width", "8", "--norm.name", "sync"),
]

pytestmark = [
    pytest.mark.slow,  # it downloads and installs torch and its friends
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can build an image on a base of its own"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


class Container:
    """A container of the image, which all tests share: they change nothing in it but /workspace/runs and /tmp."""

    def __init__(self, buildah: Buildah) -> None:
        self._buildah = buildah
        self.configuration: dict[str, Any] = buildah.configuration(IMAGE)
        self._name = buildah("from", IMAGE)

    def try_run(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self._buildah.try_run("run", *options, self._name, "--", *command, timeout=900)

    def run(self, *command: str, options: tuple[str, ...] = ()) -> str:
        done = self.try_run(*command, options=options)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def syncbn(self, *arguments: str) -> str:
        return self.run(*self.configuration["Entrypoint"], *arguments)


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    buildah = Buildah(tmp_path_factory.mktemp("buildah"))
    try:
        make_base(buildah, BASE)
        # The OCI format, which is buildah's default, has no health check.
        form = ["--format", "docker", "--file", str(ROOT / "docker" / "Dockerfile"), "--build-arg", f"BASE={BASE}"]
        buildah("build", *form, *machine_volumes(buildah.folder), "--tag", IMAGE, str(ROOT), timeout=2000)
        yield Container(buildah)
    finally:
        buildah.remove()


def test_the_command_is_the_entry_point(container: Container) -> None:
    assert container.syncbn("--version") == f"{syncbn.__version__}\n"
    assert "study run" in container.syncbn(*container.configuration["Cmd"])


def test_the_user_has_a_name_and_no_privileges(container: Container) -> None:
    assert container.configuration["User"] == "syncbn"
    assert container.run("id", "-un") == "syncbn\n"
    assert container.try_run("touch", "/opt/syncbn/bin/new").returncode != 0


def test_two_processes_train_as_one_does(container: Container) -> None:
    said = container.syncbn("parity", "--processes", "1,2", "--steps", "3", *SMALL_RUN)
    assert said.splitlines()[-1].endswith("same (tolerance 1e-10)")


def test_the_compiled_kernels_are_used(container: Container) -> None:
    name = (
        "from syncbn.kernels.dispatch import cpu; kernels = cpu(); print(kernels.name, kernels.batch_norm is not None)"
    )
    assert container.run("python", "-c", name) == "cpu True\n"


def test_there_is_a_compiler_only_for_triton(container: Container) -> None:
    if container.try_run("python", "-c", "import triton").returncode:
        compilers = ("cc", "c++", "gcc", "g++", "clang")
        assert not [name for name in compilers if not container.try_run("which", name).returncode]
    else:
        include = container.run("python", "-c", "import sysconfig; print(sysconfig.get_path('include'))").strip()
        container.run("g++", f"-I{include}", "-x", "c++", "-fsyntax-only", f"{include}/Python.h")


def test_nothing_is_left_of_the_build(container: Container) -> None:
    """But the places of the volumes, which are empty."""
    root = ("--user", "root")
    files = [
        "find",
        "/opt",
        "/mnt",
        "-path",
        "/opt/syncbn",
        "-prune",
        "-print",
        "-o",
        "-type",
        "f",
        "-size",
        "+0",
        "-print",
    ]
    assert container.run(*files, options=root).split() == ["/opt/syncbn"]
    assert container.try_run("sh", "-c", "test -e ~root/.cache", options=root).returncode == 1
    assert {line.split("==")[0] for line in container.run("pip", "freeze").splitlines()} >= {"torch", "torchvision"}


def test_any_user_runs_the_nodes_of_the_compose_file(container: Container, tmp_path: Path) -> None:
    """One node, with two processes, instead of two: here all containers share one network."""
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    node = compose["services"]["node0"]
    (tmp_path / "run.yaml").write_text(compose["configs"]["run"]["content"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    changed = {"NNODES": 1, "NPROC": 2, "RDZV_ENDPOINT": endpoint}
    environment = [
        word for key, value in (node["environment"] | changed).items() for word in ("--env", f"{key}={value}")
    ]
    mount = f"{tmp_path / 'run.yaml'}:{node['configs'][0]['target']}:ro"
    # Compose's nodes can look up their own names.
    options = ("--user", "12345:12345", "--hostname", "localhost", "--volume", mount, *environment)
    said = container.run(*node["entrypoint"], "--out", "runs/any", options=options)
    assert "everything is in runs/any" in said
    assert container.run("stat", "--format", "%u", "runs/any/result.json") == "12345\n"


def test_the_health_check_tells_whether_torch_can_be_loaded(container: Container, tmp_path: Path) -> None:
    how, *command = container.configuration["Healthcheck"]["Test"]
    assert how == "CMD"
    container.run(*command)
    tmp_path.chmod(0o755)
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda.so.1')\n")
    broken = ("--volume", f"{tmp_path}:/broken:ro", "--env", "PYTHONPATH=/broken")
    assert container.try_run(*command, options=broken).returncode == 1
