"""The cache folder, and binary copies of data sets that are slow to read from their source."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a copy that is missing or damaged."""


def cache_folder() -> Path:
    """Folder for binary copies and downloads: ``$XDG_CACHE_HOME/syncbn``, else ``~/.cache/syncbn``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "syncbn"


def cached(name: str, read: Callable[[], tuple[Tensor, Tensor]], *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """The images and labels that ``read`` returns, from a binary copy in the cache folder if there is one.

    A copy that cannot be read or written is not an error; the set is then read from its source.

    Args:
        name: name of the copy; it has to change with what ``read`` returns.
        read: makes uint8 [n, C, H, W] and int64 [n], on the CPU.
        alone: let one process read and the others wait for its copy, for a ``read`` that uses the whole machine.
    """
    try:
        path = cache_folder() / f"{name}.npz"
    except RuntimeError:  # a user without a home
        return read()
    stored = _read_copy(path)
    if stored is not None:
        return stored
    with turn(path) if alone else nullcontext():
        stored = _read_copy(path) if alone else None  # written by the process before
        if stored is None:
            stored = read()
            with suppress(OSError):
                _write_copy(path, *stored)
    return stored


@contextmanager
def turn(path: Path) -> Iterator[bool]:
    """Wait for the lock that belongs to ``path``; yields False if its folder cannot hold one."""
    from filelock import FileLock  # torch depends on it

    lock = FileLock(path.with_name(f".{path.stem}.lock"))
    with suppress(OSError, NotImplementedError):  # a read-only folder, or a file system without locks
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            lock.release()


def _read_copy(path: Path) -> tuple[Tensor, Tensor] | None:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    except _DAMAGED:
        return None
    whole = images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.ndim == 4
    return (images, labels) if whole and len(images) == len(labels) else None


def _write_copy(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write under another name first: several processes may write the same copy."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, images=images.numpy(), labels=labels.numpy())
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
