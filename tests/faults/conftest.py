"""Fixtures of the tests that break things: small disks, and the distributed tests' pools of workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from pool import pools_by_size
from small_disks import SmallDisk

pools = pytest.fixture(pools_by_size, scope="session", name="pools")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], SmallDisk]]:
    """Mounts a disk of this many kilobytes until the test ends."""
    mounted: list[SmallDisk] = []

    def mount(kilobytes: int) -> SmallDisk:
        mounted.append(SmallDisk(tmp_path / f"disk{len(mounted)}", kilobytes))
        return mounted[-1]

    yield mount
    for disk in mounted:
        disk.remove()
