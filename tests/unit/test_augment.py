"""Augmentation: draws that are uniform, independent and the same on every device; crops as torchvision cuts them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.data.augment import (
    TRIES,
    AreaCrop,
    Augmentation,
    area_crop,
    crop_images,
    draw_bits,
    draw_crops,
    draw_fractions,
    mix_bits,
)
from syncbn.train.data.order import derive_seed

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLAUSIBLE = (1e-4, 1 - 1e-4)
"""Of a p-value. The draws are fixed, so a test that passes keeps passing; too good a fit is as suspect as a bad one."""


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def grid(epochs: range, indices: range) -> tuple[Tensor, Tensor]:
    """All pairs of an epoch and an index, epoch by epoch: two int64 [n]."""
    pairs = torch.cartesian_prod(torch.tensor(epochs), torch.tensor(indices))
    return pairs[:, 0], pairs[:, 1]


def cells(seed: int, epochs: Tensor, indices: Tensor, padding: int) -> Tensor:
    """The three draws of each sample as one number, 0 .. 2 * (2 * padding + 1)^2 - 1."""
    tops, lefts, flips = draw_crops(seed, epochs, indices, padding)
    return (tops * (2 * padding + 1) + lefts) * 2 + flips


def uniformity(drawn: Tensor, kinds: int) -> float:
    return float(stats.chisquare(drawn.bincount(minlength=kinds).numpy()).pvalue)


# ---- draws


def test_bits_are_those_of_splitmix64() -> None:
    """The first numbers of the published generator from the seed 1234567, as its reference implementation prints."""
    counters = torch.tensor([(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(1, 6)], dtype=torch.uint64)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix_bits(counters.view(torch.int64)).view(torch.uint64).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40])
@pytest.mark.parametrize("padding", [1, 4, 28])
def test_draws_are_as_in_integers_without_a_limit(seed: int, padding: int) -> None:
    """What runs are reproduced from: a transcription in Python's own integers, which do not wrap."""

    def draw(epoch: int, index: int) -> tuple[int, int, bool]:
        x = index * 0x9E3779B97F4A7C15 + epoch * 0x6A09E667F3BCC909 + derive_seed("augment", seed)
        x %= 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        parts = x >> 33, x >> 2 & 0x7FFFFFFF
        top, left = (part * (2 * padding + 1) // 2**31 for part in parts)
        return top, left, x % 2 == 1

    epochs, indices = grid(range(0, 3000, 999), range(0, 2**40, 2**36 + 77))
    drawn = zip(*(d.tolist() for d in draw_crops(seed, epochs, indices, padding)), strict=True)
    assert list(drawn) == [draw(e, i) for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)]


def test_draws_depend_on_nothing_but_seed_epoch_and_index() -> None:
    epochs, indices = grid(range(3), range(100))
    whole = cells(7, epochs, indices, 4)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cells(7, epochs[order], indices[order], 4), whole[order])
    for cut in ([1, 299], [0, 150, 150], [100] * 3):
        parts = zip(epochs.split(cut), indices.split(cut), strict=True)
        assert torch.equal(torch.cat([cells(7, *part, 4) for part in parts]), whole)


@pytest.mark.parametrize("padding", [1, 3, 4, 28])
def test_offsets_and_flips_are_uniform_and_unrelated_to_each_other(padding: int) -> None:
    kinds = 2 * (2 * padding + 1) ** 2
    drawn = cells(0, *grid(range(10), range(50_000)), padding)
    assert (drawn.min(), drawn.max()) == (0, kinds - 1)
    assert PLAUSIBLE[0] < uniformity(drawn, kinds) < PLAUSIBLE[1]


