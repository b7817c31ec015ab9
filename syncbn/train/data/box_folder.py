"""Images and the boxes of their objects: files in COCO's format, in a folder of the user's or as COCO lays them out.

The format: https://cocodataset.org/#format-data, the keys for object detection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncbn.train.config import LARGEST, ConfigError, require
from syncbn.train.data.datasets import IMAGENET
from syncbn.train.data.files import HELD_BYTES
from syncbn.train.data.image_file import rgb_image
from syncbn.train.stored import read_json

KEY = "task.options.root"
SLACK = 1.0
"""Pixels by which a box may reach beyond its image, as rounded ones do; it ends at the border then."""
NO_BOX = -1
"""Label of the entries that fill up the shorter lists of boxes in a batch."""
Target = dict[str, Tensor]


class Boxed(NamedTuple):
    """An image's file and its objects."""

    file: str
    boxes: Tensor
    """float32 (k, 4): x and y of the first corner and of the last one, in pixels of the file."""
    labels: Tensor
    """int64 (k,): class numbers from 0."""
    crowd: Tensor
    """bool (k,): boxes around several objects, which are neither learnt nor expected to be found."""
    size: tuple[int, int] | None = None
    """Width and height on which the boxes were drawn, if the annotations say so."""


class _Object(NamedTuple):
    """An annotation: corners in pixels of the file, class number, and whether it is a crowd."""

    box: list[float]
    label: int
    crowd: bool

    @property
    def has_area(self) -> bool:
        left, top, right, bottom = self.box
        return right > left and bottom > top


class BoxedImages(Dataset[tuple[Tensor, Target]]):
    """Pairs of an image, float32 (3, H, W), normalized as for ImageNet, and its boxes.

    An image keeps its proportions: it is resized to fit into ``size`` (H, W), and grey fills what is left at its right
    or its bottom. The target has ``boxes`` (k, 4), ``labels`` (k,) and ``crowd`` (k,), in pixels of the resized image.
    Images that fit into memory are read when the set is made, else when they are fetched.
    """

    def __init__(self, images: Sequence[Boxed], size: tuple[int, int]) -> None:
        self.images, self.size = list(images), size
        held = len(self.images) * 3 * size[0] * size[1] <= HELD_BYTES
        self._read = [self._pixels(image) for image in self.images] if held else None
        self._mean, self._std = (torch.tensor(x).mul(255).view(-1, 1, 1) for x in IMAGENET)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        boxed = self.images[index]
        pixels, scale = self._pixels(boxed) if self._read is None else self._read[index]
        image = torch.zeros(3, *self.size)
        height, width = pixels.shape[1:]
        image[:, :height, :width] = pixels.to(torch.float32).sub_(self._mean).div_(self._std)
        # The border of the image that was resized, as a rounded box may reach beyond it.
        boxes = (boxed.boxes * scale).clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        return image, {"boxes": boxes, "labels": boxed.labels, "crowd": boxed.crowd}

    def _pixels(self, boxed: Boxed) -> tuple[Tensor, Tensor]:
        """uint8 (3, h, w) that fits into ``size``, and the factors of x, y, x, y."""
        import numpy as np
        from PIL import Image

        image = rgb_image(boxed.file, KEY)
        # A photograph is turned upright; boxes that were drawn on the stored pixels would be beside the objects.
        wanted = boxed.size or image.size
        same = "an image of {}x{} pixels, as its annotations say; upright it has {}x{}".format(*wanted, *image.size)
        require(image.size == wanted, KEY, boxed.file, same)
        problem = next(filter(None, (_beyond(box, image.size) for box in boxed.boxes.tolist())), None)
        require(problem is None, KEY, boxed.file, f"an image around its boxes; {problem}")
        factor = min(self.size[0] / image.height, self.size[1] / image.width)
        width, height = (max(1, round(side * factor)) for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))
        return pixels.permute(2, 0, 1), torch.tensor([width / image.width, height / image.height] * 2)


def collate_boxes(items: list[tuple[Tensor, Target]]) -> tuple[Tensor, Target]:
    """A batch: images (N, C, H, W), and ``boxes`` (N, k, 4), ``labels`` (N, k) and ``crowd`` (N, k).

    k is the largest number of boxes in the batch; entries without a box have the label `NO_BOX`.
    """
    images, targets = zip(*items, strict=True)
    most = max(len(target["labels"]) for target in targets)

    def filled(name: str, value: float) -> Tensor:
        rows = []
        for target in targets:
            row = target[name]
            rows.append(torch.cat((row, row.new_full((most - len(row), *row.shape[1:]), value))))
        return torch.stack(rows)

    boxes, labels, crowd = filled("boxes", 0), filled("labels", NO_BOX), filled("crowd", False)
    return torch.stack(images), {"boxes": boxes, "labels": labels, "crowd": crowd}


