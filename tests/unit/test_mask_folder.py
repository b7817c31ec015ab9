"""Pairs of image and mask files: a folder, VOC, Cityscapes; what is wrong in them is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.train.config import ConfigError
from syncbn.train.data import mask_folder
from syncbn.train.data.mask_folder import (
    MaskedImages,
    MaskReader,
    cityscapes_classes,
    cityscapes_pairs,
    folder_pairs,
    voc_pairs,
)
from syncbn.train.tasks.segmentation import Segmentation


def write(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def colours(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two training pairs and one test pair of 8 x 6 pixels, three classes, one pixel ignored."""
    for part, names in (("train", "ba"), ("test", "c")):
        for name in names:
            write(tmp_path / part / "images" / f"{name}.png", colours(8, 6, ord(name)))
            mask = np.arange(48).reshape(8, 6) % 3
            mask[0, 0] = 255
            write(tmp_path / part / "masks" / f"{name}.png", mask)
    return tmp_path


def read(root: Path, part: str = "train", size: tuple[int, int] = (8, 6), classes: int = 3) -> MaskedImages:
    return MaskedImages(folder_pairs(str(root), part), MaskReader(size, classes, 255))


def test_a_folder(root: Path) -> None:
    images = read(root)
    assert [Path(image).name for image, _ in images.pairs] == ["a.png", "b.png"]
    image, classes = images[0]
    expected = (torch.from_numpy(colours(8, 6, ord("a"))).permute(2, 0, 1) / 255).float()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(image, (expected - mean) / std)
    assert classes.dtype == torch.int64
    assert classes.flatten().tolist() == [255, *[i % 3 for i in range(1, 48)]]


def test_files_that_do_not_fit_are_read_when_they_are_fetched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = read(root)
    monkeypatch.setattr(mask_folder, "HELD_BYTES", 1)
    fetched = read(root)
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(held[i], fetched[i], strict=True))
    (root / "train/images/b.png").unlink()
    with pytest.raises(ConfigError, match=r"b\.png"):
        fetched[1]


def test_masks_are_resized_to_the_nearest_pixel_and_images_bilinearly(root: Path) -> None:
    write(root / "train/images/a.png", np.repeat(np.arange(6) * 40, 24).reshape(6, 8, 3).transpose(1, 0, 2))
    image, classes = read(root, size=(4, 12))[0]
    assert image.shape == (3, 4, 12)
    assert set(classes.unique().tolist()) <= {0, 1, 2, 255}
    assert classes.shape == (4, 12)
    assert len(image[0, 0].unique()) > 6, "bilinear resizing makes new shades"


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_a_mask_has_one_channel_of_any_kind(root: Path, mode: str) -> None:
    mask = Image.fromarray((np.arange(48).reshape(8, 6) % 2).astype(np.uint8))
    if mode == "1":
        mask = mask.point(lambda value: 255 * value).convert("1")
    elif mode == "P":
        mask.putpalette([0, 0, 0, 200, 10, 10])
    elif mode == "I;16":
        mask = mask.convert("I").convert("I;16")
    assert mask.mode == mode
    mask.save(root / "train/masks/a.png")
    assert read(root)[0][1].flatten().tolist() == [i % 2 for i in range(48)]


def wrong_size(root: Path) -> None:
    write(root / "train/masks/b.png", np.zeros((6, 8)))


def wrong_class(root: Path) -> None:
    write(root / "train/masks/b.png", np.full((8, 6), 7))


def colour_mask(root: Path) -> None:
    write(root / "train/masks/b.png", np.zeros((8, 6, 3)))


def damaged_image(root: Path) -> None:
    path = root / "train/images/b.png"
    path.write_bytes(path.read_bytes()[:60])


def not_an_image(root: Path) -> None:
    (root / "train/masks/b.png").write_text("1 2 3")


def no_mask(root: Path) -> None:
    (root / "train/masks/b.png").unlink()


def no_image(root: Path) -> None:
    (root / "train/images/b.png").unlink()


def two_images(root: Path) -> None:
    write(root / "train/images/b.bmp", colours(8, 6))


def no_folder(root: Path) -> None:
    (root / "train/masks").rename(root / "train/labels")


def empty_folder(root: Path) -> None:
    for path in (root / "train/images").iterdir():
        path.unlink()


