"""Training augmentation, whose draws are a function of (seed, epoch, sample) alone.

The draws come from a counter-based generator: a hash of the sample's numbers, in int64 tensor arithmetic (which wraps,
as the hash wants). So they are the same bits on every device, and depend on neither the batch that a sample is in, its
place there, the rank nor the loader process; and no generator's state is read or changed.

`Augmentation` works on batches of images that have the size they are used at, where they are, and brings no value to
the host. `AreaCrop` is part of decoding: it cuts one original image of any size, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.data.order import derive_seed

AREAS = (0.08, 1.0)
"""Smallest and largest part of an image's area that a random-area crop asks for."""
ASPECTS = (3 / 4, 4 / 3)
"""Smallest and largest width over height of a random-area crop."""
TRIES = 10
"""Random-area crops that are tried before the central one is taken."""


def _as_int64(bits: int) -> int:
    """The signed number with the same 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


# Steps of the counter from sample to sample and from epoch to epoch: 2^64 times the fractions of the golden ratio and
# of the root of 2, the latter made odd. Within a million epochs no two of the first 10^13 samples share a counter.
_SAMPLE_STEP = _as_int64(0x9E3779B97F4A7C15)
_EPOCH_STEP = _as_int64(0x6A09E667F3BCC909)


def mix_bits(counters: Tensor) -> Tensor:
    """A bijection of 64 bits under which neighbouring counters become unrelated: SplitMix64's output function.

    Args:
        counters: int64, any shape and device.

    Returns:
        int64 of the same shape, uniform over all 64 bits (the sign among them) for distinct counters.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the constants of
    Stafford's variant 13.
    """
    # torch's >> keeps the sign; the masks make it the shift of unsigned numbers that the hash means.
    x = (counters ^ ((counters >> 30) & ((1 << 34) - 1))) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _as_int64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def draw_bits(seed: int, epochs: Tensor, indices: Tensor) -> Tensor:
    """64 random bits for each sample: a pure function of the arguments, elementwise.

    Args:
        seed: the run's seed, any integer.
        epochs: int64 [n], the epoch in which each sample is seen.
        indices: int64 [n], each sample's index in its set, on the same device.

    Returns:
        int64 [n] on that device.
    """
    return mix_bits(indices * _SAMPLE_STEP + epochs * _EPOCH_STEP + _as_int64(derive_seed("augment", seed)))


def draw_fractions(seed: int, epochs: Tensor, indices: Tensor, count: int) -> Tensor:
    """Several uniform numbers for each sample: a pure function of the arguments, elementwise.

    Args:
        seed: the run's seed, any integer.
        epochs: int64 [n], the epoch in which each sample is seen.
        indices: int64 [n], each sample's index in its set, on the same device.
        count: numbers for each sample; the first ones do not depend on it.

    Returns:
        float64 [n, count] on that device, multiples of 2^-53 in [0, 1).
    """
    # A sample's bits are the place where its own sequence of the generator begins: hashed already, as the sequences of
    # neighbouring counters would be each other's, shifted by one.
    steps = torch.arange(1, count + 1, device=indices.device) * _SAMPLE_STEP
    words = mix_bits(draw_bits(seed, epochs, indices).unsqueeze(1) + steps)
    return (words >> 11 & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def draw_crops(seed: int, epochs: Tensor, indices: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sample is cropped and whether it is mirrored: a pure function of the arguments, elementwise.

    Args:
        seed: the run's seed, any integer.
        epochs: int64 [n], the epoch in which each sample is seen.
        indices: int64 [n], each sample's index in its set, on the same device.
        padding: pixels p on each side of the padded image, far below 2^31.

    Returns:
        tops and lefts, int64 [n], uniform over 0 .. 2p (to 2^-31); flips, bool [n], true for half of the samples.
    """
    bits = draw_bits(seed, epochs, indices)
    # Three parts of the bits that do not overlap: 33 to 63, 2 to 32, and 0. A part's fraction of 2^31 is scaled, as a
    # remainder would favour small offsets.
    tops, lefts = (((bits >> shift & ((1 << 31) - 1)) * (2 * padding + 1)) >> 31 for shift in (33, 2))
    return tops, lefts, (bits & 1).to(torch.bool)


