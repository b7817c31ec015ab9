"""segmentation_models_pytorch: decoders on encoders of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
from model_steps import check_converted, images
from torch import nn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "Unet": lambda: smp.Unet("resnet18", encoder_weights=None, decoder_channels=(16, 8, 8, 4, 4)),
    "FPN": lambda: smp.FPN("tu-test_resnet", encoder_weights=None, decoder_pyramid_channels=16),
    "DeepLabV3Plus": lambda: smp.DeepLabV3Plus(
        "tu-test_resnet", encoder_weights=None, decoder_channels=16, decoder_atrous_rates=(2, 3, 4)
    ),
}


@pytest.mark.works_with("segmentation-models-pytorch", "Unet, FPN and DeepLabV3+: a converted step")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    check_converted(MODELS[name], images(64))
