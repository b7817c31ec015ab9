"""Detection gives the same answer on any number of processes: losses, weights, average precision of the whole set."""

from __future__ import annotations

from typing import Any

import pytest

from syncbn.train.config import config_from_dict
from syncbn.train.loop import train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs, parity_config, run_parity

# 22 images in global batches of 8: the last one has 6, so 2 and none on the third and fourth process of four.
OPTIONS = {"samples": {"train": 22, "validation": 3, "test": 5}, "width": 4, "pyramid_width": 8, "levels": [3, 4]}
CONFIG = config_from_dict(
    {
        "gpus": 4,
        "per_gpu_batch_size": 2,
        "norm": {"name": "sync"},
        "optimizer": {"lr": 0.01},
        "task": {"name": "detection", "options": OPTIONS},
        "evaluation": {"population_samples": [12]},
    }
)
STEPS = 6


def test_parity_of_the_command() -> None:
    lines: list[str] = []
    assert run_parity(CONFIG, [1, 2, 4], STEPS, lines.append, timeout=120), "\n".join(lines)


def train_into(config: Any, out: Any) -> Any:
    result = train(config, out)
    return result.validation, *[entry["test"] for entry in result.evaluations]


def test_precision_is_that_of_all_images(pools: Any, tmp_path: Any) -> None:
    config = parity_config(CONFIG, STEPS)
    alone = train_into(config, tmp_path / "1")
    assert all(values.keys() == {"loss", "map", "map50"} for values in alone)
    for world in (2, 4):
        for values in pools(world).run(train_into, config, tmp_path / str(world)):
            for part, expected in zip(values, alone, strict=True):
                assert part == pytest.approx(expected, rel=TOLERANCE)
        difference = compare_runs(Trained.read(tmp_path / "1"), Trained.read(tmp_path / str(world)))
        assert difference.largest <= TOLERANCE, f"{world} processes: {difference}"