@pytest.mark.parametrize("along", ["indices", "epochs", "seeds"])
def test_draws_are_uniform_along_each_number(along: str) -> None:
    """2000 consecutive ones at each of 300 places: the p-values of 300 chi-square tests are uniform themselves."""
    long, short = range(2000), range(300)
    if along == "indices":
        drawn = cells(3, *grid(short, long), 2).view(300, 2000)
    elif along == "epochs":
        drawn = cells(3, *grid(long, short), 2).view(2000, 300).T
    else:
        drawn = torch.stack([cells(seed, *grid(range(1), short), 2) for seed in long]).T
    values = [uniformity(row, 50) for row in drawn]
    assert PLAUSIBLE[0] < stats.kstest(values, "uniform").pvalue < PLAUSIBLE[1]


def dependence(first: Tensor, second: Tensor, kinds: int) -> float:
    """p-value of the chi-square test that two draws of the same samples are independent and uniform together."""
    return uniformity(first * kinds + second, kinds * kinds)


@pytest.mark.parametrize(
    ("seeds", "epochs", "indices"),
    [(0, 0, lag) for lag in (1, 2, 3, 8, 64, 1000)]
    + [(0, lag, 0) for lag in (1, 2, 7)]
    + [(1, 0, 0), (2, 0, 0), (1, -1, 0), (0, 1, -1), (0, 1, 1)],
)
def test_neighbours_are_independent(seeds: int, epochs: int, indices: int) -> None:
    """Neighbouring samples, epochs and seeds, and those that a sum of the numbers would confuse."""
    at = grid(range(1, 11), range(1, 25_001))
    first, second = cells(4, *at, 2), cells(4 + seeds, at[0] + epochs, at[1] + indices, 2)
    assert PLAUSIBLE[0] < dependence(first, second, 50) < PLAUSIBLE[1]


def test_bits_of_neighbours_are_uncorrelated() -> None:
    """Each of the 64 bits with each bit of the next sample's and the next epoch's: 8192 correlations, of which the
    largest of normal ones would be about 4 standard errors."""
    n = 20_000

    def signs(epoch: int) -> Tensor:
        bits = draw_bits(5, *grid(range(epoch, epoch + 1), range(n + 1)))
        return (bits.unsqueeze(1) >> torch.arange(64) & 1).to(torch.float32) * 2 - 1

    here, there = signs(8), signs(9)
    for other in (here[1:], there[:-1]):
        assert (here[:-1].T @ other / n).abs().max() < 5.5 / n**0.5


