"""Several runs in one process of a launcher: each makes its process group and leaves none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.train import load_config, train
from syncbn.train.launch import launch

HERE = Path(__file__).parent


def check(folder):
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    first, grouped, narrow, again = found[0]
    assert first == again
    assert len({tuple(first), tuple(grouped), tuple(narrow)}) == 3
    data = {"data.name": "synthetic", "data.synthetic_samples": 32, "data.image_size": 8, "model.width": 4}
    run = {"gpus": 4, "per_gpu_batch_size": 4, "norm.name": "sync", "budget.epochs": 1, "device": "cpu"}
    assert first == pytest.approx(train(load_config(None, {**data, **run})).losses, rel=1e-5)


def test_under_torchrun(tmp_path, monkeypatch):
    """Its store outlives the process groups: a second one must not find the addresses of the first."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    launch(2, [str(tmp_path)], tmp_path / "log", timeout=150, module="two_runs")
    check(tmp_path)


def test_without_torchrun(tmp_path):
    """Processes that a cluster's launcher started: the first one serves the store itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_runs.py"), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(150) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    check(tmp_path)
