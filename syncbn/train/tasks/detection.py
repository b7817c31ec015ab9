"""Detection: boxes around the objects of an image, and their classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from syncbn.compat import import_torchvision
from syncbn.train.config import require
from syncbn.train.data.box_folder import KEY, Boxed, BoxedImages, box_files, collate_boxes, read_boxes
from syncbn.train.data.digit_canvas import NUM_CLASSES, DigitBoxes
from syncbn.train.result import Metric
from syncbn.train.task import Datasets, Sum, Task
from syncbn.train.tasks.average_precision import average_precision, coco_tools
from syncbn.train.tasks.detection_options import DetectionOptions
from syncbn.train.tasks.library_models import grey_to_rgb
from syncbn.train.tasks.retinanet import RetinaNet, detection_losses, detections, resnet_body, small_body


class Detection(Task):
    """The task of the options of :class:`DetectionOptions`, which are its keyword arguments.

    A RetinaNet whose backbone and pyramid have BatchNorm that is trained, from random weights. Metrics are COCO's:
    ``map``, the mean average precision over overlaps of 0.5 to 0.95, and ``map50``. The loss is a mean over images.
    """

    metric = Metric("map", higher_is_better=True)
    __signature__ = inspect.signature(DetectionOptions)  # a wrong name is then found before the task is made

    def __init__(self, **options: Any) -> None:
        coco_tools()  # found missing here, and not after the first epoch
        self.options = DetectionOptions(**options)
        height, width = self.options.size
        self.size = (height, width)

    def data(self, seed: int) -> Datasets:
        """The data, which are the same for every seed."""
        o = self.options
        if o.data == "digit_canvas":
            train, test = (DigitBoxes(part, o.samples[part], self.size) for part in ("train", "test"))
            number = o.samples["validation"]
            validation = DigitBoxes("validation", number, self.size) if number else None
            return Datasets(train=train, validation=validation, test=test, collate=collate_boxes)
        held_out = self._files.get("validation")
        kept, held_out = o.held_out(self._files["train"], held_out)
        return Datasets(
            train=BoxedImages(kept, self.size),
            validation=None if held_out is None else BoxedImages(held_out, self.size),
            test=BoxedImages(self._files["test"], self.size),
            collate=collate_boxes,
        )

    @cached_property
    def _files(self) -> dict[str, Sequence[Boxed]]:
        """The parts of the data that are there."""
        return {part: images for part, (images, _) in self._annotations.items()}

    @cached_property
    def _annotations(self) -> dict[str, tuple[Sequence[Boxed], list[str]]]:
        o = self.options
        assert o.root is not None, "checked by DetectionOptions"
        own = o.data == "boxes" and (Path(o.root) / "validation").is_dir()
        parts = ("train", "validation", "test") if own else ("train", "test")
        files = {part: box_files(o.data, o.root, part) for part in parts}
        found: dict[str, tuple[Sequence[Boxed], list[str]]] = {
            part: read_boxes(*paths) for part, paths in files.items()
        }
        for part, (_, classes) in found.items():
            expected = f"the categories of the training data, {found['train'][1]}, not {classes}"
            require(classes == found["train"][1], KEY, str(files[part][0]), expected)
        return found

    @property
    def num_classes(self) -> int:
        """Number of classes; a background is none of them."""
        return NUM_CLASSES - 1 if self.options.data == "digit_canvas" else len(self._annotations["train"][1])

    def model(self) -> nn.Module:
        """The network, with torch's BatchNorm."""
        o = self.options
        grey = o.data == "digit_canvas"
        if o.backbone == "small":
            body, levels = small_body(1 if grey else 3, o.width, min(o.levels[-1], 5))
        else:
            models = import_torchvision().models
            known = [name for name in models.list_models(module=models) if "resne" in name]
            require(o.backbone in known, "task.options.backbone", o.backbone, f"small, or one of {', '.join(known)}")
            body, levels = resnet_body(o.backbone)
        model = RetinaNet(body, levels, o.levels, self.num_classes, o.pyramid_width, o.anchor_scale)
        if grey and o.backbone != "small":
            model.register_forward_pre_hook(grey_to_rgb)
        return model

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Sum:
        """The mean over images of the focal loss and the error of the boxes."""
        losses = detection_losses(outputs, targets)
        return Sum(losses.sum(), len(losses))

    def predictions(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> list[Any]:
        """What was found in each image, and what is there."""
        there = []
        for boxes, labels, crowd in zip(targets["boxes"], targets["labels"], targets["crowd"], strict=True):
            real = labels >= 0
            there.append({"boxes": boxes[real], "labels": labels[real], "crowd": crowd[real]})
        return list(zip(detections(outputs, self.size), there, strict=True))

    def metrics_of_set(self, predictions: list[Any]) -> Mapping[str, float]:
        """``map`` and ``map50``."""
        return average_precision(predictions, self.num_classes)
