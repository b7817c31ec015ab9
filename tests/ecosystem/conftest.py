"""What the tests of other libraries share: a prepared torchvision, and pools of worker processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from syncbn.compat import import_torchvision

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from pool import Pool, pools_by_size

# Lightning imports torchvision by way of torchmetrics; one that does not fit torch has to be prepared first.
import_torchvision()


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """Workers are forked from this process, which has imported the libraries: that takes them seconds each."""
    yield from pools_by_size("fork")


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Frameworks make one and leave it, and processes that are forked later would have it too."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
