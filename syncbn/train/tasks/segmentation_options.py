"""The options of the task `segmentation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from syncbn.train.config import check_rules, check_values
from syncbn.train.data.digit_canvas import NUM_CLASSES, SIDES

_CLASSES = {"digit_canvas": NUM_CLASSES, "voc": 21, "cityscapes": 19}
_SIZES = {2: (48, 48), 3: (8, 48, 48)}
_FILES = (256, 256)
_SAMPLES = {"train": 256, "validation": 64, "test": 128}


@dataclass(kw_only=True)
class SegmentationOptions:
    """Options of the task `segmentation`.

    Raises:
        ConfigError: a value of the wrong type or out of range, or values that exclude each other.
    """

    data: Literal["digit_canvas", "masks", "voc", "cityscapes"] = "digit_canvas"
    """`digit_canvas`: digits on a canvas, drawn when the run starts. `masks`: a folder `root` with `train/images/*`,
    `train/masks/*` (PNG files of class numbers under the images' names), the same in `test` and, if there is one, in
    `validation`. `voc`, `cityscapes`: torchvision's data sets in `root`, with their `val` part as the test set."""
    root: str | None = None
    """Folder of `masks`, `voc` or `cityscapes`."""
    dims: Literal[2, 3] = 2
    """3: volumes, of the `digit_canvas` alone."""
    image_size: int | list[int] | None = None
    """Sides of an image, [height, width] or [slices, height, width]; a number stands for equal sides. Files are resized
    to it. null: 48 pixels a side, [8, 48, 48] in 3-D, 256 for files."""
    samples: dict[str, int] = field(default_factory=lambda: dict(_SAMPLES))
    """Numbers of `train`, `validation` and `test` images of the `digit_canvas`. `validation` may be 0."""
    validation_fraction: float = 0.0
    """Fraction of the training files that is held out for choices, such as that of a learning rate."""
    ignore_border: int = 0
    """Pixels around each digit of the `digit_canvas` that count nothing."""
    model: str = "unet"
    """`unet`, or the name of a model in torchvision.models.segmentation, without its auxiliary output."""
    width: int = 8
    """`unet`: channels before the first pooling."""
    depth: int = 3
    """`unet`: poolings. Each side of an image is a multiple of 2**depth."""
    num_classes: int | None = None
    """Classes of `masks`; null for the others, which say so themselves."""
    ignore_index: int = 255
    """Class number of the pixels that count nothing."""
    background: bool = True
    """Whether class 0 is background, which `dice` leaves out; `cityscapes` has none."""
    loss: Literal["cross_entropy", "dice", "cross_entropy+dice"] = "cross_entropy+dice"
    """`cross_entropy`: mean over pixels. `dice`: 1 - soft Dice over the classes in a sample's mask, mean over samples.
    `cross_entropy+dice`: each sample's mean cross entropy plus its Dice loss, mean over samples. Pixels are the counted
    ones; samples are those that have any."""

    def __post_init__(self) -> None:
        prefix = "task.options."
        check_values(self, prefix, width=1, depth=1, num_classes=2, ignore_border=0)
        canvas, own_classes = self.data == "digit_canvas", self.data == "masks"
        if canvas and isinstance(self.samples, dict):
            self.samples = _SAMPLES | self.samples
        least = {"train": 1, "validation": 0, "test": 1}
        numbers = self.samples.keys() == least.keys() and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= least[part] for part, n in self.samples.items()
        )
        check_rules(
            self,
            prefix,
            ("root", canvas or bool(self.root), f"the folder of {self.data}"),
            ("root", not canvas or self.root is None, "null with data digit_canvas, which needs no files"),
            ("dims", canvas or self.dims == 2, f"2 with data {self.data}; volumes come from digit_canvas"),
            ("dims", self.dims == 2 or self.model == "unet", f"2 with model {self.model}; unet takes volumes"),
            ("samples", canvas or self.samples == _SAMPLES, f"nothing with data {self.data}, which uses all files"),
            ("samples", numbers, "numbers of train, validation and test images (validation may be 0)"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "a number from 0 to below 1"),
            ("validation_fraction", not canvas or self.validation_fraction == 0, "0 with data digit_canvas: `samples`"),
            ("ignore_border", canvas or self.ignore_border == 0, f"0 with data {self.data}; it is for digit_canvas"),
            ("num_classes", (self.num_classes is not None) == own_classes, "a number with data masks, else null"),
            ("ignore_index", 0 <= self.ignore_index <= 255, "a number from 0 to 255, as PNG files have them"),
            ("ignore_index", own_classes or self.ignore_index == 255, f"255 with data {self.data}"),
        )
        self._check_size(prefix)

    def _check_size(self, prefix: str) -> None:
        given = self.image_size
        sides = f"a number, or a list of {self.dims} numbers"
        right = not isinstance(given, Sequence) or len(given) == self.dims
        least = SIDES[1] if self.data == "digit_canvas" else 1
        step = 2**self.depth if self.model == "unet" else 1
        check_rules(self, prefix, ("image_size", right, sides))
        size = self.size
        smallest = f"a height and width of at least {least}" + " and a slice or more" * (self.dims == 3)
        check_rules(
            self,
            prefix,
            ("image_size", min(size[-2:]) >= least and min(size) >= 1, smallest),
            ("image_size", all(side % step == 0 for side in size), f"multiples of {step} (2**depth) for the unet"),
        )

    @property
    def size(self) -> tuple[int, ...]:
        """The sides of an image: (H, W), or (slices, H, W)."""
        if self.image_size is None:
            return _SIZES[self.dims] if self.data == "digit_canvas" else _FILES
        return (self.image_size,) * self.dims if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def classes(self) -> int:
        """Number of classes, background included."""
        return self.num_classes or _CLASSES[self.data]

    @property
    def first_class(self) -> int:
        """The first class that `dice` counts."""
        return int(self.background and self.data != "cityscapes")