def box_files(data: str, root: str, part: str) -> tuple[Path, Path]:
    """The annotations of a part of a data set, and the folder of its images.

    ``boxes``: ``root/part/annotations.json`` and ``root/part/images``. ``coco``: as COCO 2017 is unpacked.
    """
    if data == "boxes":
        return Path(root) / part / "annotations.json", Path(root) / part / "images"
    name = {"train": "train2017", "test": "val2017"}[part]
    return Path(root) / "annotations" / f"instances_{name}.json", Path(root) / name


def read_boxes(annotations: Path, images: Path) -> tuple[list[Boxed], list[str]]:
    """The images of an annotations file, in the file's order, and the names of its classes in the order of their ids.

    Raises:
        ConfigError: the file cannot be read or is not in COCO's format, it has no objects, an id is given twice, a box
            reaches beyond its image, or an image is missing.
    """
    where, content = annotations, read_json(annotations, KEY)
    try:
        classes = {category["id"]: str(category["name"]) for category in content["categories"]}
        files = {image["id"]: images / image["file_name"] for image in content["images"]}
        sizes = {image["id"]: _size(image) for image in content["images"]}
        objects, given = list(content["annotations"]), len(content["images"])
        numbers = {key: number for number, key in enumerate(sorted(classes))}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        expected = f"images, categories and annotations as in COCO's format ({type(error).__name__}: {error})"
        raise ConfigError(KEY, where, expected) from error
    require(given == len(files), KEY, where, f"an id of its own for each image; {given} images have {len(files)}")
    require(bool(files) and bool(classes), KEY, where, "at least one image and one category")
    found = _objects(objects, numbers, sizes, where)
    some = any(not each.crowd for boxes in found.values() for each in boxes)
    require(some, KEY, where, "at least one annotation of an object: a box with an area, and not of a crowd")
    absent = next((path for path in files.values() if not path.is_file()), None)
    require(absent is None, KEY, absent, f"an image that is there, as {where} names it")
    boxed = []
    for key, path in files.items():
        boxes, labels, crowd = ([each[i] for each in found[key]] for i in range(3))
        corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        numbers_of = torch.tensor(labels, dtype=torch.int64)
        boxed.append(Boxed(str(path), corners, numbers_of, torch.tensor(crowd, dtype=torch.bool), sizes[key]))
    return boxed, [classes[key] for key in sorted(classes)]


def _objects(
    annotations: Sequence[Any], numbers: Mapping[Any, int], sizes: Mapping[Any, tuple[int, int] | None], where: Path
) -> dict[Any, list[_Object]]:
    """The objects of each image that have an area. ``numbers`` are those of the classes by their ids."""
    found: dict[Any, list[_Object]] = {key: [] for key in sizes}
    ids: dict[Any, int] = {}
    for place, given in enumerate(annotations):
        try:
            image, label, own = given["image_id"], given["category_id"], given.get("id")
            box = _corners(given["bbox"])
            if image not in found or label not in numbers:
                missing = f"image_id {image!r}" if image not in found else f"category_id {label!r}"
                raise ValueError(f"its {missing} is not there")
            if own is not None and (first := ids.setdefault(own, place)) != place:
                raise ValueError(f"its id {own!r} is also that of number {first}")
            each, size = _Object(box, numbers[label], bool(given.get("iscrowd"))), sizes[image]
            if each.has_area and size is not None and (problem := _beyond(box, size)):
                raise ValueError(problem)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            expected = f"annotations as in COCO's format; in number {place}: {type(error).__name__}: {error}"
            raise ConfigError(KEY, where, expected) from error
        found[image] += [each] if each.has_area else []
    return found


def _beyond(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """What is wrong with a box that reaches beyond an image of this width and height, by more than rounding."""
    left, top, right, bottom = box
    width, height = size
    inside = left < width and top < height and right > 0 and bottom > 0
    if inside and min(left, top) >= -SLACK and right <= width + SLACK and bottom <= height + SLACK:
        return None
    return f"its bbox {[left, top, right - left, bottom - top]} reaches beyond an image of {width}x{height} pixels"


def _corners(bbox: Sequence[Any]) -> list[float]:
    """Left, top, right and bottom of a box that is given as left, top, width and height."""
    x, y, width, height = map(float, bbox)
    if not all(abs(value) <= LARGEST[int] for value in (x, y, width, height)) or width < 0 or height < 0:
        raise ValueError(f"its bbox is {list(bbox)}")
    return [x, y, x + width, y + height]


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["width"]), int(image["height"])) if "width" in image and "height" in image else None
