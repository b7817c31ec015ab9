"""Images and boxes of COCO's format: a folder, COCO itself; what is wrong in them is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.train.config import ConfigError
from syncbn.train.data import box_folder
from syncbn.train.data.box_folder import BoxedImages, box_files, collate_boxes, read_boxes
from syncbn.train.tasks.detection import Detection

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
OBJECTS = [
    {"image_id": 5, "category_id": 7, "bbox": [2, 1, 4, 3]},
    {"image_id": 5, "category_id": 3, "bbox": [0, 0, 10, 20], "iscrowd": 1},
    {"image_id": 5, "category_id": 3, "bbox": [4, 4, 0, 3]},
]


def write(root: Path, part: str, *, coco: bool = False, **changes: Any) -> Path:
    """A part with an image of 20 rows and 10 columns, and a square one of 8 without objects."""
    annotations, images = box_files("coco" if coco else "boxes", str(root), part)
    images.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    for name, height, width in (("a.png", 20, 10), ("b.png", 8, 8)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    content: dict[str, Any] = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": CATEGORIES,
        "annotations": OBJECTS,
    }
    annotations.write_text(json.dumps(content | changes))
    return annotations


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        write(tmp_path, part)
    return tmp_path


def test_a_folder(root: Path) -> None:
    images, classes = read_boxes(*box_files("boxes", str(root), "train"))
    assert classes == ["dog", "cat"], "in the order of the ids"
    assert [Path(image.file).name for image in images] == ["a.png", "b.png"]
    assert images[0].boxes.tolist() == [[2, 1, 6, 4], [0, 0, 10, 20]], "a box without an area is none"
    assert images[0].labels.tolist() == [1, 0]
    assert images[0].crowd.tolist() == [False, True]
    assert images[1].boxes.shape == (0, 4)


def test_an_image_keeps_its_proportions(root: Path) -> None:
    images, _ = read_boxes(*box_files("boxes", str(root), "train"))
    image, target = BoxedImages(images, (40, 60))[0]
    assert image.shape == (3, 40, 60)
    assert (image[:, :, 20:] == 0).all()
    assert not (image[:, :, :20] == 0).all(0).any()
    assert target["boxes"].tolist() == [[4, 2, 12, 8], [0, 0, 20, 40]]
    same, _ = BoxedImages(images, (20, 10))[0]
    pixels = np.random.default_rng(20).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(same, ((torch.from_numpy(pixels).permute(2, 0, 1) / 255) - mean) / std)


def test_boxes_belong_to_the_upright_image(root: Path) -> None:
    """Boxes that were drawn on the stored pixels of a photograph would be beside its objects."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train/images/a.png"
    Image.open(path).save(path, exif=exif)  # 20 rows and 10 columns are stored, 10 rows and 20 columns are shown
    for width, height in ((20, 10), (10, 20)):
        images = [{"id": 5, "file_name": "a.png", "width": width, "height": height}]
        (root / "train/annotations.json").write_text(
            json.dumps({"images": images, "categories": CATEGORIES, "annotations": OBJECTS[:1]})
        )
        boxed, _ = read_boxes(*box_files("boxes", str(root), "train"))
        if (width, height) == (20, 10):
            assert BoxedImages(boxed, (10, 20))[0][0].shape == (3, 10, 20)
        else:
            with pytest.raises(
                ConfigError, match=r"a.png', expected an image of 10x20 pixels, as .* upright it has 20x10"
            ):
                BoxedImages(boxed, (10, 20))


def test_images_are_held_only_if_they_fit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = read_boxes(*box_files("boxes", str(root), "train"))
    held = BoxedImages(images, (40, 40))
    monkeypatch.setattr(box_folder, "HELD_BYTES", 0)
    read = BoxedImages(images, (40, 40))
    assert (held._read is None, read._read is None) == (False, True)
    for mine, theirs in zip(held, read, strict=False):
        assert torch.equal(mine[0], theirs[0])


def test_a_batch_is_filled_up(root: Path) -> None:
    images, _ = read_boxes(*box_files("boxes", str(root), "train"))
    data = BoxedImages(images, (40, 40))
    batch, target = collate_boxes([data[0], data[1]])
    assert batch.shape == (2, 3, 40, 40)
    assert target["boxes"].shape == (2, 2, 4)
    assert target["labels"].tolist() == [[1, 0], [-1, -1]]
    assert target["crowd"].tolist() == [[False, True], [False, False]]
    none = collate_boxes([data[1], data[1]])[1]
    assert (none["boxes"].shape, none["labels"].shape) == ((2, 0, 4), (2, 0))


def test_the_parts_of_a_task(root: Path, tmp_path: Path) -> None:
    task = Detection(data="boxes", root=str(root), image_size=32)
    data = task.data(0)
    assert (len(data.train), data.validation, len(data.test)) == (2, None, 2)
    assert task.num_classes == 2
    assert task.model().head.classification_head.num_classes == 2
    held_out = Detection(data="boxes", root=str(root), image_size=32, validation_fraction=0.5).data(0)
    assert (len(held_out.train), len(held_out.validation)) == (1, 1)
    write(root, "validation")
    assert len(Detection(data="boxes", root=str(root), image_size=32).data(0).validation) == 2


