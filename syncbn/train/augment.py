"""Training augmentation whose draws are a function of (seed, epoch, sample) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.order import derive_seed


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding (an eighth of the side), and horizontal flip, of uint8 images.

    The transforms are torchvision's, which draw from torch's global generator; it is seeded anew for every sample and
    put back afterwards. So a sample's image depends on neither the batch it is in, its place there, the rank nor the
    loader process.
    """

    kind: Literal["crop", "crop_flip"]
    """What is drawn."""
    seed: int
    """The run's seed."""

    def __call__(self, images: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Augment uint8 [n, C, H, W], sample i with the draws of ``keys[i]``, an (epoch, index); the same shape."""
        if len(images) == 0:
            return images
        transform = _transform(self.kind, images.shape[-2], images.shape[-1])
        augmented = torch.empty_like(images)
        with torch.random.fork_rng(devices=[]):  # the CPU's generator is the only one that is touched
            for image, (epoch, index), out in zip(images, keys, augmented, strict=True):
                torch.default_generator.manual_seed(derive_seed("augment", self.seed, epoch, index))
                out.copy_(transform(image))
        return augmented


@lru_cache  # made where it is used, so an Augmentation travels to loader processes without importing torchvision first
def _transform(kind: str, height: int, width: int) -> Any:
    v2 = import_torchvision("transforms.v2")
    steps = [v2.RandomCrop((height, width), padding=max(1, min(height, width) // 8))]
    if kind == "crop_flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)
