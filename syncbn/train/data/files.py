"""Folders of images, decoded once and held in memory if they fit, else decoded when they are fetched.

Random-area crops need the original file in each epoch, so a folder with such crops is never held.
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
from syncbn.train.checks import ConfigError
from syncbn.train.data.augment import AreaCrop
from syncbn.train.data.cache import cached

HELD_BYTES = 2 * 2**30
"""Most bytes of uint8 training and test images that are held: 699,050 images of 32 pixels a side, 14,266 of 224."""
DECODING = 1
"""Version of `_decode_file`; raise it when its result changes, so that old copies in the cache are not used."""
_CHUNK = 64  # images a thread decodes at a time
# Pillow decodes without the interpreter's lock, but the other work per file holds it. Below this average size, such as
# CIFAR's JPEGs, several threads are slower than one.
_SMALL_FILE = 8192  # bytes


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


Cut = CentreCut | AreaCrop
"""From a file's PIL image, an epoch and an index to the image that is used."""


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


Part = tuple[Tensor | Decoder, Tensor]
"""Images, uint8 [n, 3, H, W] or a decoder, and labels, int64 [n]."""


def read_image_folder(root: str, size: int, area_seed: int | None = None) -> tuple[Part, Part, int]:
    """Training part, test part and number of classes of ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``val``).

    Without ``area_seed``, an image's shorter side is resized to ``size`` and its middle is kept. If the images fit into
    `HELD_BYTES` they are decoded now, and copied to the cache folder under a name that depends on the files' names,
    sizes and times, on ``size`` and on `DECODING`.

    With ``area_seed``, the run's seed, training images are cut by `AreaCrop`. A test image's shorter side is resized to
    256/224 of ``size`` before its middle is kept (Goyal et al. 2017, arXiv 1706.02677, section 5.1, with the numbers of
    github.com/facebookarchive/fb.resnet.torch). Images are decoded when they are fetched.

    Raises:
        ConfigError: a missing folder, classes that differ, or (also later, from a `Decoder`) a damaged file.
        ImportError: torchvision is not installed.
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
    """torchvision's training and test folders, sorted by name."""
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
    except OSError as error:  # a broken link
        raise _unreadable(path, error) from error


def _fingerprint(folder: str, paths: Sequence[str], statuses: Sequence[os.stat_result]) -> str:
    """Hex digits that depend on the files' names within the folder (and so their labels), sizes and times."""
    digest = hashlib.blake2b(digest_size=16)
    for path, status in zip(paths, statuses, strict=True):
        digest.update(os.fsencode(f"{path.removeprefix(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


def _decode_all(paths: Sequence[str], cut: CentreCut, threads: int) -> Tensor:
    """uint8 [n, 3, H, W] of all files. Of several damaged files, the error names the first one."""
    images = torch.empty(len(paths), 3, cut.size, cut.size, dtype=torch.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(paths))):
            images[i] = _decode_file(paths[i], cut)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(paths), _CHUNK)):
            pass  # raises a chunk's error and drops the chunks that have not started
    return images


def _decode_file(path: str, cut: Cut, epoch: int = 0, index: int = 0) -> Tensor:
    """uint8 [3, H, W]: ``cut`` of a file's image."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow's errors for a damaged file depend on the format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return torch.from_numpy(np.array(cut(image, epoch, index))).permute(2, 0, 1)


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError("data.root", path, f"an image that can be read ({error})")
