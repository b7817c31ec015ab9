"""torchvision: models of other tasks than classification, and its tools for models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from model_steps import check_converted, images
from torch import Tensor, nn

import syncbn
from syncbn.compat import import_torchvision

torchvision = import_torchvision()
extraction = import_torchvision("models.feature_extraction")
detection = import_torchvision("models.detection")


@pytest.mark.works_with("torchvision", "LR-ASPP on MobileNetV3 (segmentation): a converted step")
def test_segmentation() -> None:
    build = partial(torchvision.models.segmentation.lraspp_mobilenet_v3_large, weights=None, weights_backbone=None)
    check_converted(lambda: build(num_classes=4), images(64))


@pytest.mark.works_with("torchvision", "3-D ResNet (video): a converted step")
def test_video() -> None:
    clips = torch.randn(4, 3, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_converted(lambda: torchvision.models.get_model("r3d_18", weights=None, num_classes=4), clips)


class Losses(nn.Module):
    """A detector as a function of its images alone."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        box = torch.tensor([[4.0, 4.0, 30.0, 40.0]], dtype=x.dtype)
        losses: dict[str, Tensor] = self.detector(list(x), [{"boxes": box, "labels": torch.tensor([1])}] * len(x))
        return torch.stack(list(losses.values()))


def retinanet() -> nn.Module:
    fpn = detection.backbone_utils.resnet_fpn_backbone
    backbone = fpn(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    return Losses(detection.RetinaNet(backbone, num_classes=2, min_size=64, max_size=64))


@pytest.mark.works_with("torchvision", "RetinaNet on ResNet-18 with FPN (detection): a converted step")
def test_detection() -> None:
    check_converted(retinanet, images(64, number=2).sigmoid(), evaluates=False)


@pytest.mark.works_with("torchvision", "`create_feature_extractor` before the conversion")
def test_features_of_a_model_that_is_then_converted() -> None:
    nodes = {"layer1.0.bn1": "norm", "layer4": "last"}
    check_converted(
        lambda: extraction.create_feature_extractor(torchvision.models.resnet18(weights=None), nodes), images(32)
    )


@pytest.mark.works_with("torchvision", "`create_feature_extractor` of a converted model")
def test_features_of_a_converted_model() -> None:
    torch.manual_seed(0)
    model = syncbn.convert(torchvision.models.resnet18(weights=None), "ghost", ghost_batch_size=2).double()
    features = extraction.create_feature_extractor(model, {"layer1.0.bn1": "norm", "avgpool": "last"})
    seen: list[Tensor] = []
    model.layer1[0].bn1.register_forward_hook(lambda _, args, y: seen.append(y.clone()))  # a ReLU follows in place
    y = features(images(32))
    assert torch.equal(y["norm"], seen[0].relu())
    assert torch.equal(features(images(32))["last"].flatten(1), pooled(model, images(32)))


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    """The features before the last layer of a residual network."""
    model.fc = nn.Identity()
    y: Tensor = model(x)
    return y


@pytest.mark.works_with("torchvision", "`Conv2dNormActivation` and ResNet with `norm_layer` a layer of this package")
def test_norm_layer() -> None:
    ghost = partial(syncbn.GhostBatchNorm, ghost_batch_size=2)
    block = torchvision.ops.Conv2dNormActivation(3, 4, norm_layer=ghost)
    model = torchvision.models.resnet18(weights=None, norm_layer=syncbn.SyncBatchNorm, num_classes=4)
    assert [type(layer).__name__ for layer in block] == ["Conv2d", "GhostBatchNorm", "ReLU"]
    assert block[0].bias is None, "as before torch's own"
    torch.manual_seed(0)
    torchs = torchvision.models.resnet18(weights=None, num_classes=4)
    model.load_state_dict(torchs.state_dict())
    x = images(32).float()
    # float32 in 20 layers: each has another order of the same sums.
    torch.testing.assert_close(model(x), torchs(x), rtol=1e-3, atol=1e-4)
    block(x).sum().backward()
    assert block[1].weight.grad is not None