def test_fractions_are_as_in_integers_without_a_limit() -> None:
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def draw(epoch: int, index: int) -> list[float]:
        steps = index * 0x9E3779B97F4A7C15 + epoch * 0x6A09E667F3BCC909
        first = mix((steps + derive_seed("augment", 5)) % 2**64)
        return [(mix((first + k * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for k in range(1, 8)]

    epochs, indices = grid(range(0, 3000, 999), range(0, 2**40, 2**36 + 77))
    drawn = draw_fractions(5, epochs, indices, 7)
    assert drawn.tolist() == [draw(e, i) for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)]
    assert torch.equal(draw_fractions(5, epochs, indices, 3), drawn[:, :3])
    assert torch.equal(draw_fractions(5, epochs[7:9], indices[7:9], 7), drawn[7:9])


@pytest.mark.parametrize(("columns", "indices"), [(1, 0), (4, 0), (0, 1), (1, -1), (-1, 1), (4, -1)])
def test_fractions_are_uniform_and_unrelated_to_each_other(columns: int, indices: int) -> None:
    """Those of a sample, and those of neighbours, also where one sample's sequence shifted would be the next one's."""
    cut = (draw_fractions(2, *grid(range(3), range(4001)), 9) * 8).long().view(3, 4001, 9)
    first = cut[:, 1:-1, 1 : 9 - 4].flatten()
    second = cut[:, 1 + indices : 4000 + indices, 1 + columns : 9 - 4 + columns].flatten()
    assert PLAUSIBLE[0] < dependence(first, second, 8) < PLAUSIBLE[1]


# ---- random-area crops


def area_boxes(samples: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    drawn = draw_fractions(0, *grid(range(1), range(samples)), 4 * TRIES).view(-1, TRIES, 4)
    return [area_crop(tries, height, width) for tries in drawn.tolist()]


def test_area_and_aspect_are_uniform_where_any_aspect_fits() -> None:
    """In a square, below three quarters of its area; pixels so many that rounding to them does not show."""
    tops, lefts, heights, widths = np.array(area_boxes(20_000, 100_000, 100_000)).T
    areas, aspects = heights / 1e5 * widths / 1e5, np.log(widths / heights)
    kept = areas < 0.75
    limit = math.log(4 / 3)
    for values in (
        (areas[kept] - 0.08) / 0.67,
        (aspects[kept] + limit) / (2 * limit),
        (tops / (1e5 - heights + 1))[kept],
        (lefts / (1e5 - widths + 1))[kept],
    ):
        assert values.min() < 0.001
        assert values.max() > 0.999
        assert PLAUSIBLE[0] < stats.kstest(values, "uniform").pvalue < PLAUSIBLE[1]
    assert areas.min() > 0.08 - 1e-4
    assert np.abs(aspects).max() < limit + 1e-4
    assert PLAUSIBLE[0] < stats.spearmanr(areas[kept], aspects[kept]).pvalue < PLAUSIBLE[1]


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (224, 224), (20, 200), (200, 19), (1, 1), (3, 4)]
)
def test_boxes_are_torchvisions_for_the_same_numbers(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its RandomResizedCrop with the fractions in place of its draws, in the order in which it asks for them."""
    transform = import_torchvision("transforms.v2").RandomResizedCrop(224)
    drawn = draw_fractions(0, *grid(range(1), range(300)), 4 * TRIES).view(-1, TRIES, 4).tolist()
    expected = []
    with monkeypatch.context() as patch:
        for tries in drawn:
            numbers = Numbers(tries)
            patch.setattr(torch.Tensor, "uniform_", lambda _, low, high, n=numbers: n.uniform(low, high))
            patch.setattr(torch, "randint", lambda low, high, size, n=numbers: n.integer(low, high))
            params = transform.make_params([torch.empty(3, height, width)])
            expected.append(tuple(params[key] for key in ("top", "left", "height", "width")))
    assert [area_crop(tries, height, width) for tries in drawn] == expected


class Numbers:
    """Area and aspect of one try after another, and the row and column of the one that fits."""

    def __init__(self, tries: list[list[float]]) -> None:
        self.tries = iter(tries)
        self.current: list[float] = []
        self.place = 0

    def uniform(self, low: float, high: float) -> Tensor:
        if self.place != 1:
            self.current, self.place = next(self.tries), 0
        return torch.tensor([float(low) + (float(high) - float(low)) * self.take()], dtype=torch.float64)

    def integer(self, low: int, high: int) -> Tensor:
        return torch.tensor([low + int((high - low) * self.take())])

    def take(self) -> float:
        self.place += 1
        return self.current[self.place - 1]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 400, (0, 193, 10, 13)),  # 4/3 of the height
        (400, 9, (194, 0, 12, 9)),  # 4/3 of the width
        (30, 36, (0, 0, 30, 36)),
    ],
    ids=["wide", "high", "neither"],
)
def test_the_central_crop_is_taken_where_none_fits(
    height: int, width: int, expected: tuple[int, int, int, int]
) -> None:
    assert area_crop([[0.999, 0.001, 0.5, 0.5], [0.999, 0.999, 0.5, 0.5]] * 5, height, width) == expected


def test_an_area_crop_is_torchvisions_cut_at_the_drawn_box() -> None:
    functional = import_torchvision("transforms.v2.functional")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    flips, seen = 0, set()
    for epoch, index in itertools.product(range(4), range(50)):
        flip, *rest = draw_fractions(3, torch.tensor([epoch]), torch.tensor([index]), 1 + 4 * TRIES)[0].tolist()
        box = area_crop([rest[i : i + 4] for i in range(0, 4 * TRIES, 4)], 60, 90)
        cut = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2])).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(functional.resized_crop(image, *box, [32, 32]), cut)
        expected = np.array(cut)[:, ::-1] if flip < 0.5 else np.array(cut)
        assert np.array_equal(AreaCrop(32, 3)(image, epoch, index), expected)
        flips += flip < 0.5
        seen.add(box)
    assert 75 <= flips <= 125
    assert len(seen) == 200


# ---- crops


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
@pytest.mark.parametrize(
    "shape",
    [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 5, 5), (3, 12, 20), (2, 33, 17)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_crops_are_torchvisions(kind: Any, shape: tuple[int, int, int]) -> None:
    """Each sample by itself: padded, cut at the offsets drawn for it, and mirrored, by torchvision."""
    functional = import_torchvision("transforms.v2.functional")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (200, *shape), dtype=torch.uint8, generator=generator)
    epochs, indices = grid(range(4), range(50))
    height, width = shape[1:]
    padding = max(1, min(height, width) // 8)
    expected = []
    for image, top, left, flip in zip(images, *draw_crops(9, epochs, indices, padding), strict=True):
        cut = functional.crop(functional.pad(image, [padding] * 4), int(top), int(left), height, width)
        expected.append(functional.horizontal_flip(cut) if flip and kind == "crop_flip" else cut)
    augmented = Augmentation(kind, 9)(images, epochs, indices)
    assert augmented.dtype == torch.uint8
    assert torch.equal(augmented, torch.stack(expected))


def test_offsets_reach_as_far_as_torchvisions() -> None:
    """The draws of its RandomCrop for the same padding: from none of it to all of it."""
    v2 = import_torchvision("transforms.v2")
    transform = v2.RandomCrop((32, 32), padding=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = [transform.make_params([torch.empty(3, 32, 32)]) for _ in range(500)]
    tops, lefts, _ = draw_crops(0, *grid(range(1), range(500)), 4)
    assert set(tops.tolist()) == {p["top"] for p in params} == set(range(9))
    assert set(lefts.tolist()) == {p["left"] for p in params}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_crops_of_any_type_and_layout(dtype: torch.dtype) -> None:
    images = torch.arange(4 * 3 * 6 * 6).view(4, 3, 6, 6).to(dtype)
    draws = draw_crops(1, *grid(range(1), range(4)), 1)
    cut = crop_images(images, *draws, padding=1)
    assert cut.dtype == dtype
    assert torch.equal(crop_images(images.to(memory_format=torch.channels_last), *draws, padding=1), cut)


def test_an_image_is_kept_in_the_middle_and_moves_by_the_offset() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    for top, left in itertools.product(range(3), repeat=2):
        cut = crop_images(image, torch.tensor([top]), torch.tensor([left]), None, padding=1)
        assert cut.nonzero().tolist() == [[0, 0, 5 - top, 5 - left]]


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_no_images(kind: Any) -> None:
    none = torch.empty(0, dtype=torch.int64)
    out = Augmentation(kind, 0)(torch.empty(0, 3, 16, 16, dtype=torch.uint8), none, none)
    assert (out.shape, out.dtype) == ((0, 3, 16, 16), torch.uint8)


# ---- devices


def test_nothing_is_read_on_the_host() -> None:
    """Tensors without values suffice: no operation asks for one, and none is of another device."""
    epochs, indices = (torch.empty(5, dtype=torch.int64, device="meta") for _ in range(2))
    out = Augmentation("crop_flip", 0)(torch.empty(5, 3, 16, 16, dtype=torch.uint8, device="meta"), epochs, indices)
    assert (out.shape, out.dtype, out.device.type) == ((5, 3, 16, 16), torch.uint8, "meta")


@needs_cuda
def test_cuda_gives_the_same_bits_and_the_host_does_not_wait() -> None:
    images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = grid(range(40), range(50))
    expected = Augmentation("crop_flip", 3)(images, *numbers)
    there = [tensor.cuda() for tensor in (images, *numbers)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = Augmentation("crop_flip", 3)(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), expected)
