"""The Triton kernels in Triton's interpreter; ``test_triton_kernels.py`` runs this in a process of its own.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, and holds for the whole process.
"""

from __future__ import annotations

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "to be run by test_triton_kernels.py"

from triton_accesses import recorded  # noqa: E402
from triton_cases import *  # noqa: E402, F403
from triton_finish_cases import *  # noqa: E402, F403


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def checked_accesses():
    """Each test fails if a kernel accesses what is out of bounds, or races."""
    with recorded():
        yield
