"""Options of the tasks whose images are digits on a canvas or files of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from syncbn.train.config import check_rules, require
from syncbn.train.data.digit_canvas import SIDES
from syncbn.train.data.order import fraction_split

Item = TypeVar("Item")
PREFIX = "task.options."
_SAMPLES = {"train": 256, "validation": 64, "test": 128}


def canvas_size(options: Mapping[str, Any]) -> int | None:
    """The number of training images on a digit canvas; None for files."""
    canvas = options.get("data", "digit_canvas") == "digit_canvas"
    return {**_SAMPLES, **options.get("samples", {})}["train"] if canvas else None


@dataclass(kw_only=True)
class ImageOptions:
    """What `segmentation` and `detection` have in common. ``data`` is a field of each."""

    root: str | None = None
    """Folder of the files."""
    image_size: int | list[int] | None = None
    """Sides of an image, [height, width] or [slices, height, width]; a number stands for equal sides. Files are resized
    to it. null: the task's own."""
    samples: dict[str, int] = field(default_factory=lambda: dict(_SAMPLES))
    """Numbers of `train`, `validation` and `test` images of the `digit_canvas`. `validation` may be 0."""
    validation_fraction: float = 0.0
    """Fraction of the training files that is held out for choices, such as that of a learning rate."""

    def check_images(self, data: str, dims: int, step: int) -> None:
        """Raise ConfigError unless the fields fit to ``data`` and to sides that are multiples of ``step``."""
        canvas = data == "digit_canvas"
        if canvas and isinstance(self.samples, dict):
            self.samples = _SAMPLES | self.samples
        least = {"train": 1, "validation": 0, "test": 1}
        numbers = self.samples.keys() == least.keys() and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= least[part] for part, n in self.samples.items()
        )
        given = self.image_size
        sides = f"a number, or a list of {dims} numbers"
        check_rules(
            self,
            PREFIX,
            ("root", canvas or bool(self.root), f"the folder of {data}"),
            ("root", not canvas or self.root is None, "null with data digit_canvas, which needs no files"),
            ("samples", canvas or self.samples == _SAMPLES, f"nothing with data {data}, which uses all files"),
            ("samples", numbers, "numbers of train, validation and test images (validation may be 0)"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "a number from 0 to below 1"),
            ("validation_fraction", not canvas or self.validation_fraction == 0, "0 with data digit_canvas: `samples`"),
            ("image_size", not isinstance(given, Sequence) or len(given) == dims, sides),
        )
        size, smallest = self.size, SIDES[1] if canvas else 1
        words = f"a height and width of at least {smallest}" + " and a slice or more" * (dims == 3)
        check_rules(
            self,
            PREFIX,
            ("image_size", min(size[-2:]) >= smallest and min(size) >= 1, words),
            ("image_size", all(side % step == 0 for side in size), f"multiples of {step} for this network"),
        )

    def held_out(
        self, train: Sequence[Item], validation: Sequence[Item] | None
    ) -> tuple[Sequence[Item], Sequence[Item] | None]:
        """Training and validation files: those that are there, or the fraction of the training files that is wanted."""
        fraction = self.validation_fraction
        if not fraction:
            return train, validation
        no_classes = torch.zeros(len(train), dtype=torch.int64)
        kept, taken = (part.tolist() for part in fraction_split(no_classes, fraction))
        expected = "0 for a folder with a validation part, else a fraction that leaves images and holds some out"
        require(validation is None and bool(kept) and bool(taken), PREFIX + "validation_fraction", fraction, expected)
        return [train[i] for i in kept], [train[i] for i in taken]

    @property
    def size(self) -> tuple[int, ...]:
        """The sides of an image: (H, W), or (slices, H, W)."""
        default = self.default_size
        given = default if self.image_size is None else self.image_size
        return (given,) * len(default) if isinstance(given, int) else tuple(given)

    @property
    def default_size(self) -> tuple[int, ...]:
        """The sides of an image if ``image_size`` is None."""
        raise NotImplementedError
