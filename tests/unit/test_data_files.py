"""Data sets on disk: the binary copy of a slow source, downloads, folders of images."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train import data
from syncbn.train.config import ConfigError, DataConfig
from syncbn.train.data import batch_loader, cached, load_data


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "syncbn"


# ---- cache


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

    monkeypatch.setattr(data, "cache_folder", no_home)
    assert read_twice() == 2


def test_interrupted_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    assert read_twice() == 2
    assert list(cache.iterdir()) == []


# ---- downloads


class FakeCIFAR:
    """What is used of torchvision's class: a set that is there, or is brought by ``download``."""

    downloads = 0
    fails: Exception | None = None

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        marker = Path(root) / "brought"
        if not marker.exists():
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            if FakeCIFAR.fails is not None:
                raise FakeCIFAR.fails
            with pytest.raises(TimeoutError):  # another process would wait
                FileLock(Path(root) / ".cifar10.lock", is_singleton=False).acquire(timeout=0)
            FakeCIFAR.downloads += 1
            marker.touch()
        samples = 30 if train else 20
        self.data = np.arange(samples * 32 * 32 * 3).astype(np.uint8).reshape(samples, 32, 32, 3)
        self.targets = [i % 10 for i in range(samples)]


@pytest.fixture
def fake_cifar(monkeypatch: pytest.MonkeyPatch) -> type[FakeCIFAR]:
    monkeypatch.setattr(import_torchvision().datasets, "CIFAR10", FakeCIFAR)
    monkeypatch.setattr(FakeCIFAR, "downloads", 0)
    monkeypatch.setattr(FakeCIFAR, "fails", None)
    return FakeCIFAR


@pytest.mark.parametrize("rooted", [True, False], ids=["root", "cache"])
def test_download_happens_once(fake_cifar: type[FakeCIFAR], cache: Path, tmp_path: Path, rooted: bool) -> None:
    root = tmp_path / "new" / "folder" if rooted else cache
    config = DataConfig(name="cifar10", root=str(root) if rooted else None)
    made = load_data(config, seed=0)
    load_data(config, seed=0)
    assert fake_cifar.downloads == 1
    assert (root / "brought").exists()
    assert (len(made.train), len(made.test), made.num_classes, made.shape) == (30, 20, 10, (3, 32, 32))
    images, labels = made.test.__getitems__([(0, 13)])
    pixels = images * torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    pixels += torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    expected = np.arange(13 * 3072, 14 * 3072).astype(np.uint8).reshape(32, 32, 3)
    assert np.array_equal(pixels[0].permute(1, 2, 0).mul(255).round().numpy(), expected)
    assert labels.tolist() == [3]


@pytest.mark.parametrize(
    "failure",
    [
        OSError("<urlopen error no route to host>"),
        RuntimeError("Error downloading x:\nTried y, got:\n<no route to host>"),
    ],
    ids=["os_error", "runtime_error"],
)
def test_failed_download_is_one_line_naming_the_root(
    fake_cifar: type[FakeCIFAR], tmp_path: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cifar, "fails", failure)
    with pytest.raises(ConfigError, match=r"^data.root: .*cifar10.*no route to host") as caught:
        load_data(DataConfig(name="cifar10", root=str(tmp_path)), seed=0)
    assert caught.value.value == str(tmp_path)
    assert "\n" not in str(caught.value)
    FileLock(tmp_path / ".cifar10.lock", is_singleton=False).acquire(timeout=0)  # given back


def test_a_folder_that_cannot_be_written_is_read(
    fake_cifar: type[FakeCIFAR], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*arguments: Any, **options: Any) -> Any:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(FileLock, "acquire", read_only)
    with pytest.raises(ConfigError, match=r"^data\.root"):
        load_data(DataConfig(name="cifar10", root=str(tmp_path)), seed=0)
    (tmp_path / "brought").touch()
    assert len(load_data(DataConfig(name="cifar10", root=str(tmp_path)), seed=0).train) == 30
    assert fake_cifar.downloads == 0