MISTAKES = {
    wrong_size: r"masks/b\.png.*as large as its image \(6x8\), not 8x6",
    wrong_class: r"masks/b\.png.*from 0 to 2, and 255 .*not 7",
    colour_mask: r"masks/b\.png.*one channel.*RGB",
    damaged_image: r"images/b\.png.*can be read",
    not_an_image: r"masks/b\.png.*can be read",
    no_mask: r"images/b\.png.*same name in train/masks",
    no_image: r"masks/b\.png.*same name in train/images",
    two_images: r"images/b\.png.*b\.bmp",
    no_folder: r"train/masks.*a folder",
    empty_folder: r"train/images.*with files",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_name_the_file(root: Path, mistake: Any) -> None:
    mistake(root)
    with pytest.raises(ConfigError, match=f"task.options.root: got .*{MISTAKES[mistake]}"):
        read(root)


def masks_task(root: Path, **options: Any) -> Segmentation:
    return Segmentation(data="masks", root=str(root), num_classes=3, image_size=8, **options)


def test_the_parts_of_a_folder(root: Path) -> None:
    data = masks_task(root).data(0)
    assert (len(data.train), data.validation, len(data.test)) == (2, None, 1)
    data = masks_task(root, validation_fraction=0.5).data(0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1, 1, 1)
    assert set(data.train.pairs).isdisjoint(data.validation.pairs)
    with pytest.raises(ConfigError, match=r"task.options.validation_fraction: got 0\.1"):
        masks_task(root, validation_fraction=0.1).data(0)
    (root / "test").rename(root / "validation")
    with pytest.raises(ConfigError, match="test/images"):
        masks_task(root).data(0)
    for kind in ("images", "masks"):
        write(root / "test" / kind / "d.png", np.zeros((8, 6, 3) if kind == "images" else (8, 6)))
    assert len(masks_task(root).data(0).validation) == 1
    with pytest.raises(
        ConfigError, match=r"task.options.validation_fraction: got 0\.5, expected 0 for a folder with a"
    ):
        masks_task(root, validation_fraction=0.5).data(0)


def test_voc(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit/VOC2012"
    for part, names in (("train", ("x", "y")), ("val", ("z",))):
        (base / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write(base / "JPEGImages" / f"{name}.jpg", colours(9, 7))
            write(base / "SegmentationClass" / f"{name}.png", np.where(np.eye(9, 7) > 0, 255, 20))
    assert [Path(image).stem for image, _ in voc_pairs(str(tmp_path), "train")] == ["x", "y"]
    data = Segmentation(data="voc", root=str(tmp_path), image_size=[16, 8]).data(0)
    assert (len(data.train), len(data.test)) == (2, 1)
    image, classes = data.test[0]
    assert image.shape == (3, 16, 8)
    assert set(classes.unique().tolist()) == {20, 255}


def test_cityscapes(tmp_path: Path) -> None:
    for part, number in (("train", 7), ("val", 26)):  # road and car
        write(tmp_path / f"leftImg8bit/{part}/rome/r_0_leftImg8bit.png", colours(4, 8))
        labels = np.full((4, 8), number)
        labels[0] = 3  # out of region: not trained
        write(tmp_path / f"gtFine/{part}/rome/r_0_gtFine_labelIds.png", labels)
    ((image, mask),) = cityscapes_pairs(str(tmp_path), "train")
    assert (Path(image).name, Path(mask).name) == ("r_0_leftImg8bit.png", "r_0_gtFine_labelIds.png")
    task = Segmentation(data="cityscapes", root=str(tmp_path), image_size=[4, 8], depth=2)
    data = task.data(0)
    assert data.train[0][1].unique().tolist() == [0, 255]
    assert data.test[0][1].unique().tolist() == [13, 255]
    assert task.options.first_class == 0, "class 0 is the road, which counts"
    assert sorted(set(cityscapes_classes())) == [*range(19), 255]


@pytest.mark.parametrize("data", ["voc", "cityscapes"])
def test_public_sets_that_are_not_there(tmp_path: Path, data: str) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"task.options.root: got '{root}', expected a folder"):
            Segmentation(data=data, root=str(root)).data(0)
    assert not (tmp_path / "nowhere").exists()
