"""Folders of images: decoded once and held as uint8 where they fit, else decoded when they are asked for.

Decoding reads a file and cuts an image of the size that is used out of it. A cut that is drawn anew in each epoch needs
the original each time, so a folder with such a cut is never held.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError
from syncbn.train.data.augment import AreaCrop
from syncbn.train.data.cache import cached

HELD_BYTES = 2 * 2**30
"""A folder is held in memory if its training and test images take at most this much as uint8 at the size they are used
at: 699,050 images of 32 pixels a side, 14,266 of 224."""
DECODING = 1
"""Version of what `_decode_file` makes of a file: raise it when that changes, so that old copies are not used."""
_CHUNK = 64  # images a thread decodes at a time
# Pillow decodes without the interpreter's lock, but the rest of the work on a file holds it. Where files are smaller
# than this on average, threads mostly pass the lock around: CIFAR's JPEGs take longer with several than with one.
_SMALL_FILE = 8192  # bytes


@dataclass(frozen=True)
class CentreCut:
    """The middle of an image whose shorter side is resized, bilinearly: the same at any epoch and index."""

    size: int
    """Side in pixels of what comes out."""
    shorter_side: int
    """Pixels of the shorter side before the middle is cut out."""

    def __call__(self, image: Any, epoch: int = 0, index: int = 0) -> Any:
        """Cut a PIL image of any size: a PIL image of ``size`` by ``size``."""
        if image.size == (self.size, self.size) and self.shorter_side == self.size:
            return image
        functional = import_torchvision("transforms.v2.functional")
        return functional.center_crop(functional.resize(image, [self.shorter_side]), [self.size])


Cut = CentreCut | AreaCrop
"""Makes an image of the size that is used, of a file's and the epoch and index that it is seen at."""


@dataclass(frozen=True)
class Decoder:
    """Images that are read from their files each time they are asked for."""

    paths: Sequence[str]
    """A file for each image."""
    cut: Cut
    """What is used of it."""

    def __call__(self, epochs: Tensor, indices: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] of int64 [n] epochs and indices, all on the CPU; n may be 0.

        Raises:
            ConfigError: a file that is no image.
        """
        images = torch.empty(len(indices), 3, self.cut.size, self.cut.size, dtype=torch.uint8)
        for image, epoch, index in zip(images, epochs.tolist(), indices.tolist(), strict=True):
            image.copy_(_decode_file(self.paths[index], self.cut, epoch, index))
        return images

    def subset(self, indices: Tensor) -> Decoder:
        """The images at ``indices`` (int64 [m]), which are then numbered from 0 to m - 1, for the cut too."""
        return replace(self, paths=[self.paths[index] for index in indices.tolist()])


Part = tuple[Tensor | Decoder, Tensor]
"""Images, uint8 [n, 3, H, W] or what decodes them, and labels, int64 [n]."""


def read_image_folder(root: str, size: int, area_seed: int | None = None) -> tuple[Part, Part, int]:
    """The images in ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``root/val``), ``size`` pixels a side.

    Without ``area_seed`` an image's shorter side is resized to ``size`` and its middle is kept. What fits into
    `HELD_BYTES` is then decoded now, and a binary copy goes to the cache folder under a name that changes with the
    files' names, sizes and times of modification, with ``size`` and with `DECODING`.

    With it, as is usual with ImageNet, a training image is an `AreaCrop`, and a test image's shorter side is resized to
    256/224 of ``size`` before its middle is kept (Goyal et al. 2017, arXiv 1706.02677, section 5.1; the numbers are
    those of the code that they follow, github.com/facebookarchive/fb.resnet.torch). All images are decoded when they
    are asked for.

    Args:
        root: the folder.
        size: side of an image in pixels.
        area_seed: the run's seed, for random-area crops of the training images; None for no such crops.

    Returns:
        The training part, the test part, and the number of classes.

    Raises:
        ConfigError: a missing folder, classes that differ, or (also later, from a `Decoder`) a file that is no image.
        ImportError: torchvision is not installed; names the extra.
    """
    train, test = _list_folder(root)
    num_classes = len(train.classes)
    if area_seed is not None:
        crop, centre = AreaCrop(size, area_seed), CentreCut(size, round(size * 256 / 224))
        return _on_demand(train, crop), _on_demand(test, centre), num_classes
    centre = CentreCut(size, size)
    held = (len(train.samples) + len(test.samples)) * 3 * size * size <= HELD_BYTES
    read = _held if held else _on_demand
    return read(train, centre), read(test, centre), num_classes


def _list_folder(root: str) -> tuple[Any, Any]:
    """torchvision's listing of both parts, in an order that depends on the names alone."""
    test_name = "test" if (Path(root) / "test").is_dir() else "val"
    read = import_torchvision().datasets.ImageFolder
    sets = {}
    for part in ("train", test_name):
        try:
            sets[part] = read(Path(root) / part)
        except OSError as error:
            raise ConfigError(
                "data.root", root, f"a folder with images in train/CLASS/ and test/CLASS/ or val/CLASS/ ({error})"
            ) from error
    train, test = sets["train"], sets[test_name]
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            "data.root", root, f"the same classes in train and {test_name} (in only one: {', '.join(differing)})"
        )
    return train, test


def _files(dataset: Any) -> tuple[list[str], Tensor]:
    return [path for path, _ in dataset.samples], torch.tensor([label for _, label in dataset.samples])


def _on_demand(dataset: Any, cut: Cut) -> Part:
    paths, labels = _files(dataset)
    return Decoder(paths, cut), labels


def _held(dataset: Any, cut: CentreCut) -> Part:
    paths, labels = _files(dataset)
    statuses = [_status(path) for path in paths]
    name = f"imagefolder-{DECODING}-{cut.size}-{_fingerprint(str(dataset.root), paths, statuses)}"
    small = sum(status.st_size for status in statuses) < _SMALL_FILE * len(paths)
    threads = 1 if small else min(16, os.cpu_count() or 1)
    return cached(name, lambda: (_decode_all(paths, cut, threads), labels), alone=True)


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:  # such as a link to nothing
        raise _unreadable(path, error) from error


def _fingerprint(folder: str, paths: Sequence[str], statuses: Sequence[os.stat_result]) -> str:
    """Hex digits that change with the files' names within the folder (and so with their labels), sizes and times."""
    digest = hashlib.blake2b(digest_size=16)
    for path, status in zip(paths, statuses, strict=True):
        digest.update(os.fsencode(f"{path.removeprefix(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


def _decode_all(paths: Sequence[str], cut: CentreCut, threads: int) -> Tensor:
    """uint8 [n, 3, H, W] of all files. Of several that cannot be read, the first in order is named."""
    images = torch.empty(len(paths), 3, cut.size, cut.size, dtype=torch.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(paths))):
            images[i] = _decode_file(paths[i], cut)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(paths), _CHUNK)):
            pass  # an error is raised here, and the chunks not begun are dropped
    return images


def _decode_file(path: str, cut: Cut, epoch: int = 0, index: int = 0) -> Tensor:
    """uint8 [3, H, W] of the image that ``cut`` makes of a file's."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow reports damage by any of these, depending on the format and on the place.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return torch.from_numpy(np.array(cut(image, epoch, index))).permute(2, 0, 1)


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError("data.root", path, f"an image that can be read ({error})")