def test_coco_itself(tmp_path: Path) -> None:
    for part, name in (("train", "train2017"), ("test", "val2017")):
        write(tmp_path, part, coco=True)
        assert (tmp_path / "annotations" / f"instances_{name}.json").is_file()
        assert (tmp_path / name / "a.png").is_file()
    assert len(Detection(data="coco", root=str(tmp_path), image_size=32).data(0).test) == 2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"images": [], "annotations": []}, "at least one image and one category"),
    "no categories": ({"categories": [], "annotations": []}, "at least one image and one category"),
    "an unknown category": ({"categories": CATEGORIES[:1]}, "in number 1: ValueError: its category_id 3 is not there"),
    "an unknown image": (
        {"annotations": [{**OBJECTS[0], "image_id": 9}]},
        "in number 0: ValueError: its image_id 9 is not there",
    ),
    "three numbers": (
        {"annotations": [{**OBJECTS[0], "bbox": [1, 2, 3]}]},
        "in number 0: ValueError: not enough values",
    ),
    "a text": ({"annotations": [{**OBJECTS[0], "bbox": ["a", 2, 3, 4]}]}, "in number 0: ValueError: could not convert"),
    "not a number": (
        {"annotations": [OBJECTS[0], {**OBJECTS[0], "bbox": [math.nan, 2, 3, 4]}]},
        "in number 1: ValueError: its bbox is [nan, 2, 3, 4]",
    ),
    "negative": ({"annotations": [{**OBJECTS[0], "bbox": [1, 2, -3, 4]}]}, "its bbox is [1, 2, -3, 4]"),
    "no bbox": ({"annotations": [{"image_id": 5, "category_id": 3}]}, "in number 0: KeyError: 'bbox'"),
    "one id twice": (
        {"images": [{"id": 5, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}]},
        "an id of its own for each image; 2 images have 1",
    ),
    "no list": ({"annotations": 3}, "(TypeError: 'int' object is not iterable)"),
    "a missing file": ({"images": [{"id": 5, "file_name": "c.png"}]}, "an image that is there"),
    "a list for an annotation": ({"annotations": [[1, 2]]}, "in number 0: TypeError"),
    "an id of two annotations": (
        {"annotations": [{**OBJECTS[0], "id": 4}, {**OBJECTS[1], "id": 5}, {**OBJECTS[0], "id": 4}]},
        "in number 2: ValueError: its id 4 is also that of number 0",
    ),
    "no annotations": ({"annotations": []}, "at least one annotation of an object"),
    "a crowd alone": ({"annotations": OBJECTS[1:]}, "at least one annotation of an object"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_file(tmp_path: Path, name: str) -> None:
    changes, expected = MISTAKES[name]
    changes = {"annotations": OBJECTS[:1], **changes} if name == "a missing file" else changes
    path = write(tmp_path, "train", **changes)
    with pytest.raises(ConfigError) as error:
        read_boxes(path, path.parent / "images")
    assert str(error.value).startswith("task.options.root: got ")
    assert expected in str(error.value)


BEYOND = {
    "at the right": [8, 1, 4, 3],
    "at the bottom": [2, 18, 3, 4],
    "at the left": [-2, 1, 4, 3],
    "at the top": [2, -1.5, 4, 3],
    "beside": [10, 1, 0.5, 3],
    "above": [2, -1, 3, 1],
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_box_beyond_its_image(root: Path, name: str) -> None:
    """Named by the annotations if they have the image's size, else by the image itself."""
    x, y, width, height = BEYOND[name]
    told = f"its bbox [{float(x)}, {float(y)}, {float(width)}, {float(height)}] reaches beyond an image of 10x20 pixels"
    objects = [OBJECTS[0], {**OBJECTS[0], "bbox": BEYOND[name]}]
    sized = [{"id": 5, "file_name": "a.png", "width": 10, "height": 20}]
    with pytest.raises(ConfigError) as error:
        read_boxes(
            *box_files("boxes", str(write(root, "train", images=sized, annotations=objects).parents[1]), "train")
        )
    assert "train/annotations.json', expected" in str(error.value)
    assert f"in number 1: ValueError: {told}" in str(error.value)
    write(root, "train", annotations=objects)
    with pytest.raises(ConfigError) as error:
        Detection(data="boxes", root=str(root), image_size=32).data(0)
    assert "images/a.png', expected an image around its boxes" in str(error.value)
    assert told in str(error.value)


def test_a_rounded_box_ends_at_the_border(root: Path) -> None:
    objects = [{**OBJECTS[0], "bbox": [-0.5, 3, 11, 17.75]}]
    sized = [{"id": 5, "file_name": "a.png", "width": 10, "height": 20}, {"id": 2, "file_name": "b.png"}]
    for changes in ({}, {"images": sized}):
        write(root, "train", annotations=objects, **changes)
        images, _ = read_boxes(*box_files("boxes", str(root), "train"))
        assert BoxedImages(images, (40, 60))[0][1]["boxes"].tolist() == [[0, 6, 20, 40]]


def test_files_that_cannot_be_read(root: Path) -> None:
    (root / "test/annotations.json").write_text("{")
    with pytest.raises(ConfigError, match=r"task.options.root: got '.*test/annotations.json', expected a file in JSON"):
        Detection(data="boxes", root=str(root)).data(0)
    (root / "test/annotations.json").unlink()
    with pytest.raises(ConfigError, match=r"expected a file that can be read .No such file"):
        Detection(data="boxes", root=str(root)).data(0)
    write(root, "test", categories=CATEGORIES[:1], annotations=OBJECTS[:1])
    with pytest.raises(ConfigError, match=r"expected the categories of the training data, \['dog', 'cat'\]"):
        Detection(data="boxes", root=str(root)).data(0)
    write(root, "test")
    (root / "test/images/a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"images/a.png', expected an image that can be read"):
        Detection(data="boxes", root=str(root)).data(0)
