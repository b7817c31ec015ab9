"""Segmentation gives the same answer on any number of processes: ragged batches, ignored pixels and samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from syncbn.train import Datasets
from syncbn.train.config import RunConfig, config_from_dict
from syncbn.train.loop import train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs, parity_config, run_parity
from syncbn.train.tasks.segmentation import Segmentation

SYNC = {"name": "sync"}
RENORM = {"name": "renorm", "sync": True, "warmup_steps": 2, "r_ramp_end": 6, "d_ramp_end": 5}
STEPS = 6


def configured(norm: dict[str, Any], **options: Any) -> RunConfig:
    """22 images in global batches of 8: the last one has 6, so 2 and none on the third and fourth process of four."""
    samples = {"train": 22, "validation": 3, "test": 5}
    own = {"image_size": 32, "samples": samples, "ignore_border": 2, "width": 2, "depth": 2, **options}
    return config_from_dict(
        {
            "gpus": 4,
            "per_gpu_batch_size": 2,
            "norm": norm,
            "optimizer": {"lr": 0.05, "weight_decay": 1e-3},
            "task": {"name": "segmentation", "options": own},
            "evaluation": {"population_samples": [12]},
        }
    )


def test_parity_of_the_command() -> None:
    lines: list[str] = []
    assert run_parity(configured(SYNC), [1, 2, 4], STEPS, lines.append, timeout=120), "\n".join(lines)
    assert len([line for line in lines if line.endswith("same (tolerance 1e-10)")]) == 2


class PartlyIgnored(Segmentation):
    """Every third image is ignored altogether: the processes count different numbers of samples, and some none."""

    def data(self, seed: int) -> Datasets:
        found = super().data(seed)
        sets = [
            [(image, mask if i % 3 else torch.full_like(mask, 255)) for i, (image, mask) in enumerate(part)]
            for part in (found.train, found.validation, found.test)
        ]
        return Datasets(train=sets[0], validation=sets[1], test=sets[2])


def train_into(config: RunConfig, out: Any) -> Any:
    result = train(config, out, task=PartlyIgnored(**config.task.options))
    return result.validation, *[entry["test"] for entry in result.evaluations]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sync, pixels": (SYNC, {"loss": "cross_entropy"}),
    "renorm, samples": (RENORM, {"loss": "cross_entropy+dice"}),
    "local renorm, samples": (RENORM | {"sync": False}, {"loss": "dice"}),
    "sync, volumes": (SYNC, {"dims": 3, "image_size": [4, 32, 32]}),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_and_samples_are_counted_over_all_processes(pools: Any, case: str, tmp_path: Any) -> None:
    norm, options = CASES[case]
    config = parity_config(configured(norm, **options), STEPS)
    alone = train_into(config, tmp_path / "1")
    # Running statistics, those of the batch (not for renorm), and population statistics by two estimators.
    assert len(alone) == (4 if norm["name"] == "renorm" else 5)
    for world in (2, 4):
        for values in pools(world).run(train_into, config, tmp_path / str(world)):
            for part, expected in zip(values, alone, strict=True):
                assert part == pytest.approx(expected, rel=TOLERANCE)
        difference = compare_runs(Trained.read(tmp_path / "1"), Trained.read(tmp_path / str(world)))
        assert difference.largest <= TOLERANCE, f"{world} processes: {difference}"
