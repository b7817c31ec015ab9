"""kornia: its networks for local features, whose norms have no parameters."""

from __future__ import annotations

import kornia.feature
import pytest
import torch
from model_steps import check_converted


@pytest.mark.works_with("kornia", "HardNet and SOSNet, whose norms have no weight and bias: a converted step")
@pytest.mark.parametrize("name", ["HardNet", "SOSNet"])
def test_descriptors(name: str) -> None:
    patches = torch.randn(6, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_converted(lambda: getattr(kornia.feature, name)(pretrained=False), patches)
