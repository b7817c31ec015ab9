"""Disks of a few pages, for tests of what happens when one is full: tmpfs, which only root may mount."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of its own at ``path``."""

    def __init__(self, path: Path, kilobytes: int) -> None:
        self.path = path
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    def change(self, option: str) -> None:
        """Make it larger (``size=8m``) or read-only (``ro``)."""
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], timeout=30, check=True)

    def remove(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], timeout=30, check=True)
