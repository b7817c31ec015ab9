"""Container images without a daemon, a registry or a kernel module: buildah in a chroot, on a base made on the spot."""

from __future__ import annotations

import ast
import configparser
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMANDS = ("buildah", "debootstrap")


class Buildah:
    """buildah with a storage of its own in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        # Without a driver that shares layers each step copies them, which takes minutes, but works everywhere.
        shares = self.try_run("--storage-driver", "overlay", "info").returncode == 0
        self._start += ["--storage-driver", "overlay" if shares else "vfs"]

    def try_run(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TMPDIR": str(self.folder), "BUILDAH_ISOLATION": "chroot"}
        return _run_group([*self._start, *words], environment, timeout)

    def __call__(self, *words: str, timeout: float = 120) -> str:
        """The output of a command, which has to succeed."""
        done = self.try_run(*words, timeout=timeout)
        assert done.returncode == 0, f"buildah {' '.join(words)}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout.strip()

    def configuration(self, image: str) -> dict[str, Any]:
        """What the Dockerfile says about how to run an image: its user, its entry point, its health check."""
        return json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]

    def remove(self) -> None:
        """Remove the folder, but not what a killed command has left mounted in it, such as /proc."""
        mounted = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in reversed(mounted):
            if path.is_relative_to(self.folder):
                subprocess.run(["umount", "--lazy", str(path)], timeout=30, check=True)
        shutil.rmtree(self.folder)


def _run_group(words: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command. If that takes too long or is interrupted, the processes that it started end too."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def make_base(buildah: Buildah, name: str) -> None:
    """An image of this machine's release of Debian or Ubuntu with its Python, and nothing else."""
    container = buildah("from", "scratch")
    root = buildah("mount", container)
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    words = ["debootstrap", "--variant=minbase", "--include=python3", suite, root]
    done = _run_group(words, dict(os.environ), timeout=600)
    if done.returncode:
        pytest.skip(f"debootstrap made no {suite}: {' '.join(done.stdout.splitlines()[-2:])} {done.stderr.strip()}")
    for package in Path(root, "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)


def machine_volumes(folder: Path) -> list[str]:
    """Options of a build that let its pip and apt use this machine's configuration, such as a mirror."""
    configuration, mounts = _pip_configuration()
    pip, apt = folder / "pip.conf", folder / "apt.conf"
    with pip.open("w") as file:
        configuration.write(file)
    dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=60, check=True).stdout
    # The other settings call this machine's programs.
    apt.write_text("".join(line for line in dumped.splitlines(True) if line.startswith("Acquire::")))
    mounts |= {pip: Path("/etc/pip.conf"), apt: Path("/etc/apt/apt.conf.d/99machine")}
    return [word for here, there in mounts.items() for word in ("--volume", f"{here}:{there}:ro")]


def _pip_configuration() -> tuple[configparser.RawConfigParser, dict[Path, Path]]:
    """pip's configuration on this machine, and by each path on this machine that it names, the path in a build."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    configuration = configparser.RawConfigParser()
    mounts: dict[Path, Path] = {}
    # The environment's options come last, as they count more.
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, text = line.partition("=")
        section, _, option = key.replace(":env:", "global").partition(".")
        words = ast.literal_eval(text).split()
        for index, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_file():  # elsewhere, as the build may install a file of this name
                mounts[path] = Path("/mnt") / path.name
                words[index] = str(mounts[path])
            elif path.is_absolute() and path.is_dir():  # an index has its files beside it
                folder = path.parent if word != str(path) else path
                mounts[folder] = folder
        if not configuration.has_section(section):
            configuration.add_section(section)
        configuration.set(section, option, "\n".join(words))
    return configuration, mounts
