"""Training augmentation, whose random draws are a function of (seed, epoch, sample).

The draws are a hash of these numbers in int64 tensor arithmetic: the same bits on every device, whatever the batch, the
rank and the loader process. No generator's state is read or changed.
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

# Of a random-area crop: its share of an image's area, its width over height, and the tries before the central crop.
AREAS = (0.08, 1.0)
ASPECTS = (3 / 4, 4 / 3)
TRIES = 10


def _as_int64(bits: int) -> int:
    """The signed number with the same 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


# Counter steps from sample to sample and from epoch to epoch: 2^64 times the fractions of the golden ratio and of the
# root of 2, the latter made odd. Within a million epochs no two of the first 10^13 samples share a counter.
_SAMPLE_STEP = _as_int64(0x9E3779B97F4A7C15)
_EPOCH_STEP = _as_int64(0x6A09E667F3BCC909)


def mix_bits(counters: Tensor) -> Tensor:
    """SplitMix64's output function, elementwise: int64 counters to int64 that are uniform over all 64 bits (Steele, Lea
    and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of Stafford's variant 13)."""
    # The hash shifts unsigned numbers; torch's >> keeps the sign, which the masks remove.
    x = (counters ^ ((counters >> 30) & ((1 << 34) - 1))) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _as_int64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def draw_bits(seed: int, epochs: Tensor, indices: Tensor) -> Tensor:
    """64 random bits per sample: int64 [n], of each sample's epoch and index in its set, int64 [n]."""
    return mix_bits(indices * _SAMPLE_STEP + epochs * _EPOCH_STEP + _as_int64(derive_seed("augment", seed)))


def draw_fractions(seed: int, epochs: Tensor, indices: Tensor, count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) per sample: float64 [n, count], multiples of 2^-53."""
    # Hashed bits are the start of each sample's sequence: neighbouring counters would give the same sequence, shifted.
    steps = torch.arange(1, count + 1, device=indices.device) * _SAMPLE_STEP
    words = mix_bits(draw_bits(seed, epochs, indices).unsqueeze(1) + steps)
    return (words >> 11 & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def draw_crops(seed: int, epochs: Tensor, indices: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tops and lefts, int64 [n], uniform over 0 .. 2 * padding; flips, bool [n], true for half of the samples."""
    bits = draw_bits(seed, epochs, indices)
    # Bits 33 to 63, 2 to 32, and 0. The product keeps offsets uniform to 2^-31; a remainder would favour small ones.
    tops, lefts = (((bits >> shift & ((1 << 31) - 1)) * (2 * padding + 1)) >> 31 for shift in (33, 2))
    return tops, lefts, (bits & 1).to(torch.bool)


def crop_images(images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor | None, padding: int) -> Tensor:
    """Pad images [n, C, H, W] with ``padding`` zeros on each side, cut [n, C, H, W] out of them, and mirror some crops.

    ``tops`` and ``lefts``, int64 [n], are the first row and column of each crop in the padded image, 0 .. 2 * padding.
    ``flips``, bool [n], says which are mirrored left to right; None mirrors none. n may be 0.
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
    """First row, first column, height and width of a random-area crop, from uniform numbers in [0, 1).

    Each try has four numbers: area (uniform over `AREAS`), aspect (log-uniform over `ASPECTS`), row and column. The
    first try that fits is taken; if none does, the central crop with as much of the longer side as `ASPECTS` allow
    (Szegedy et al. 2015, arXiv 1409.4842, section 6, as in torchvision's ``RandomResizedCrop``).
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
    """Random-area crop of a PIL image, resized bilinearly to ``size`` by ``size``, and horizontal flip."""

    size: int
    seed: int

    def __call__(self, image: Any, epoch: int, index: int) -> Any:
        functional = import_torchvision("transforms.v2.functional")
        drawn = draw_fractions(self.seed, torch.tensor([epoch]), torch.tensor([index]), 1 + 4 * TRIES)[0]
        box = area_crop(drawn[1:].view(TRIES, 4).tolist(), image.height, image.width)
        cut = functional.resized_crop(image, *box, [self.size, self.size])
        return functional.horizontal_flip(cut) if drawn[0] < 0.5 else cut


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding by an eighth of the shorter side, and horizontal flip (``crop_flip``)."""

    kind: Literal["crop", "crop_flip"]
    seed: int

    def __call__(self, images: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        """Augment uint8 [n, C, H, W]; epochs and indices are int64 [n] on the same device. n may be 0."""
        padding = max(1, min(images.shape[-2:]) // 8)
        tops, lefts, flips = draw_crops(self.seed, epochs, indices, padding)
        return crop_images(images, tops, lefts, flips if self.kind == "crop_flip" else None, padding)
