"""The binary copy of a slow source: read once, replaced when damaged, done without where it cannot be kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from syncbn.train.data import files as data_cache
from syncbn.train.data.files import cached


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "syncbn"


def some_arrays() -> tuple[Tensor, Tensor]:
    return torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.arange(6)


def read_twice(name: str = "set") -> int:
    """How often two ``cached`` calls read the source; both have to return it."""
    reads = []

    def read() -> tuple[Tensor, Tensor]:
        reads.append(1)
        return some_arrays()

    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(cached(name, read), some_arrays(), strict=True))
    return len(reads)


def test_cache_is_read_once_and_leaves_one_file(cache: Path) -> None:
    assert read_twice() == 1
    assert [path.name for path in cache.iterdir()] == ["set.npz"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _flip_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(bytes(range(24))) + 3] ^= 1
    path.write_bytes(content)


def _another_type(path: Path) -> None:
    np.savez(path, images=np.zeros((6, 1, 2, 2)), labels=np.arange(6))


def _no_labels(path: Path) -> None:
    np.savez(path, images=np.zeros((6, 1, 2, 2), np.uint8))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: np.save(path.open("wb"), np.arange(3)),
        _truncate,
        _flip_a_pixel,
        _another_type,
        _no_labels,
    ],
    ids=["empty", "text", "one_array", "truncated", "flipped", "other_type", "no_labels"],
)
def test_damaged_cache_is_replaced(cache: Path, damage: Callable[[Path], object]) -> None:
    read_twice()
    damage(cache / "set.npz")
    assert read_twice() == 1


def test_unwritable_cache_is_done_without(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert read_twice() == 2


def test_no_home_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(data_cache, "cache_folder", no_home)
    assert read_twice() == 2


def test_interrupted_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    assert read_twice() == 2
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("alone", "reads"), [(True, 1), (False, 4)])
def test_of_several_at_once_one_reads_alone(cache: Path, alone: bool, reads: int) -> None:
    together, begun = threading.Barrier(4), []

    def read() -> tuple[Tensor, Tensor]:
        begun.append(1)
        if alone:
            time.sleep(0.1)  # the others would begin as well
        else:
            together.wait(timeout=20)  # none of them has written a copy yet
        return some_arrays()

    def run(_: int) -> tuple[Tensor, Tensor]:
        together.wait(timeout=20)
        return cached("set", read, alone=alone)

    with ThreadPoolExecutor(4) as pool:
        for images, labels in pool.map(run, range(4)):
            assert torch.equal(images, some_arrays()[0])
            assert torch.equal(labels, some_arrays()[1])
    assert len(begun) == reads
    assert [path.name for path in cache.glob("*.npz")] == ["set.npz"]


@pytest.mark.parametrize("error", [OSError("read-only file system"), NotImplementedError("no flock")], ids=repr)
def test_a_folder_without_locks_is_read_without(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", fails)
    assert torch.equal(cached("set", some_arrays, alone=True)[0], some_arrays()[0])
