"""The task `segmentation`: its options and their errors, its networks, a short training, the packaged configuration."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import syncbn
from syncbn.train.config import ConfigError, config_from_dict, load_config
from syncbn.train.loop import train
from syncbn.train.task import Datasets
from syncbn.train.tasks.named import load_task
from syncbn.train.tasks.segmentation import Segmentation
from syncbn.train.tasks.segmentation_options import SegmentationOptions
from syncbn.train.tasks.unet import UNet

CONFIGS = Path(__file__).resolve().parents[2] / "configs/train"
SMALL: dict[str, Any] = {
    "image_size": 32,
    "samples": {"train": 64, "validation": 8, "test": 16},
    "width": 4,
    "depth": 2,
}


# ---- options


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": "coco"}, "one of 'digit_canvas', 'masks', 'voc', 'cityscapes'"),
    "dims": ({"dims": 4}, "one of 2, 3"),
    "dims of files": ({"data": "voc", "root": "x", "dims": 3}, "2 with data voc"),
    "dims of a model": ({"dims": 3, "model": "fcn_resnet50"}, "2 with model fcn_resnet50"),
    "root missing": ({"data": "masks", "num_classes": 2}, "the folder of masks"),
    "root not needed": ({"root": "x"}, "null with data digit_canvas"),
    "image_size small": ({"image_size": 16}, "a height and width of at least 28"),
    "image_size zero": ({"data": "voc", "root": "x", "image_size": 0}, "a height and width of at least 1"),
    "image_size sides": ({"image_size": [32, 32], "dims": 3}, "a number, or a list of 3 numbers"),
    "image_size depth": ({"image_size": 36}, "multiples of 8"),
    "image_size type": ({"image_size": "large"}, "an integer or a list"),
    "samples unknown": ({"samples": {"training": 3}}, "numbers of train, validation and test"),
    "samples none": ({"samples": {"test": 0}}, "numbers of train, validation and test"),
    "samples type": ({"samples": 12}, "a mapping"),
    "samples of files": ({"data": "voc", "root": "x", "samples": {"train": 3}}, "nothing with data voc"),
    "validation_fraction": ({"data": "voc", "root": "x", "validation_fraction": 1.0}, "a number from 0 to below 1"),
    "validation_fraction of a canvas": ({"validation_fraction": 0.2}, "0 with data digit_canvas"),
    "ignore_border": ({"ignore_border": -1}, "an integer of at least 0"),
    "ignore_border of files": ({"data": "voc", "root": "x", "ignore_border": 1}, "0 with data voc"),
    "width": ({"width": 0}, "an integer of at least 1"),
    "depth": ({"depth": 0}, "an integer of at least 1"),
    "num_classes missing": ({"data": "masks", "root": "x"}, "a number with data masks, else null"),
    "num_classes not needed": ({"num_classes": 11}, "a number with data masks, else null"),
    "num_classes one": ({"data": "masks", "root": "x", "num_classes": 1}, "an integer of at least 2"),
    "ignore_index": ({"data": "masks", "root": "x", "num_classes": 2, "ignore_index": -100}, "a number from 0 to 255"),
    "ignore_index of a canvas": ({"ignore_index": 0}, "255 with data digit_canvas"),
    "loss": ({"loss": "focal"}, "one of 'cross_entropy', 'dice', 'cross_entropy+dice'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_options(name: str) -> None:
    options, expected = MISTAKES[name]
    key = name.split()[0]
    with pytest.raises(ConfigError) as error:
        Segmentation(**options)
    assert str(error.value).startswith(f"task.options.{key}: got ")
    assert expected in str(error.value)


def test_an_unknown_option() -> None:
    config = config_from_dict({"task": {"name": "segmentation", "options": {"wdith": 8}}})
    with pytest.raises(ConfigError, match=r"task.options: got .*keyword arguments of segmentation .*'wdith'"):
        load_task(config, torch.device("cpu"))


def test_an_unknown_model() -> None:
    with pytest.raises(ConfigError, match=r"task.options.model: got 'resnet50', expected unet or .*lraspp_mobilenet"):
        Segmentation(model="resnet50").model()


def test_sizes_and_classes() -> None:
    assert SegmentationOptions().size == (48, 48)
    assert SegmentationOptions(dims=3).size == (8, 48, 48)
    assert SegmentationOptions(dims=3, image_size=32).size == (32, 32, 32)
    assert SegmentationOptions(image_size=[32, 64]).size == (32, 64)
    assert SegmentationOptions(samples={"train": 5}).samples == {"train": 5, "validation": 64, "test": 128}
    assert SegmentationOptions(data="voc", root="x").classes == 21
    masks = SegmentationOptions(data="masks", root="x", num_classes=3, background=False)
    assert (masks.classes, masks.first_class, SegmentationOptions().first_class) == (3, 0, 1)


# ---- networks


@pytest.mark.parametrize(
    ("dims", "depth", "size"),
    [(2, 1, (2, 2)), (2, 3, (24, 8)), (2, 2, (20, 12)), (3, 1, (2, 6, 4)), (3, 2, (4, 12, 8))],
    ids=str,
)
def test_unet_shapes(dims: int, depth: int, size: tuple[int, ...]) -> None:
    model = UNet(dims, 3, 5, width=2, depth=depth)
    scores = model(torch.randn(3, 3, *size))
    assert scores.shape == (3, 5, *size)
    scores.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()), "each level reaches the scores"


@pytest.mark.parametrize("dims", [2, 3])
def test_unet_is_made_of_batchnorm_and_convolutions_without_bias(dims: int) -> None:
    model = UNet(dims, 1, 11, width=4, depth=3)
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1])]
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1])]
    assert [n.num_features for n in norms] == [c.out_channels for c in convolutions[:-1]]
    assert [n.num_features for n in norms] == [4, 4, 8, 8, 16, 16, 32, 32, 16, 16, 8, 8, 4, 4]
    assert [c.bias is None for c in convolutions] == [True] * 14 + [False]
    for c in convolutions[:-1]:  # He et al.: variance 2 / fan-out
        fan_out = c.out_channels * 3**dims
        # The spread of a sample variance of n normal numbers is its value times sqrt(2 / n); five of these are allowed.
        assert float(c.weight.detach().var()) == pytest.approx(2 / fan_out, rel=5 * math.sqrt(2 / c.weight.numel()))


def test_the_initial_weights_follow_torchs_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in Segmentation(**SMALL).model().parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_unet_takes_an_empty_batch(dims: int, norm: str) -> None:
    """As on a process that a last, smaller batch leaves without samples."""
    model: nn.Module = UNet(dims, 1, 3, width=2, depth=2)
    if norm == "sync":
        model = syncbn.convert(model, syncbn.SyncBatchNorm)
    scores = model(torch.zeros(0, 1, *[8] * dims))
    assert scores.shape == (0, 3, *[8] * dims)
    scores.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


TORCHVISION = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name: str) -> None:
    task = Segmentation(model=name, image_size=[32, 48])
    model = task.model()
    assert model.training
    assert getattr(model, "aux_classifier", None) is None
    images, classes = torch.randn(2, 1, 32, 48), torch.randint(11, (2, 32, 48))
    scores = task.outputs(model, images, classes)
    assert scores.shape == (2, 11, 32, 48)
    assert task.loss(scores, classes).total.item() > 0
    with torch.no_grad():
        assert task.outputs(model.eval(), images[:0], classes[:0]).shape == (0, 11, 32, 48)


# ---- training


def configured(**changes: Any) -> Any:
    return config_from_dict(
        {
            "gpus": 2,
            "per_gpu_batch_size": 4,
            "device": "cpu",
            "norm": {"name": "sync"},
            "optimizer": {"name": "adamw", "lr": 0.02, "schedule": "one_cycle"},
            "budget": {"epochs": 80, "eval_every": 80, "eval_batch_size": 16, "checkpoint_every": 0},
            "evaluation": {"batch": False, "population_samples": []},
            **changes,
            "task": {"name": "segmentation", "options": SMALL | changes.get("task", {})},
        }
    )


LOSSES = ["cross_entropy", "dice", "cross_entropy+dice"]


class Memory(Segmentation):
    """Tested on the training images: few steps are enough to tell the digits of four images apart."""

    def data(self, seed: int) -> Datasets:
        found = super().data(seed)
        return dataclasses.replace(found, test=found.train)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_short_training_learns(loss: str) -> None:
    samples = {"train": 4, "validation": 4, "test": 4}
    config = configured(task={"loss": loss, "ignore_border": 1, "samples": samples, "width": 8, "depth": 3})
    result = train(config, task=Memory(**config.task.options))
    assert (result.status, result.metric.name) == ("ok", "dice")
    assert (result.train_samples, result.validation_samples, result.test_samples) == (4, 4, 4)
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])
    assert set(result.test) == set(result.validation) == {"loss", "dice", "miou", "pixel_error"}
    # Only background is 0; the right ink with one class, or with classes at random, is at most 0.1 or so.
    assert result.score > 0.7


def test_a_short_training_on_volumes_learns() -> None:
    options = {"dims": 3, "image_size": [4, 32, 32], "samples": {"train": 4, "validation": 0, "test": 4}, "width": 8}
    config = configured(task=options, budget={"epochs": 40, "eval_every": 40, "checkpoint_every": 0})
    result = train(config, task=Memory(**config.task.options))
    assert (result.status, result.steps, result.validation) == ("ok", 40, None)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert result.score > 0.3


def test_the_packaged_configuration() -> None:
    config = load_config(CONFIGS / "segmentation.yaml")
    task = load_task(config, torch.device("cpu"))
    assert isinstance(task, Segmentation)
    assert task.options.samples["validation"] > 0