def crop_images(images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor | None, padding: int) -> Tensor:
    """Pad each image with zeros, cut an image of the old size out of it, and mirror that where it is asked for.

    Args:
        images: [n, C, H, W], any type; n may be 0.
        tops: int64 [n], the first row of each crop in the padded image, 0 .. 2 * padding.
        lefts: int64 [n], its first column.
        flips: bool [n], whether to mirror the crop left to right; None mirrors none.
        padding: zeros on each of the four sides.

    Returns:
        [n, C, H, W] of the images' type, on their device.
    """
    height, width = images.shape[-2:]
    rows = tops.unsqueeze(1) + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    if flips is not None:
        columns = torch.where(flips.unsqueeze(1), width - 1 - columns, columns)
    columns = lefts.unsqueeze(1) + columns
    places = rows.unsqueeze(2) * (width + 2 * padding) + columns.unsqueeze(1)  # [n, H, W], in the flat padded image
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, places.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)).view(images.shape)


def area_crop(tries: Sequence[Sequence[float]], height: int, width: int) -> tuple[int, int, int, int]:
    """Where a random-area crop of an image is cut: a pure function of uniform numbers.

    A crop has a part of the area that is uniform over `AREAS` and an aspect whose logarithm is uniform over that of
    `ASPECTS`, and lies anywhere in the image. The first one that fits is taken. If none does, it is the central one:
    the whole image, or as much of its longer side as `ASPECTS` allow.

    Args:
        tries: in [0, 1), four for each crop that may be tried: area, aspect, row, column.
        height: pixels of the image from top to bottom.
        width: from left to right.

    Returns:
        The first row, the first column, the height and the width of the crop, all within the image.

    Source: Szegedy et al. 2015 (Going deeper with convolutions, arXiv 1409.4842, section 6), by the rule of
    torchvision's ``RandomResizedCrop``.
    """
    low, high = map(math.log, ASPECTS)
    for area, aspect, row, column in tries:
        pixels = height * width * (AREAS[0] + (AREAS[1] - AREAS[0]) * area)
        ratio = math.exp(low + (high - low) * aspect)
        across, down = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(row * (height - down + 1)), int(column * (width - across + 1)), down, across
    down, across = min(height, round(width / ASPECTS[0])), min(width, round(height * ASPECTS[1]))
    return (height - down) // 2, (width - across) // 2, down, across


@dataclass(frozen=True)
class AreaCrop:
    """Random-area crop of an original image, resized, and horizontal flip: the augmentation that ImageNet is used with.

    The crop is resized bilinearly and without regard to its aspect, as torchvision's ``RandomResizedCrop(size)`` does.
    """

    size: int
    """Side in pixels of what comes out."""
    seed: int
    """The run's seed."""

    def __call__(self, image: Any, epoch: int, index: int) -> Any:
        """A PIL image of ``size`` by ``size``, of one of any size, with the draws of ``epoch`` and ``index``."""
        functional = import_torchvision("transforms.v2.functional")
        drawn = draw_fractions(self.seed, torch.tensor([epoch]), torch.tensor([index]), 1 + 4 * TRIES)[0]
        box = area_crop(drawn[1:].view(TRIES, 4).tolist(), image.height, image.width)
        cut = functional.resized_crop(image, *box, [self.size, self.size])
        return functional.horizontal_flip(cut) if drawn[0] < 0.5 else cut


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding (an eighth of the shorter side), and horizontal flip, of uint8 images.

    The offsets are those of torchvision's ``RandomCrop(size, padding=max(1, side // 8))``.
    """

    kind: Literal["crop", "crop_flip"]
    """What is drawn."""
    seed: int
    """The run's seed."""

    def __call__(self, images: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        """Augment uint8 [n, C, H, W], sample i with the draws of ``epochs[i], indices[i]`` (int64 [n]); n may be 0.

        All three are on one device, and so is the result, which has the shape and the type of ``images``.
        """
        padding = max(1, min(images.shape[-2:]) // 8)
        tops, lefts, flips = draw_crops(self.seed, epochs, indices, padding)
        return crop_images(images, tops, lefts, flips if self.kind == "crop_flip" else None, padding)
