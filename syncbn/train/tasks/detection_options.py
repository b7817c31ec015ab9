"""The options of the task `detection`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from syncbn.train.config import check_rules, check_values
from syncbn.train.tasks.image_options import PREFIX, ImageOptions

_CANVAS, _FILES = (64, 64), (512, 512)


@dataclass(kw_only=True)
class DetectionOptions(ImageOptions):
    """Options of the task `detection`, besides those of :class:`ImageOptions`.

    By default images of files are 512 pixels a side, canvases 64.

    Raises:
        ConfigError: a value of the wrong type or out of range, or values that exclude each other.
    """

    data: Literal["digit_canvas", "boxes", "coco"] = "digit_canvas"
    """`digit_canvas`: digits on a canvas, drawn when the run starts. `boxes`: a folder `root` with
    `train/annotations.json` in COCO's format, `train/images/*`, the same in `test` and, if there is one, in
    `validation`. `coco`: COCO 2017, unpacked in `root`, with its `val` part as the test set."""
    backbone: str = "small"
    """`small`: two 3x3 convolutions at each level. Else a ResNet of torchvision.models, with random weights."""
    width: int = 16
    """`small`: channels at half the resolution; each further level has twice as many."""
    pyramid_width: int = 32
    """Channels of the pyramid and of the heads; 256 in the paper."""
    levels: list[int] = field(default_factory=lambda: [2, 3])
    """Levels of the pyramid, one after the other; level l has 1 / 2**l of the image's resolution. In the paper,
    [3, 4, 5, 6, 7]."""
    anchor_scale: float = 4.0
    """Sides of the smallest anchors of a level, as a multiple of its stride."""

    def __post_init__(self) -> None:
        check_values(self, PREFIX, width=1, pyramid_width=1)
        levels = self.levels
        first = 1 if self.backbone == "small" else 2
        row = bool(levels) and levels == list(range(levels[0], levels[0] + len(levels)))
        ends = row and levels[0] in range(first, 6) and (levels[-1] <= 5 or levels[-1] == 7)
        check_rules(
            self,
            PREFIX,
            ("levels", ends, f"consecutive levels from {first} on, which end at 5 or below, or at 7"),
            ("anchor_scale", self.anchor_scale > 0, "a number above 0"),
        )
        self.check_images(self.data, 2, 2 ** min(levels[-1], 5))

    @property
    def default_size(self) -> tuple[int, ...]:
        """The sides of an image if ``image_size`` is None."""
        return _CANVAS if self.data == "digit_canvas" else _FILES
