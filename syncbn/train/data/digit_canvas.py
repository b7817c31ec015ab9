"""Digits of MNIST-5k on a canvas: images with class masks and boxes; in 3-D, stacks of slices that digits move through.

Each image has a background level, a contrast and a noise of its own, so that the statistics of a small batch scatter.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from syncbn.train.data.datasets import Labelled, mnist5k
from syncbn.train.data.order import derive_seed, position_in_class

Split = Literal["train", "validation", "test"]
NUM_CLASSES = 11
"""Background, and the ten digits."""
MEAN, STD = 0.14, 0.12  # of the training images, as fractions of white: constants, so that subsets see the same inputs
SIDES = (20, 28)
"""Smallest and largest side of a digit, in pixels."""
_FIFTHS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}
_INK = 0.3  # fraction of a digit's brightest pixel from which on a pixel is part of the digit
_TRIES = 20  # to find a free place for a digit; then the image has one digit less


class Item(NamedTuple):
    """One image and what is on it. Its ``size`` is (H, W), or (slices, H, W)."""

    image: Tensor
    """uint8 (1, \\*size)."""
    mask: Tensor
    """uint8 (\\*size): 0 is background, d + 1 the digit d."""
    boxes: Tensor
    """int64 (k, 2 dims) of k digits: first x, y (, slice) of each digit's pixels, and x, y (, slice) after the last."""
    classes: Tensor
    """int64 (k,): d + 1."""


class _Path(NamedTuple):
    """A square of pixels that moves in a straight line: where it is in its first slice and where in its last one."""

    side: int
    start: tuple[int, int]  # top, left
    end: tuple[int, int]
    slices: range

    def at(self, z: int) -> tuple[int, int]:
        """Top and left in slice ``z``."""
        way = (z - self.slices.start) / max(1, len(self.slices) - 1)
        top, left = (round(a + (b - a) * way) for a, b in zip(self.start, self.end, strict=True))
        return top, left

    def meets(self, other: _Path) -> bool:
        """Whether the boxes around two paths overlap."""
        boxes = zip(self._ranges(), other._ranges(), strict=True)
        return all(a.start < b.stop and b.start < a.stop for a, b in boxes)

    def _ranges(self) -> tuple[range, ...]:
        plane = (range(min(a, b), max(a, b) + self.side) for a, b in zip(self.start, self.end, strict=True))
        return (self.slices, *plane)