def test_fashion_mnist_files_are_read_by_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, samples in (("train", 20), ("t10k", 10)):
        pixels = np.random.default_rng(samples).integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        header = struct.pack(">HBB3I", 0, 8, 3, samples, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(samples, dtype=np.uint8) % 10
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, samples) + labels.tobytes())
    made = load_data(DataConfig(name="fashion_mnist", root=str(tmp_path)), seed=0)
    assert (len(made.train), len(made.test), made.num_classes, made.shape) == (20, 10, 10, (1, 28, 28))
    images, labels = made.test.__getitems__([(0, 3)])
    expected = np.random.default_rng(10).integers(0, 256, (10, 28, 28), dtype=np.uint8)[3]
    assert np.array_equal(((images[0, 0] * 0.3530 + 0.2860) * 255).round().numpy(), expected)
    assert labels.dtype == torch.int64


# ---- folders of images

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of one colour each, of several sizes: 4 training images and 2 test images a class."""
    for (part, samples), (name, colour) in itertools.product((("train", 4), ("test", 2)), COLOURS.items()):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(samples):
            Image.new("RGB", (20 + i, 30 - i), colour).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def from_folder(folder: Path, **options: Any) -> data.Data:
    return load_data(DataConfig(name="imagefolder", root=str(folder), image_size=16, **options), seed=0)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_image_folder(folder: Path, test_name: str) -> None:
    (folder / "test").rename(folder / test_name)
    made = from_folder(folder)
    assert (len(made.train), len(made.test), made.num_classes, made.shape) == (12, 6, 3, (3, 16, 16))
    images, labels = made.test.__getitems__([(0, 0), (0, 3), (0, 5)])
    assert labels.tolist() == [0, 1, 2]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, colour in zip(images, COLOURS.values(), strict=True):
        expected = (torch.tensor(colour) / 255 - mean) / std
        assert torch.allclose(image, expected.view(3, 1, 1).expand(3, 16, 16), atol=1e-5)


def test_image_folder_keeps_the_middle_in_proportion(folder: Path) -> None:
    picture = Image.new("RGB", (64, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 16, 32))  # the left quarter, all of which is cut off
    picture.save(folder / "test" / "red" / "0.png")
    images, _ = from_folder(folder).test.__getitems__([(0, 4)])
    assert (images[0, 0, :, 1:] > 2).all()


def test_grey_and_transparent_images_become_rgb(folder: Path) -> None:
    for i, mode in enumerate(("L", "RGBA", "P", "1")):
        Image.new(mode, (20, 20)).save(folder / "train" / "blue" / f"{i}.png")
    images, _ = from_folder(folder).train.__getitems__([(0, i) for i in range(4)])
    assert images.shape == (4, 3, 16, 16)
    assert (images < -1).all()  # black


def test_image_folder_is_decoded_when_asked_for(folder: Path) -> None:
    (folder / "train" / "blue" / "1.png").write_bytes(b"no image")
    made = from_folder(folder)
    made.train.__getitems__([(0, 0), (0, 2)])
    with pytest.raises(ConfigError, match=r"1\.png"):
        made.train.__getitems__([(0, 1)])


def test_image_folder_does_not_depend_on_workers(folder: Path) -> None:
    train = from_folder(folder, augment="crop_flip", train_samples=9).train
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    batches = [[(1, 8), (1, 0)], [], [(1, i) for i in range(1, 8)]]
    none, two = (list(batch_loader(train, batches, workers)) for workers in (0, 2))
    assert [len(labels) for _, labels in two] == [2, 0, 7]
    for (images, labels), (expected_images, expected_labels) in zip(two, none, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def _no_train(folder: Path) -> None:
    (folder / "train").rename(folder / "training")


def _no_test(folder: Path) -> None:
    (folder / "test").rename(folder / "testing")


def _empty_class(folder: Path) -> None:
    (folder / "train" / "yellow").mkdir()


def _other_classes(folder: Path) -> None:
    (folder / "test" / "red").rename(folder / "test" / "rouge")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_no_train, "train"), (_no_test, "val"), (_empty_class, "yellow"), (_other_classes, "red, rouge")],
)
def test_wrong_folders_are_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        from_folder(folder)
    assert caught.value.key == "data.root"
    assert caught.value.value == str(folder)
    assert "\n" not in str(caught.value)
