"""RetinaNet (Lin et al. 2017, arXiv 1708.02002), put together from torchvision's parts.

torchvision's own class returns losses in training and detections in evaluation, from lists of images. Here the network
returns its scores with the samples first, so that a run can divide batches among processes, some of which may be empty.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from syncbn.compat import has_torchvision_operators, import_torchvision
from syncbn.train.tasks.models import initialize

SCALES, RATIOS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)  # of anchors; section 4
MATCHED, UNMATCHED = 0.5, 0.4  # overlap with a box from which on an anchor finds it, and below which it finds nothing
CANDIDATES, LEAST_SCORE, DETECTIONS, OVERLAP = 1000, 0.05, 100, 0.5

Outputs = dict[str, Tensor]
"""``logits`` (N, A, K) and ``codes`` (N, A, 4) of A anchors, and the ``anchors`` (N, A, 4): x and y of two corners."""


class RetinaNet(nn.Module):
    """Class scores and box codes of each anchor: (N, C, H, W) -> `Outputs`. N may be 0.

    ``levels`` are those of the pyramid: level l has 1 / 2**l of the image's resolution, and anchors of
    ``anchor_scale * 2**l`` pixels a side. Levels 6 and 7 are convolutions of level 5, as in the paper.
    """

    def __init__(
        self, body: nn.Module, channels: dict[int, int], levels: Sequence[int], classes: int, width: int, scale: float
    ) -> None:
        super().__init__()
        detection, ops = import_torchvision("models.detection"), import_torchvision("ops")
        parts = detection.backbone_utils
        own = [level for level in levels if level <= 5]
        sizes = tuple(tuple(scale * 2**level * s for s in SCALES) for level in levels)
        per_place = len(SCALES) * len(RATIOS)
        pyramid = ops.feature_pyramid_network
        extra = pyramid.LastLevelP6P7(width, width) if 7 in levels else _nothing_more()
        stages = {f"layer{level - 1}": str(level) for level in own}
        self.backbone = parts.BackboneWithFPN(
            body, stages, [channels[level] for level in own], width, extra, norm_layer=nn.BatchNorm2d
        )
        self.head = detection.retinanet.RetinaNetHead(width, per_place, classes)
        # torchvision's small weights are for 256 channels; narrow heads would let no signal through.
        initialize(self.head.classification_head.conv)
        initialize(self.head.regression_head.conv)
        self.anchors = detection.anchor_utils.AnchorGenerator(sizes, (RATIOS,) * len(levels))
        self.image_list = detection.image_list.ImageList

    def forward(self, images: Tensor) -> Outputs:
        """`Outputs` of images (N, C, H, W)."""
        maps = list(self.backbone(images).values())
        one = self.image_list(images[:1], [(images.shape[-2], images.shape[-1])])
        anchors = self.anchors(one, maps)[0]
        logits = [_by_anchor(self._scores(level), self.head.classification_head.num_classes) for level in maps]
        codes = [_by_anchor(self._codes(level), 4) for level in maps]
        expanded = anchors.expand(len(images), *anchors.shape)
        return {"logits": torch.cat(logits, 1), "codes": torch.cat(codes, 1), "anchors": expanded}

    def _scores(self, level: Tensor) -> Tensor:
        head = self.head.classification_head
        scores: Tensor = head.cls_logits(head.conv(level))
        return scores

    def _codes(self, level: Tensor) -> Tensor:
        head = self.head.regression_head
        codes: Tensor = head.bbox_reg(head.conv(level))
        return codes


def _by_anchor(values: Tensor, per_anchor: int) -> Tensor:
    """(N, A * k, H, W) -> (N, H * W * A, k); torchvision's heads do not take N = 0."""
    n, channels, height, width = values.shape
    anchors = channels // per_anchor
    values = values.view(n, anchors, per_anchor, height, width).permute(0, 3, 4, 1, 2)
    return values.reshape(n, height * width * anchors, per_anchor)


def _nothing_more() -> nn.Module:
    """The pyramid's extra block where there is no further level; torchvision's default would add one."""

    class NoExtraLevel(import_torchvision("ops.feature_pyramid_network").ExtraFPNBlock):  # type: ignore[misc]
        def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
            return results, names

    return NoExtraLevel()


