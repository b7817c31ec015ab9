"""Tests that need a CUDA device: skipped, with the reason, where there is none.

They need torch, triton, torchvision, accelerate, numpy and pytest, and no other package.
"""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# The worker pool of the distributed tests.
sys.path.append(str(HERE.parent / "distributed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
