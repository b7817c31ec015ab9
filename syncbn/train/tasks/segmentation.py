"""Segmentation: a class for each pixel of an image or volume."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, require
from syncbn.train.data.digit_canvas import DigitCanvas
from syncbn.train.data.mask_folder import (
    MaskedImages,
    MaskReader,
    Pair,
    cityscapes_classes,
    cityscapes_pairs,
    folder_pairs,
    voc_pairs,
)
from syncbn.train.result import Metric
from syncbn.train.task import Datasets, Sum, Task
from syncbn.train.tasks.class_maps import confusion, overlap_metrics, pixel_loss, sample_loss
from syncbn.train.tasks.library_models import grey_to_rgb
from syncbn.train.tasks.segmentation_options import SegmentationOptions
from syncbn.train.tasks.unet import UNet

_Parts = tuple[Dataset[Any], Dataset[Any] | None, Dataset[Any]]  # training, validation and test data


class Segmentation(Task):
    """The task of the options of :class:`SegmentationOptions`, which are its keyword arguments.

    Metrics are counted over the whole set: ``dice``, the mean over classes (background excluded), ``miou``, the mean
    over all classes, and ``pixel_error``. See :mod:`syncbn.train.tasks.class_maps`.
    """

    metric = Metric("dice", higher_is_better=True)
    __signature__ = inspect.signature(SegmentationOptions)  # a wrong name is then found before the task is made

    def __init__(self, **options: Any) -> None:
        self.options = SegmentationOptions(**options)

    def data(self, seed: int) -> Datasets:
        """The data, which are the same for every seed."""
        train, validation, test = _canvases(self.options) if self.options.data == "digit_canvas" else self._files()
        return Datasets(train=train, validation=validation, test=test)

    def _files(self) -> _Parts:
        o = self.options
        assert o.root is not None, "checked by SegmentationOptions"
        train, validation, test = _pairs(o.data, o.root)
        train, validation = o.held_out(train, validation)
        reader = MaskReader(
            size=(o.size[0], o.size[1]),
            num_classes=o.classes,
            ignored=o.ignore_index,
            class_of=cityscapes_classes() if o.data == "cityscapes" else None,
        )
        for_choices = None if validation is None else MaskedImages(validation, reader)
        return MaskedImages(train, reader), for_choices, MaskedImages(test, reader)

    def model(self) -> nn.Module:
        """The network, with torch's BatchNorm."""
        o = self.options
        channels = 1 if o.data == "digit_canvas" else 3
        if o.model == "unet":
            return UNet(o.dims, channels, o.classes, o.width, o.depth)
        return _torchvision_model(o.model, channels, o.classes, o.size)

    def outputs(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Class scores (N, K, \\*size); torchvision's models return them in a dict."""
        found = model(inputs)
        scores: Tensor = found["out"] if isinstance(found, Mapping) else found
        return scores

    def loss(self, outputs: Tensor, targets: Tensor) -> Sum:
        """The loss that the options name."""
        kind, ignored = self.options.loss, self.options.ignore_index
        if kind == "cross_entropy":
            return pixel_loss(outputs, targets, ignored)
        return sample_loss(outputs, targets, ignored, with_cross_entropy=kind == "cross_entropy+dice")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Sum]:
        """``dice``, ``miou``, ``pixel_error``."""
        found = confusion(outputs, targets, self.options.ignore_index)
        return overlap_metrics(found, self.options.first_class)


def _canvases(options: SegmentationOptions) -> _Parts:
    samples, drawing = options.samples, (options.size, options.ignore_border)
    validation = DigitCanvas("validation", samples["validation"], *drawing) if samples["validation"] else None
    return DigitCanvas("train", samples["train"], *drawing), validation, DigitCanvas("test", samples["test"], *drawing)


def _pairs(data: str, root: str) -> tuple[Sequence[Pair], Sequence[Pair] | None, Sequence[Pair]]:
    if data == "masks":
        validation = folder_pairs(root, "validation") if (Path(root) / "validation").is_dir() else None
        return folder_pairs(root, "train"), validation, folder_pairs(root, "test")
    listed = voc_pairs if data == "voc" else cityscapes_pairs
    return listed(root, "train"), None, listed(root, "val")


def _torchvision_model(name: str, channels: int, num_classes: int, size: tuple[int, ...]) -> nn.Module:
    """A segmentation model of torchvision with random weights and one output."""
    models = import_torchvision().models
    known = models.list_models(module=models.segmentation)
    expected = f"unet or a model of torchvision.models.segmentation ({', '.join(known)})"
    require(name in known, "task.options.model", name, expected)
    # torchvision's LR-ASPP has no auxiliary output, and takes the option.
    model: nn.Module = models.get_model(
        name, weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False
    )
    if channels == 1:
        model.register_forward_pre_hook(grey_to_rgb)  # keeps torchvision's architecture and state_dict
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, *size))
    except (ValueError, RuntimeError) as error:
        # For example pooling that leaves nothing of a small image.
        sides = "x".join(map(str, size))
        raise ConfigError("task.options.model", name, f"a network for images of {sides} ({error})") from error
    return model.train()
