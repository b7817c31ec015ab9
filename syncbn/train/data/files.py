"""Folders of images, and the cache folder with binary copies of data sets that are slow to read from their source.

A folder is decoded once and held in memory if it fits, else its images are decoded when they are fetched. Random-area
crops need the original file in each epoch, so a folder with such crops is never held.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, require
from syncbn.train.data.augment import AreaCrop
from syncbn.train.data.image_file import rgb_image
from syncbn.train.result import replacing

HELD_BYTES = 2 * 2**30
"""Most bytes of uint8 training and test images that are held: 699,050 images of 32 pixels a side, 14,266 of 224."""
DECODING = 2
"""Version of `_decode_file`; raise it when its result changes, so that old copies are not used."""
_KEY = "data.root"
_CHUNK = 64  # images a thread decodes at a time
_SMALL_FILE = 8192  # bytes; below this average, threads are slower than one, as only the decoding runs in parallel


@dataclass(frozen=True)
class CentreCut:
    """Cuts the middle, ``size`` by ``size`` pixels, out of a PIL image resized to ``shorter_side``."""

    size: int
    shorter_side: int

    def __call__(self, image: Any, epoch: int = 0, index: int = 0) -> Any:
        if image.size == (self.size, self.size) and self.shorter_side == self.size:
            return image
        functional = import_torchvision("transforms.v2.functional")
        return functional.center_crop(functional.resize(image, [self.shorter_side]), [self.size])


Cut = CentreCut | AreaCrop  # from a file's PIL image, an epoch and an index to the image that is used


@dataclass(frozen=True)
class Decoder:
    """Images that are read from their files each time they are fetched."""

    paths: Sequence[str]
    cut: Cut

    def __call__(self, epochs: Tensor, indices: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] of int64 [n] epochs and indices, on the CPU. Raises ConfigError for a damaged file."""
        images = torch.empty(len(indices), 3, self.cut.size, self.cut.size, dtype=torch.uint8)
        for image, epoch, index in zip(images, epochs.tolist(), indices.tolist(), strict=True):
            image.copy_(_decode_file(self.paths[index], self.cut, epoch, index))
        return images

    def subset(self, indices: Tensor) -> Decoder:
        """The images at ``indices`` (int64 [m]), renumbered from 0, for the cut too."""
        return replace(self, paths=[self.paths[index] for index in indices.tolist()])


Part = tuple[Tensor | Decoder, Tensor]  # images, uint8 [n, 3, H, W] or a decoder, and labels, int64 [n]


def read_image_folder(root: str, size: int, area_seed: int | None = None) -> tuple[Part, Part, int]:
    """Training part, test part and number of classes of ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``val``).

    Without ``area_seed``, an image's shorter side is resized to ``size`` and its middle is kept. Images that fit into
    `HELD_BYTES` are decoded now, and copied to the cache folder under a name that depends on the files' names, sizes
    and times, on ``size`` and on `DECODING`.

    With ``area_seed``, the run's seed, training images are cut by `AreaCrop`. A test image's shorter side is resized to
    256/224 of ``size`` before its middle is kept (Goyal et al. 2017, arXiv 1706.02677, section 5.1, with the numbers of
    github.com/facebookarchive/fb.resnet.torch). Images are decoded when they are fetched.

    Raises:
        ConfigError: a missing folder, classes that differ, or (also later, from a `Decoder`) a damaged file.
        ImportError: torchvision is not installed.
    """
    test_name = "test" if (Path(root) / "test").is_dir() else "val"
    list_folder = import_torchvision().datasets.ImageFolder
    try:
        train, test = (list_folder(Path(root) / part) for part in ("train", test_name))
    except OSError as error:
        expected = f"a folder with images in train/CLASS/ and test/CLASS/ or val/CLASS/ ({error})"
        raise ConfigError(_KEY, Path(root), expected) from error
    for part in (train, test):
        _check_links(part)
    differing = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
    expected = f"the same classes in train and {test_name} (in only one: {differing})"
    require(not differing, _KEY, Path(root), expected)
    if area_seed is not None:
        in_train = _read(train, AreaCrop(size, area_seed), held=False)
        in_test = _read(test, CentreCut(size, round(size * 256 / 224)), held=False)
    else:
        held = (len(train.samples) + len(test.samples)) * 3 * size * size <= HELD_BYTES
        in_train, in_test = (_read(part, CentreCut(size, size), held) for part in (train, test))
    return in_train, in_test, len(train.classes)


def _check_links(folder: Any) -> None:
    """Raise ConfigError if a link makes a folder's files count twice, as one to a folder above it does many times."""
    seen: dict[str, str] = {}
    for directory in dict.fromkeys(os.path.dirname(path) for path, _ in folder.samples):
        before = seen.setdefault(os.path.realpath(directory), directory)
        require(before == directory, _KEY, Path(directory), f"a folder of its own; it is a link to {before}")


def _read(folder: Any, cut: Cut, held: bool) -> Part:
    paths, labels = [path for path, _ in folder.samples], torch.tensor(folder.targets)
    if not held:
        return Decoder(paths, cut), labels
    # The files' names within the folder (and so their labels), sizes and times.
    digest, total = hashlib.blake2b(digest_size=16), 0
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:  # a broken link
            raise ConfigError(_KEY, Path(path), f"an image that can be read ({error})") from error
        digest.update(os.fsencode(f"{path.removeprefix(str(folder.root))}\0{status.st_size}\0{status.st_mtime_ns}\0"))
        total += status.st_size
    threads = 1 if total < _SMALL_FILE * len(paths) else min(16, os.cpu_count() or 1)
    name = f"imagefolder-{DECODING}-{cut.size}-{digest.hexdigest()}"
    return cached(name, lambda: (_decode_all(paths, cut, threads), labels), alone=True)


def _decode_all(paths: Sequence[str], cut: Cut, threads: int) -> Tensor:
    """uint8 [n, 3, H, W] of all files. Of several damaged files, the error names the first one."""
    images = torch.empty(len(paths), 3, cut.size, cut.size, dtype=torch.uint8)

    def fill(start: int) -> None:
        for i, path in enumerate(paths[start : start + _CHUNK], start):
            images[i] = _decode_file(path, cut)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(paths), _CHUNK)):
            pass  # raises a chunk's error and drops the chunks that have not started
    return images


def _decode_file(path: str, cut: Cut, epoch: int = 0, index: int = 0) -> Tensor:
    """uint8 [3, H, W]: ``cut`` of a file's image."""
    import numpy as np

    return torch.from_numpy(np.array(cut(rgb_image(path, _KEY), epoch, index))).permute(2, 0, 1)


# ---- the cache


def cache_folder() -> Path:
    """Folder for binary copies and downloads: ``$XDG_CACHE_HOME/syncbn``, else ``~/.cache/syncbn``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "syncbn"


def cached(name: str, read: Callable[[], tuple[Tensor, Tensor]], *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """The images and labels that ``read`` returns, from a binary copy in the cache folder if there is one.

    A copy that cannot be read or written is not an error; the set is then read from its source. The copy's ``name`` has
    to change with what ``read`` returns. ``alone`` lets one process read and the others wait for its copy, for a
    ``read`` that uses the whole machine.
    """
    import numpy as np

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
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as unfinished, unfinished.open("wb") as file:
                    np.savez(file, images=stored[0].numpy(), labels=stored[1].numpy())
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
    # What numpy raises for a copy that is missing or damaged.
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None
    whole = images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.ndim == 4
    return (images, labels) if whole and len(images) == len(labels) else None