class DigitCanvas(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image, float32 (1, \\*size), normalized, and its mask, int64 (\\*size).

    Sample i of a split is a function of the split, i and the size alone. The splits show different digits of MNIST-5k:
    three, one and one fifth of each class.

    Args:
        split: ``train``, ``validation`` or ``test``.
        samples: the number of images.
        size: (H, W), or (slices, H, W); H and W at least 28.
        ignore_border: the mask is 255 within this many pixels of a digit, in each slice.
        pool: the digits to choose from; None is MNIST-5k.
    """

    def __init__(
        self, split: Split, samples: int, size: tuple[int, ...], ignore_border: int = 0, pool: Labelled | None = None
    ) -> None:
        digits = digits_of(mnist5k() if pool is None else pool, split)
        seeds = [derive_seed("digit_canvas", split, index) for index in range(samples)]
        self.items = [draw_item(digits, seed, size) for seed in seeds]
        self._masks = [with_ignored_border(item.mask, ignore_border) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.items[index].image.to(torch.float32).sub_(255 * MEAN).div_(255 * STD)
        return image, self._masks[index].to(torch.int64)


class DigitBoxes(DigitCanvas):
    """Pairs of the same images, without slices, and their boxes: ``boxes`` float32 (k, 4), ``labels`` int64 (k,).

    Labels are the digits; ``crowd``, bool (k,), is False.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        image, _ = super().__getitem__(index)
        item = self.items[index]
        crowd = torch.zeros(len(item.classes), dtype=torch.bool)
        return image, {"boxes": item.boxes.to(torch.float32), "labels": item.classes - 1, "crowd": crowd}


def digits_of(pool: Labelled, split: Split) -> Labelled:
    """A split's digits: those whose position in their class is 0, 1, 2 modulo 5 (train), 3 (validation) or 4 (test)."""
    fifth = position_in_class(pool.labels) % 5
    return pool.subset(torch.isin(fifth, torch.tensor(_FIFTHS[split])).nonzero().flatten())


def draw_item(digits: Labelled, seed: int, size: tuple[int, ...]) -> Item:
    """An image of ``size`` with some of the ``digits`` (uint8 [n, 1, 28, 28]), which do not overlap."""
    assert isinstance(digits.pixels, Tensor), "MNIST is held in memory"
    draw = random.Random(seed)
    stack = (1, *size)[-3:]
    light = torch.zeros(stack)
    mask = torch.zeros(stack, dtype=torch.uint8)
    paths: list[_Path] = []
    boxes, classes = [], []
    for _ in range(draw.randint(1, max(1, round(stack[1] * stack[2] / 32**2)))):
        path = _free_path(draw, stack, paths)
        number, brightness = draw.randrange(len(digits.labels)), draw.uniform(0.5, 1.0)
        if path is None:
            continue
        paths.append(path)
        digit = _resized(digits.pixels[number], path.side)
        label = int(digits.labels[number]) + 1
        for z in path.slices:
            top, left = path.at(z)
            square = (z, slice(top, top + path.side), slice(left, left + path.side))
            light[square] += brightness * digit
            mask[square] += label * (digit >= _INK).to(torch.uint8)
        boxes.append(_box(digit >= _INK, path)[-len(size) :])
        classes.append(label)
    background, contrast, noise = draw.uniform(0, 0.25), draw.uniform(0.5, 1.0), draw.uniform(0.02, 0.08)
    grain = torch.randn(stack, generator=torch.Generator().manual_seed(derive_seed("grain", seed)))
    image = (background + (1 - background) * contrast * light + noise * grain).clamp_(0, 1)
    # From ranges, slice first, to the corners: x before y before slice.
    ranges = torch.tensor([[(r.start, r.stop) for r in box] for box in boxes])  # (k, dims, 2)
    corners = ranges.flip(1).transpose(1, 2).flatten(1)
    pixels = image.mul_(255).round_().to(torch.uint8)
    return Item(pixels.view(1, *size), mask.view(size), corners, torch.tensor(classes))


def _free_path(draw: random.Random, stack: tuple[int, ...], taken: list[_Path]) -> _Path | None:
    """A path within a stack (slices, H, W) that meets none of those that are taken; None if none was found."""
    depth, height, width = stack
    for _ in range(_TRIES):
        side = draw.randint(*SIDES)
        length = draw.randint(-(-depth // 4), max(-(-depth // 4), 3 * depth // 4))
        first = draw.randint(0, depth - length)
        start, end = [], []
        for room in (height - side, width - side):
            start.append(draw.randint(0, room))
            # A digit that is in one slice only does not move.
            step = draw.randint(-side // 2, side // 2) if length > 1 else 0
            end.append(min(max(start[-1] + step, 0), room))
        path = _Path(side, (start[0], start[1]), (end[0], end[1]), range(first, first + length))
        if not any(path.meets(other) for other in taken):
            return path
    return None


def _resized(digit: Tensor, side: int) -> Tensor:
    """uint8 [1, 28, 28] -> float32 [side, side], whose brightest pixel is 1."""
    resized = functional.interpolate(
        digit.unsqueeze(0).to(torch.float32), size=(side, side), mode="bilinear", antialias=True
    )
    return resized[0, 0] / resized.max()


def _box(ink: Tensor, path: _Path) -> tuple[range, ...]:
    """Slices, rows and columns that the ink (side, side) of a digit fills on its path."""
    places = [path.at(z) for z in path.slices]
    found = [path.slices]
    for axis in (0, 1):
        filled = ink.any(1 - axis).nonzero().flatten()
        where = [place[axis] for place in places]
        found.append(range(min(where) + int(filled[0]), max(where) + int(filled[-1]) + 1))
    return tuple(found)


def with_ignored_border(mask: Tensor, border: int) -> Tensor:
    """A mask, uint8 (\\*size), with 255 where the background is within ``border`` pixels of a digit, in each slice."""
    if border == 0:
        return mask
    ink = (mask > 0).to(torch.float32).view(-1, 1, *mask.shape[-2:])
    near = functional.max_pool2d(ink, 2 * border + 1, stride=1, padding=border).view(mask.shape) > 0
    return torch.where(near & (mask == 0), 255, mask)
