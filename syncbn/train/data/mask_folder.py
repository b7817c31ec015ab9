"""Images and their masks in pairs of files: a folder of the user's, and torchvision's VOC and Cityscapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, require
from syncbn.train.data.datasets import IMAGENET
from syncbn.train.data.files import HELD_BYTES, turn
from syncbn.train.data.image_file import opened_image, rgb_image

Pair = tuple[str, str]
"""The files of an image and of its mask."""
KEY = "task.options.root"


class MaskReader(NamedTuple):
    """How the pixels of a pair of files become an image and its classes."""

    size: tuple[int, int]
    """Height and width."""
    num_classes: int
    ignored: int
    """Class number of the pixels that count nothing."""
    class_of: Sequence[int] | None = None
    """The class of each of the 256 numbers of a file; None: the numbers are the classes."""

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] and [H, W], resized bilinearly and to the nearest pixel.

        Raises:
            ConfigError: a file cannot be used; the error names it.
        """
        import numpy as np
        from PIL import Image

        image_file, mask_file = pair
        image, mask = rgb_image(image_file, KEY), opened_image(mask_file, KEY)
        one_channel = mask.mode in ("1", "L", "P", "I", "I;16")
        require(one_channel, KEY, mask_file, f"class numbers in one channel, not an image of mode {mask.mode}")
        same = "a mask as large as its image ({}x{}), not {}x{}".format(*image.size, *mask.size)
        require(image.size == mask.size, KEY, mask_file, same)
        sides = (self.size[1], self.size[0])  # Pillow has the width first
        pixels = np.array(image.resize(sides, Image.Resampling.BILINEAR))
        classes = torch.from_numpy(np.array(mask.resize(sides, Image.Resampling.NEAREST)).astype(np.int64))
        if self.class_of is not None:
            classes = torch.tensor(self.class_of)[classes]
        wrong = classes[(classes != self.ignored) & ((classes < 0) | (classes >= self.num_classes))].tolist()
        expected = f"class numbers from 0 to {self.num_classes - 1}, and {self.ignored} for ignored pixels"
        require(not wrong, KEY, mask_file, f"{expected}, not {wrong[0] if wrong else None}")
        return torch.from_numpy(pixels).permute(2, 0, 1), classes.to(torch.uint8)


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image, float32 (3, H, W), normalized as for ImageNet, and its classes, int64 (H, W).

    Pairs that fit into memory are read when the set is made, else when they are fetched.
    """

    def __init__(self, pairs: Sequence[Pair], reader: MaskReader) -> None:
        self.pairs, self._reader = list(pairs), reader
        height, width = reader.size
        held = len(self.pairs) * 4 * height * width <= HELD_BYTES
        self._read = [reader(pair) for pair in self.pairs] if held else None
        self._mean, self._std = (torch.tensor(x).mul(255).view(-1, 1, 1) for x in IMAGENET)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, classes = self._reader(self.pairs[index]) if self._read is None else self._read[index]
        return pixels.to(torch.float32).sub_(self._mean).div_(self._std), classes.to(torch.int64)


def folder_pairs(root: str, part: str) -> list[Pair]:
    """The files of ``root/part/images`` and ``root/part/masks``, paired by their names without endings.

    Raises:
        ConfigError: a folder is missing or empty, or a file has no partner.
    """
    files: dict[str, dict[str, Path]] = {}
    for kind in ("images", "masks"):
        folder = Path(root) / part / kind
        try:
            found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise ConfigError(KEY, folder, f"a folder that can be read ({error.strerror})") from error
        require(bool(found), KEY, folder, "a folder with files")
        files[kind] = {}
        for path in found:
            before = files[kind].setdefault(path.stem, path)
            require(before is path, KEY, path, f"one file of this name; {before.name} is another")
    for kind, other in (("images", "masks"), ("masks", "images")):
        for stem, path in files[kind].items():
            require(stem in files[other], KEY, path, f"a file of the same name in {part}/{other}")
    return [(str(path), str(files["masks"][stem])) for stem, path in files["images"].items()]


def voc_pairs(root: str, part: str) -> list[Pair]:
    """The pairs of VOC 2012's image set ``train`` or ``val``."""
    made = _listed(root, lambda sets: sets.VOCSegmentation(root, year="2012", image_set=part))
    return list(zip(made.images, made.masks, strict=True))


def cityscapes_pairs(root: str, part: str) -> list[Pair]:
    """The pairs of Cityscapes' fine annotations, ``train`` or ``val``."""
    made = _listed(root, lambda sets: sets.Cityscapes(root, split=part, target_type="semantic"))
    return sorted((image, masks[0]) for image, masks in zip(made.images, made.targets, strict=True))


def cityscapes_classes() -> list[int]:
    """The training class of each of the 256 label numbers of a file; 255 for those that are not trained."""
    table = [255] * 256
    for kind in import_torchvision().datasets.Cityscapes.classes:
        if 0 <= kind.train_id < 255:
            table[kind.id] = kind.train_id
    return table


def _listed(root: str, make: Callable[[Any], Any]) -> Any:
    datasets = import_torchvision().datasets
    require(Path(root).is_dir(), KEY, Path(root), "a folder")
    try:
        with turn(Path(root) / "archives"):  # one process unpacks Cityscapes' archives, the others wait for it
            return make(datasets)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(KEY, Path(root), f"a folder with the files that torchvision expects ({reason})") from error
