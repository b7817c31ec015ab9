"""Folders of images: decoded once and held as uint8 where they fit, else decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError
from syncbn.train.data_cache import cached

HELD_BYTES = 2 * 2**30
"""A folder is held in memory if its training and test images take at most this much as uint8 at the size they are used
at: 699,050 images of 32 pixels a side, 14,266 of 224."""
DECODING = 1
"""Version of what `_decode_file` makes of a file: raise it when that changes, so that old copies are not used."""
_CHUNK = 64  # images a thread decodes at a time
# Pillow decodes without the interpreter's lock, but the rest of the work on a file holds it. Where files are smaller
# than this on average, threads mostly pass the lock around: CIFAR's JPEGs take longer with several than with one.
_SMALL_FILE = 8192  # bytes

Decoder = Callable[[Tensor], Tensor]
"""int64 [n] indices -> uint8 [n, C, H, W], both on the CPU."""
Part = tuple[Tensor | Decoder, Tensor]
"""Images, uint8 [n, 3, H, W] or a function that decodes them, and labels, int64 [n]."""


def read_image_folder(root: str, size: int) -> tuple[Part, Part, int]:
    """The images in ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``root/val``), ``size`` pixels a side.

    What fits into `HELD_BYTES` is decoded now, and a binary copy goes to the cache folder under a
    name that changes with the files' names, sizes and times of modification, with ``size`` and with `DECODING`.

    Returns:
        The training part, the test part, and the number of classes.

    Raises:
        ConfigError: a missing folder, classes that differ, or (also later, from a `Decoder`) a file that is no image.
        ImportError: torchvision is not installed; names the extra.
    """
    train, test = _list_folder(root)
    held = (len(train.samples) + len(test.samples)) * 3 * size * size <= HELD_BYTES
    read = _held if held else _on_demand
    return read(train, size), read(test, size), len(train.classes)


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


def _on_demand(dataset: Any, size: int) -> Part:
    paths, labels = _files(dataset)
    return partial(_decode, paths, size), labels


def _held(dataset: Any, size: int) -> Part:
    paths, labels = _files(dataset)
    statuses = [_status(path) for path in paths]
    name = f"imagefolder-{DECODING}-{size}-{_fingerprint(str(dataset.root), paths, statuses)}"
    small = sum(status.st_size for status in statuses) < _SMALL_FILE * len(paths)
    threads = 1 if small else min(16, os.cpu_count() or 1)
    return cached(name, lambda: (_decode_all(paths, size, threads), labels), alone=True)


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


def _decode_all(paths: Sequence[str], size: int, threads: int) -> Tensor:
    """uint8 [n, 3, size, size] of all files. Of several that cannot be read, the first in order is named."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(paths))):
            images[i] = _decode_file(paths[i], size)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(paths), _CHUNK)):
            pass  # an error is raised here, and the chunks not begun are dropped
    return images


def _decode(paths: Sequence[str], size: int, indices: Tensor) -> Tensor:
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    for image, index in zip(images, indices.tolist(), strict=True):
        image.copy_(_decode_file(paths[index], size))
    return images


def _decode_file(path: str, size: int) -> Tensor:
    """uint8 [3, size, size]: the shorter side is resized to ``size``, and the middle is kept."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow reports damage by any of these, depending on the format and on the place.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if image.size != (size, size):
        functional = import_torchvision("transforms.v2.functional")
        image = functional.center_crop(functional.resize(image, [size]), [size])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError("data.root", path, f"an image that can be read ({error})")
