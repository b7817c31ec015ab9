"""Tests that need a CUDA device: skipped, with the reason, where there is none, unless they are rehearsed (device.py).

They need torch, triton, torchvision, accelerate, numpy and pytest, and no other package.
"""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# The worker pool of the distributed tests, and the cases of the kernels' tests.
sys.path += [str(HERE.parent / "distributed"), str(HERE.parent / "unit")]

from device import REHEARSAL, rehearsed  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (REHEARSAL or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def rehearsal(monkeypatch):
    if REHEARSAL:
        monkeypatch.setattr("syncbn.kernels.dispatch._compiled", rehearsed)
