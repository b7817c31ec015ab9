"""The task `detection`: options, network, loss, detections and precision, against torchvision and by hand."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, config_from_dict, load_config
from syncbn.train.loop import train
from syncbn.train.tasks import retinanet
from syncbn.train.tasks.average_precision import average_precision
from syncbn.train.tasks.detection import Detection
from syncbn.train.tasks.named import load_task

SMALL: dict[str, Any] = {
    "samples": {"train": 32, "validation": 4, "test": 8},
    "width": 4,
    "pyramid_width": 8,
}

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": "voc"}, "one of 'digit_canvas', 'boxes', 'coco'"),
    "root missing": ({"data": "coco"}, "the folder of coco"),
    "root not needed": ({"root": "x"}, "null with data digit_canvas"),
    "levels empty": ({"levels": []}, "consecutive levels from 1 on"),
    "levels gap": ({"levels": [2, 4]}, "consecutive levels from 1 on"),
    "levels without 7": ({"levels": [4, 5, 6]}, "which end at 5 or below, or at 7"),
    "levels high": ({"levels": [6, 7]}, "consecutive levels"),
    "levels of a ResNet": ({"backbone": "resnet18", "levels": [1, 2]}, "consecutive levels from 2 on"),
    "levels type": ({"levels": 3}, "a list, each item an integer"),
    "anchor_scale": ({"anchor_scale": 0.0}, "a number above 0"),
    "image_size": ({"image_size": 60}, "multiples of 8"),
    "image_size of volumes": ({"image_size": [8, 64, 64]}, "a number, or a list of 2 numbers"),
    "width": ({"width": 0}, "an integer of at least 1"),
    "samples": ({"samples": {"test": 0}}, "numbers of train, validation and test"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_options(name: str) -> None:
    options, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        Detection(**options)
    assert str(error.value).startswith(f"task.options.{name.split()[0]}: got ")
    assert expected in str(error.value)


def test_an_unknown_backbone_and_an_unknown_option() -> None:
    with pytest.raises(ConfigError, match=r"task.options.backbone: got 'vgg16', expected small, or one of .*resnet18"):
        Detection(backbone="vgg16").model()
    config = config_from_dict({"task": {"name": "detection", "options": {"level": [2]}}})
    with pytest.raises(ConfigError, match=r"task.options: got .*keyword arguments of detection"):
        load_task(config, torch.device("cpu"))


# ---- network


def places(size: int, levels: list[int]) -> int:
    return sum(9 * (size // 2**level) ** 2 for level in levels)


@pytest.mark.parametrize(
    ("options", "size", "channels", "norms"),
    [
        ({"width": 4, "pyramid_width": 8}, 64, 1, 6 + 4),
        ({"width": 4, "pyramid_width": 8, "levels": [1]}, 32, 1, 2 + 2),
        ({"backbone": "resnet18", "pyramid_width": 8, "levels": [3, 4, 5, 6, 7]}, 128, 1, 20 + 6),
    ],
    ids=["small", "one level", "resnet18"],
)
def test_outputs_have_the_samples_first(options: dict[str, Any], size: int, channels: int, norms: int) -> None:
    model = Detection(**options, image_size=size).model()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    outputs = model(torch.randn(2, channels, size, size))
    anchors = places(size, options.get("levels", [2, 3]))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "logits": (2, anchors, 10),
        "codes": (2, anchors, 4),
        "anchors": (2, anchors, 4),
    }
    (outputs["logits"].sum() + outputs["codes"].sum()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    # A level's anchors have its place in the list of all: sides grow with the stride.
    sides = (outputs["anchors"][0, :, 2:] - outputs["anchors"][0, :, :2]).prod(1).sqrt()
    assert float(sides.min()) == pytest.approx(4 * 2 ** min(options.get("levels", [2])), rel=0.2)


def test_an_empty_batch() -> None:
    model = syncbn.convert(Detection(**SMALL).model(), syncbn.SyncBatchNorm)
    outputs = model(torch.zeros(0, 1, 64, 64))
    assert outputs["logits"].shape == (0, places(64, [2, 3]), 10)
    outputs["logits"].sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


# ---- loss and detections, against torchvision's own RetinaNet


def torchvision_model() -> Any:
    detection = import_torchvision("models.detection")
    backbone = nn.Conv2d(1, 8, 1)
    backbone.out_channels = 8  # type: ignore[assignment]
    sizes = tuple(tuple(4 * 2**level * s for s in retinanet.SCALES) for level in (2, 3))
    anchors = detection.anchor_utils.AnchorGenerator(sizes, (retinanet.RATIOS,) * 2)
    limits = {"topk_candidates": 1000, "detections_per_img": 100}
    return detection.RetinaNet(backbone, 10, anchor_generator=anchors, **limits)


@pytest.fixture
def outputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Detection(**SMALL).model().double()
    images = torch.stack([Detection(**SMALL).data(0).train[i][0] for i in range(3)]).double()
    found = {name: x.detach() for name, x in model(images).items()}
    spread = {"logits": 1.5, "codes": 0.3, "anchors": 0.0}  # a network without training says the same everywhere
    return {name: x + spread[name] * torch.randn_like(x) for name, x in found.items()}


TARGETS = [
    {"boxes": torch.tensor([[4.0, 6, 24, 30], [30, 30, 50, 60]]).double(), "labels": torch.tensor([3, 9])},
    {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.int64)},
    {"boxes": torch.tensor([[10.0, 10, 30, 30]]).double(), "labels": torch.tensor([0])},
]


def padded(targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    from syncbn.train.data.box_folder import collate_boxes

    crowds = [{**target, "crowd": torch.zeros(len(target["labels"]), dtype=torch.bool)} for target in targets]
    return collate_boxes([(torch.zeros(1), target) for target in crowds])[1]


def test_losses_are_those_of_torchvision(outputs: dict[str, Tensor]) -> None:
    model = torchvision_model()
    heads = {"cls_logits": outputs["logits"], "bbox_regression": outputs["codes"]}
    expected = model.compute_loss(TARGETS, heads, list(outputs["anchors"]))
    losses = retinanet.detection_losses(outputs, padded(TARGETS))
    assert losses.shape == (3,)
    total = expected["classification"] + expected["bbox_regression"]
    torch.testing.assert_close(losses.mean(), total, rtol=1e-12, atol=0)


def test_a_crowd_is_not_learnt(outputs: dict[str, Tensor]) -> None:
    targets = padded(TARGETS)
    without = padded([TARGETS[1]] * 3)
    targets["crowd"] = targets["labels"] >= 0
    losses, expected = (retinanet.detection_losses(outputs, each) for each in (targets, without))
    assert torch.equal(losses, expected)


def test_detections_are_those_of_torchvision(outputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = import_torchvision("ops.boxes")
    monkeypatch.setattr(boxes, "batched_nms", retinanet.not_suppressed)  # whose operator may be missing here
    heads = {"cls_logits": [outputs["logits"]], "bbox_regression": [outputs["codes"]]}  # as of one level
    model = torchvision_model()
    expected = model.postprocess_detections(heads, [[each] for each in outputs["anchors"]], [(64, 64)] * 3)
    found = retinanet.detections(outputs, (64, 64))
    assert sum(len(each["scores"]) for each in found) > 50
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12, atol=1e-12)


def test_suppression_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=draw) * 20
    boxes = torch.cat((corners, corners + 5 + torch.rand(60, 2, generator=draw) * 5), 1)
    scores, labels = torch.rand(60, generator=draw), torch.randint(2, (60,), generator=draw)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        rivals = [j for j in kept if labels[j] == labels[i]]
        overlaps = []
        for j in rivals:
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            shared = max(float(width), 0) * max(float(height), 0)
            areas = [float((boxes[k, 2] - boxes[k, 0]) * (boxes[k, 3] - boxes[k, 1])) for k in (i, j)]
            overlaps.append(shared / (sum(areas) - shared))
        if all(overlap <= 0.5 for overlap in overlaps):
            kept.append(i)
    assert 10 < len(kept) < 60
    assert retinanet.not_suppressed(boxes, scores, labels, 0.5).tolist() == kept


# ---- precision


def truth(*boxes: list[float], label: int = 0, crowd: bool = False) -> dict[str, Tensor]:
    number = len(boxes)
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.full((number,), label),
        "crowd": torch.full((number,), crowd),
    }


def answer(*boxes: list[float], scores: list[float], label: int = 0) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.full((len(boxes),), label),
    }


A, B, FAR = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [60.0, 60, 70, 70]


def test_precision_by_hand() -> None:
    perfect = [(answer(A, B, scores=[0.9, 0.8]), truth(A, B)), (answer(A, scores=[0.7]), truth(A))]
    assert average_precision(perfect, 2) == pytest.approx({"map": 1.0, "map50": 1.0})
    # Found, false, found: precision is 1 up to a recall of a half, then 2/3. COCO takes it at 101 recalls.
    ranked = [(answer(A, FAR, B, scores=[0.9, 0.8, 0.7]), truth(A, B))]
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert average_precision(ranked, 1) == pytest.approx({"map": expected, "map50": expected})
    # An overlap of 0.8 counts at 0.5 to 0.8, which are seven of ten.
    assert average_precision([(answer([0.0, 0, 10, 8], scores=[0.9]), truth(A))], 1) == pytest.approx(
        {"map": 0.7, "map50": 1.0}
    )
    # The mean over the classes that occur.
    classes = [(answer(A, scores=[0.9]), truth(A)), (answer(A, scores=[0.95]), truth(B, label=2))]
    assert average_precision(classes, 5)["map50"] == pytest.approx(0.25)


def test_precision_of_special_cases() -> None:
    nothing = answer(scores=[])
    assert average_precision([(nothing, truth(A))], 1) == {"map": 0.0, "map50": 0.0}
    assert average_precision([(nothing, truth()), (answer(A, scores=[0.9]), truth(A))], 1)["map"] == pytest.approx(1.0)
    assert all(math.isnan(x) for x in average_precision([(answer(A, scores=[0.9]), truth())], 1).values())
    # Boxes within a crowd are not false.
    there = {name: torch.cat((truth(A)[name], truth(B, crowd=True)[name])) for name in ("boxes", "labels", "crowd")}
    assert average_precision([(answer(B, A, scores=[0.9, 0.8]), there)], 1)["map"] == pytest.approx(1.0)


def test_without_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'syncbn\[detection\]'"):
        average_precision([(answer(A, scores=[0.9]), truth(A))], 1)


# ---- data and training


def test_the_boxes_of_the_canvas() -> None:
    task = Detection(**SMALL)
    data = task.data(0)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 4, 8)
    assert Detection(samples={"train": 2, "validation": 0, "test": 1}).data(0).validation is None
    image, target = data.train[3]
    _, mask = super(type(data.train), data.train).__getitem__(3)
    assert image.shape == (1, 64, 64)
    assert len(target["boxes"]) == len(target["labels"]) == len(target["crowd"]) >= 1
    assert not target["crowd"].any()
    for (left, top, right, bottom), label in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
        box = mask[top:bottom, left:right]
        assert (box == label + 1).any(1).all(), "the digit fills the box"
        assert (box == label + 1).any(0).all()


def test_a_short_training(tmp_path: Any) -> None:
    samples = {"train": 64, "validation": 0, "test": 16}
    options = {"samples": samples, "width": 8, "pyramid_width": 16}
    config = config_from_dict(
        {
            "gpus": 2,
            "per_gpu_batch_size": 4,
            "task": {"name": "detection", "options": options},
            "norm": {"name": "sync"},
            "optimizer": {"name": "adamw", "lr": 0.003, "schedule": "one_cycle"},
            "budget": {"epochs": 30, "eval_every": 30, "eval_batch_size": 16},
            "evaluation": {"batch": False, "population_samples": []},
        }
    )
    result = train(config, tmp_path)
    assert result.status == "ok"
    assert result.metric.name == "map"
    assert result.losses[-1] < result.losses[0] / 2
    assert 0 <= result.test["map"] <= result.test["map50"] <= 1
    assert result.test["map50"] > 0.01


def test_the_packaged_configuration_is_possible() -> None:
    config = load_config("configs/train/detection.yaml")
    assert isinstance(load_task(config, torch.device("cpu")), Detection)
