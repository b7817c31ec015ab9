"""Nodes of this machine and a run that takes its time, for the tests of clusters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "tests" / "distributed"), str(ROOT / "tests" / "faults")]

# One epoch of 50 steps, which takes at least 2 seconds.
CONFIG = """\
gpus: 2
per_gpu_batch_size: 8
precision: fp64
device: cpu
task: {name: "fault_tasks:Faulty", options: {samples: 800, seconds: 0.005}}
norm: {name: sync}
budget: {epochs: 1, checkpoint_every_steps: 10}
"""


@pytest.fixture(autouse=True, scope="session")
def importable() -> Iterator[None]:
    """The processes of a run find the tests' modules."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "distributed", ROOT / "tests" / "faults"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(2, tmp_path) as network:
        yield network
