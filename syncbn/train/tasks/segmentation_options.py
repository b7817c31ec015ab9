"""The options of the task `segmentation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from syncbn.train.config import check_rules, check_values
from syncbn.train.data.digit_canvas import NUM_CLASSES
from syncbn.train.tasks.image_options import PREFIX, ImageOptions

_CLASSES = {"digit_canvas": NUM_CLASSES, "voc": 21, "cityscapes": 19}
_SIZES = {2: (48, 48), 3: (8, 48, 48)}
_FILES = (256, 256)


@dataclass(kw_only=True)
class SegmentationOptions(ImageOptions):
    """Options of the task `segmentation`, besides those of :class:`ImageOptions`.

    By default images of files are 256 pixels a side, canvases 48, or [8, 48, 48] in 3-D.

    Raises:
        ConfigError: a value of the wrong type or out of range, or values that exclude each other.
    """

    data: Literal["digit_canvas", "masks", "voc", "cityscapes"] = "digit_canvas"
    """`digit_canvas`: digits on a canvas, drawn when the run starts. `masks`: a folder `root` with `train/images/*`,
    `train/masks/*` (PNG files of class numbers under the images' names), the same in `test` and, if there is one, in
    `validation`. `voc`, `cityscapes`: torchvision's data sets in `root`, with their `val` part as the test set."""
    dims: Literal[2, 3] = 2
    """3: volumes, of the `digit_canvas` alone."""
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
        check_values(self, PREFIX, width=1, depth=1, num_classes=2, ignore_border=0)
        canvas, own_classes = self.data == "digit_canvas", self.data == "masks"
        check_rules(
            self,
            PREFIX,
            ("dims", canvas or self.dims == 2, f"2 with data {self.data}; volumes come from digit_canvas"),
            ("dims", self.dims == 2 or self.model == "unet", f"2 with model {self.model}; unet takes volumes"),
            ("ignore_border", canvas or self.ignore_border == 0, f"0 with data {self.data}; it is for digit_canvas"),
            ("num_classes", (self.num_classes is not None) == own_classes, "a number with data masks, else null"),
            ("ignore_index", 0 <= self.ignore_index <= 255, "a number from 0 to 255, as PNG files have them"),
            ("ignore_index", own_classes or self.ignore_index == 255, f"255 with data {self.data}"),
        )
        self.check_images(self.data, self.dims, 2**self.depth if self.model == "unet" else 1)

    @property
    def default_size(self) -> tuple[int, ...]:
        """The sides of an image if ``image_size`` is None."""
        return _SIZES[self.dims] if self.data == "digit_canvas" else _FILES

    @property
    def classes(self) -> int:
        """Number of classes, background included."""
        return self.num_classes or _CLASSES[self.data]

    @property
    def first_class(self) -> int:
        """The first class that `dice` counts."""
        return int(self.background and self.data != "cityscapes")
