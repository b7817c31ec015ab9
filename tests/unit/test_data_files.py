"""Data sets on disk: downloads, folders of images."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, DataConfig
from syncbn.train.data import datasets as data
from syncbn.train.data import files as data_files
from syncbn.train.data.datasets import load_data
from syncbn.train.data.samples import batch_loader


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "syncbn"


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


@pytest.fixture(params=["held", "on_demand"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with a folder that is held in memory, and with one that is too large for it."""
    if request.param == "on_demand":
        monkeypatch.setattr(data_files, "HELD_BYTES", 0)


def decodings(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """How many files are decoded to load the folder."""
    decode, calls = data_files._decode_file, []
    with monkeypatch.context() as patch:
        patch.setattr(data_files, "_decode_file", lambda *arguments: calls.append(1) or decode(*arguments))
        from_folder(folder, **options)
    return len(calls)


@pytest.mark.parametrize("test_name", ["test", "val"])
@pytest.mark.usefixtures("both_ways")
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


@pytest.mark.usefixtures("both_ways")
def test_image_folder_keeps_the_middle_in_proportion(folder: Path) -> None:
    picture = Image.new("RGB", (64, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 16, 32))  # the left quarter, all of which is cut off
    picture.save(folder / "test" / "red" / "0.png")
    images, _ = from_folder(folder).test.__getitems__([(0, 4)])
    assert (images[0, 0, :, 1:] > 2).all()


@pytest.mark.usefixtures("both_ways")
def test_grey_and_transparent_images_become_rgb(folder: Path) -> None:
    for i, mode in enumerate(("L", "RGBA", "P", "1")):
        Image.new(mode, (20, 20)).save(folder / "train" / "blue" / f"{i}.png")
    images, _ = from_folder(folder).train.__getitems__([(0, i) for i in range(4)])
    assert images.shape == (4, 3, 16, 16)
    assert (images[[0, 2, 3]] < -1).all()  # black
    assert (images[1] > 1).all()  # transparent


def test_what_fits_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 images of 16x16 in three colours; both ways give the same, also after a resize and a cut."""
    made = []
    for limit, held in ((18 * 3 * 16 * 16, True), (18 * 3 * 16 * 16 - 1, False)):
        monkeypatch.setattr(data_files, "HELD_BYTES", limit)
        made.append(from_folder(folder, augment="crop_flip").train)
        assert made[-1].held == held
    (images, labels), (expected, expected_labels) = (train.__getitems__([(2, i) for i in range(12)]) for train in made)
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)


def test_a_large_folder_is_decoded_when_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "HELD_BYTES", 0)
    (folder / "train" / "blue" / "1.png").write_bytes(b"no image")
    made = from_folder(folder)
    assert not made.train.held
    made.train.__getitems__([(0, 0), (0, 2)])
    with pytest.raises(ConfigError, match=r"1\.png"):
        made.train.__getitems__([(0, 1)])


def test_a_held_folder_is_decoded_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decodings(folder, monkeypatch) == 18
    assert decodings(folder, monkeypatch, augment="crop") == 0
    assert len(list(cache.glob("*.npz"))) == 2
    moved = folder.rename(folder.with_name(folder.name + "-moved"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(moved / "cache"))
    assert decodings(moved, monkeypatch) == 0


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def _grow(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "decoded"),
    [
        (_touch, 12),
        (_grow, 12),
        (lambda path: path.rename(path.with_name("x.png")), 12),
        (lambda path: path.rename(path.parent.with_name("green") / "x.png"), 12),
        (lambda path: path.unlink(), 11),
        (lambda path: shutil.copy(path, path.with_name("x.png")), 13),
    ],
    ids=["time", "size", "name", "class", "fewer", "more"],
)
def test_a_changed_folder_is_decoded_again(
    folder: Path, change: Callable[[Path], object], decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that changed; the test images are still those of the copy."""
    decodings(folder, monkeypatch)
    change(folder / "train" / "blue" / "1.png")
    assert decodings(folder, monkeypatch) == decoded
    assert from_folder(folder).train.labels.tolist() == [
        label for _, label in import_torchvision().datasets.ImageFolder(folder / "train").samples
    ]


def test_another_size_or_decoding_is_another_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decodings(folder, monkeypatch) == 18
    monkeypatch.setattr(data_files, "DECODING", data_files.DECODING + 1)
    assert decodings(folder, monkeypatch) == 18
    made = load_data(DataConfig(name="imagefolder", root=str(folder), image_size=20), seed=0)
    assert made.shape == (3, 20, 20)


def _png_with_a_broken_chunk() -> bytes:
    """The length of the pixels' chunk is half of what it is, so that what follows is taken for the next chunk."""
    content = bytearray(_encoded("PNG"))
    at = content.index(b"IDAT") - 4
    struct.pack_into(">I", content, at, struct.unpack_from(">I", content, at)[0] // 2)
    return bytes(content)


def _encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"no image", b"", _encoded("JPEG")[:-300], _png_with_a_broken_chunk(), b"P6 4x 4 255\n", b"P6 99999 99999 255\n"],
    ids=["text", "empty", "truncated", "broken_chunk", "no_number", "too_large"],
)
@pytest.mark.parametrize("small", [True, False], ids=["one_thread", "threads"])
def test_the_first_file_that_cannot_be_read_is_named(
    folder: Path, cache: Path, content: bytes, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "_CHUNK", 2)
    monkeypatch.setattr(data_files, "_SMALL_FILE", 10**9 if small else 0)
    for name in ("green/2.png", "red/0.png", "red/3.png"):
        (folder / "train" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"an image that can be read \(.+\)") as caught:
        from_folder(folder)
    assert (caught.value.key, caught.value.value) == ("data.root", str(folder / "train" / "green" / "2.png"))
    assert not list(cache.glob("*.npz"))


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    (folder / "test" / "blue" / "9.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(ConfigError, match=r"test/blue/9\.png"):
        from_folder(folder)


@pytest.mark.usefixtures("both_ways")
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
