"""Digits on a canvas: what a sample depends on, masks and boxes, movement, the ignored border, the inputs' scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncbn.train.data.datasets import Labelled
from syncbn.train.data.digit_canvas import SIDES, DigitCanvas, Item, digits_of, draw_item, with_ignored_border

SIZES = {"2d": (64, 56), "3d": (8, 48, 60)}


@pytest.fixture(scope="module")
def pool() -> Labelled:
    """Five rings of each class in place of MNIST; the corner's brightness numbers them."""
    rows, columns = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    radius = (rows**2 + columns**2).sqrt()
    rings = [255 * torch.exp(-((radius - 4 - (i // 5)) ** 2) / 4) for i in range(50)]
    pixels = torch.stack(rings).round().to(torch.uint8).unsqueeze(1)
    pixels[:, 0, 0, 0] = torch.arange(50, dtype=torch.uint8)
    return Labelled(pixels, torch.arange(50) // 5)


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def items(request: pytest.FixtureRequest, pool: Labelled) -> list[Item]:
    return [draw_item(pool, seed, request.param) for seed in range(40)]


def test_a_sample_is_a_function_of_its_split_and_index(pool: Labelled) -> None:
    few, many, other = (
        DigitCanvas(split, n, (40, 40), pool=pool) for split, n in (("train", 2), ("train", 5), ("test", 2))
    )
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(few[i], many[i], strict=True))
        assert not torch.equal(few[i][0], other[i][0])
    assert not torch.equal(many[0][0], many[1][0])
    torch.manual_seed(1)
    assert torch.equal(DigitCanvas("train", 1, (40, 40), pool=pool)[0][0], few[0][0])


def test_splits_show_different_digits(pool: Labelled) -> None:
    parts = [digits_of(pool, split) for split in ("train", "validation", "test")]
    numbers = [set(part.pixels[:, 0, 0, 0].tolist()) for part in parts]
    assert [len(part) for part in numbers] == [30, 10, 10]
    assert len(set.union(*numbers)) == 50
    assert all(set(part.labels.tolist()) == set(range(10)) for part in parts)


def test_types_and_shapes(items: list[Item], pool: Labelled) -> None:
    size = tuple(items[0].mask.shape)
    for item in items:
        assert (item.image.dtype, item.image.shape) == (torch.uint8, (1, *size))
        assert item.mask.dtype == torch.uint8
        assert item.boxes.shape == (len(item.classes), 2 * len(size))
        assert len(item.classes) >= 1
    image, mask = DigitCanvas("train", 1, size, pool=pool)[0]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (torch.float32, (1, *size), torch.int64, size)


def ranges(box: Tensor) -> tuple[slice, ...]:
    """The part of a mask that a box (x, y, slice; x, y, slice) encloses."""
    first, last = box.view(2, -1).flip(1).tolist()
    return tuple(slice(a, b) for a, b in zip(first, last, strict=True))


def test_each_digit_fills_its_box_to_the_edges_and_no_other(items: list[Item]) -> None:
    for item in items:
        covered = torch.zeros_like(item.mask)
        for box, label in zip(item.boxes, item.classes, strict=True):
            inside = item.mask[ranges(box)]
            assert set(inside.unique().tolist()) <= {0, int(label)}
            ink = inside == label
            for axis in range(ink.ndim):
                filled = ink.movedim(axis, 0).flatten(1).any(1)
                assert filled[0]
                assert filled[-1]
            assert max(inside.shape[-2:]) <= SIDES[1] * (1 if ink.ndim == 2 else 1.5)
            covered[ranges(box)] += 1
        assert covered.max() == 1
        assert (covered[item.mask > 0] == 1).all()
    assert {int(label) for item in items for label in item.classes} == set(range(1, 11))
    assert max(len(item.classes) for item in items) > 1


def test_digits_are_brighter_than_what_surrounds_them(items: list[Item]) -> None:
    for item in items:
        pixels, ink = item.image[0].double(), item.mask > 0
        assert pixels[ink].mean() > pixels[~ink].mean() + 10


def test_digits_appear_and_move(pool: Labelled) -> None:
    appear = move = 0
    for seed in range(20):
        item = draw_item(pool, seed, (8, 48, 48))
        for box in item.boxes:
            inside = item.mask[ranges(box)] > 0
            first, last = (inside[z].nonzero().min(0).values for z in (0, -1))
            appear += int(len(inside) < 8)
            move += int(not torch.equal(first, last))
            assert inside.flatten(1).any(1).all(), "a digit is in all slices from its first to its last"
    assert appear > 10
    assert move > 10


@pytest.mark.parametrize("border", [0, 1, 3])
def test_the_border_is_what_is_near_a_digit(pool: Labelled, border: int) -> None:
    mask = draw_item(pool, 0, (2, 32, 40)).mask
    found = with_ignored_border(mask, border)
    slices, height, width = mask.shape
    for z in range(slices):
        for y in range(height):
            for x in range(width):
                around = mask[z, max(0, y - border) : y + border + 1, max(0, x - border) : x + border + 1]
                expected = 255 if mask[z, y, x] == 0 and around.any() else mask[z, y, x]
                assert found[z, y, x] == expected
    image, classes = DigitCanvas("train", 1, (32, 40), border, pool)[0]
    assert bool((classes == 255).any()) == (border > 0)
    assert image.shape == (1, 32, 40)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_inputs_are_normalized(size: tuple[int, ...]) -> None:
    """With the digits of MNIST-5k."""
    canvas = DigitCanvas("train", 64, size)
    pixels = torch.stack([image for image, _ in canvas])
    assert abs(float(pixels.mean())) < 0.25
    assert 0.75 < float(pixels.std()) < 1.25
    ink = sum(float((mask > 0).double().mean()) for _, mask in canvas) / len(canvas)
    assert 0.02 < ink < 0.3