def small_body(in_channels: int, width: int, last: int) -> tuple[nn.Module, dict[int, int]]:
    """A small network for small images, and the channels of its levels.

    Each of its levels 1 to ``last`` halves the resolution and has two normalized 3x3 convolutions; level l has
    ``width * 2**(l - 1)`` channels.
    """
    convolution = import_torchvision("ops").Conv2dNormActivation
    channels = {level: width * 2 ** (level - 1) for level in range(1, last + 1)}
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = in_channels
    for level, after in channels.items():
        # Named as in torchvision's ResNets, whose "layer1" is level 2.
        layers[f"layer{level - 1}"] = nn.Sequential(convolution(before, after, stride=2), convolution(after, after))
        before = after
    body = nn.Sequential(layers)
    initialize(body)
    return body, channels


def resnet_body(name: str) -> tuple[nn.Module, dict[int, int]]:
    """A ResNet of torchvision's with random weights, and the channels of its levels 2 to 5."""
    body = import_torchvision().models.get_model(name, weights=None)
    return body, {level: body.fc.in_features // 2 ** (5 - level) for level in range(2, 6)}


def detection_losses(outputs: Outputs, targets: dict[str, Tensor]) -> Tensor:
    """The loss of each image, (N,): focal loss (section 3) and absolute error of the box codes, by matched anchors."""
    detection, ops = import_torchvision("models.detection"), import_torchvision("ops")
    tools = detection._utils
    matcher = tools.Matcher(MATCHED, UNMATCHED, allow_low_quality_matches=True)
    coder = tools.BoxCoder((1.0, 1.0, 1.0, 1.0))
    losses = []
    learnt = (targets["labels"] >= 0) & ~targets["crowd"]
    parts = (outputs["logits"], outputs["codes"], outputs["anchors"], targets["boxes"], targets["labels"], learnt)
    for logits, codes, anchors, all_boxes, all_labels, real in zip(*parts, strict=True):
        boxes, labels = all_boxes[real], all_labels[real]
        matched = torch.full((len(anchors),), tools.Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        if len(boxes):
            matched = matcher(ops.box_iou(boxes, anchors))
        positive, counted = matched >= 0, matched != tools.Matcher.BETWEEN_THRESHOLDS
        of_anchor = matched[positive]
        wanted = torch.zeros_like(logits)
        wanted[positive, labels[of_anchor]] = 1
        focal = ops.sigmoid_focal_loss(logits[counted], wanted[counted], reduction="sum")
        error = functional.l1_loss(
            codes[positive], coder.encode_single(boxes[of_anchor], anchors[positive]), reduction="sum"
        )
        losses.append((focal + error) / positive.sum().clamp(min=1))
    return torch.stack(losses)


def detections(outputs: Outputs, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """The boxes found in each image of ``size`` (H, W): ``boxes`` (k, 4), ``scores`` (k,) and ``labels`` (k,)."""
    tools, ops = import_torchvision("models.detection")._utils, import_torchvision("ops")
    coder = tools.BoxCoder((1.0, 1.0, 1.0, 1.0))
    found = []
    for logits, codes, anchors in zip(outputs["logits"], outputs["codes"], outputs["anchors"], strict=True):
        scores = logits.sigmoid().flatten()
        scores, places = scores.topk(min(CANDIDATES, len(scores)))
        places, scores = places[scores > LEAST_SCORE], scores[scores > LEAST_SCORE]
        anchor, labels = places // logits.shape[1], places % logits.shape[1]
        boxes = ops.clip_boxes_to_image(coder.decode_single(codes[anchor], anchors[anchor]), size)
        kept = not_suppressed(boxes, scores, labels, OVERLAP)[:DETECTIONS]
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found


def not_suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float) -> Tensor:
    """The indices of the boxes, by falling score, that overlap no better one of their class by more than ``overlap``.

    As torchvision's ``batched_nms``, whose operator is missing beside a torch that it was not built for.
    """
    ops = import_torchvision("ops")
    if has_torchvision_operators():
        kept: Tensor = ops.batched_nms(boxes, scores, labels, overlap)
        return kept
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    hides = ((ops.box_iou(boxes, boxes) > overlap) & (labels[:, None] == labels)).cpu().numpy()
    hidden = torch.zeros(len(order), dtype=torch.bool).numpy()
    for number, row in enumerate(hides):
        if not hidden[number]:
            hidden[number + 1 :] |= row[number + 1 :]
    return order[torch.from_numpy(~hidden).to(order.device)]
