"""Folders whose original images are cut anew in each epoch: ImageNet's usual augmentation and test images."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from syncbn.compat import import_torchvision
from syncbn.train.config import ConfigError, DataConfig, config_from_dict
from syncbn.train.data import datasets as data
from syncbn.train.data.augment import TRIES, AreaCrop, area_crop, draw_fractions
from syncbn.train.data.datasets import load_data
from syncbn.train.data.samples import batch_loader
from syncbn.train.loop import train

SIZES = [(30, 40), (57, 31), (16, 16), (100, 11), (9, 120), (12, 13)]
"""(width, height) of the images of each class; two of them are too long for any crop that is tried."""
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of six training and six test images of noise, of several shapes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i, (width, height) in enumerate(SIZES):
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def from_folder(folder: Path, seed: int = 0, **options: Any) -> data.Data:
    config = DataConfig(name="imagefolder", root=str(folder), image_size=16, augment="resized_crop_flip", **options)
    return load_data(config, seed)


def originals(folder: Path, part: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((folder / part).glob("*/*.png"))]


def normalized(image: Any) -> Tensor:
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


def keys_of(epoch: int, indices: Sequence[int]) -> list[tuple[int, int]]:
    return [(epoch, i) for i in indices]


def test_training_images_are_cut_at_the_drawn_boxes(folder: Path) -> None:
    functional = import_torchvision("transforms.v2.functional")
    train_set = from_folder(folder, seed=7).train
    for epoch in range(3):
        images, labels = train_set.__getitems__(keys_of(epoch, range(12)))
        assert labels.tolist() == [0] * 6 + [1] * 6
        for index, original in enumerate(originals(folder, "train")):
            flip, *rest = draw_fractions(7, torch.tensor([epoch]), torch.tensor([index]), 1 + 4 * TRIES)[0].tolist()
            tries = [rest[i : i + 4] for i in range(0, 4 * TRIES, 4)]
            cut = functional.resized_crop(original, *area_crop(tries, original.height, original.width), [16, 16])
            expected = functional.horizontal_flip(cut) if flip < 0.5 else cut
            assert torch.allclose(images[index], normalized(expected), atol=1e-5)


def test_test_images_are_the_middle_of_a_larger_image(folder: Path) -> None:
    """The shorter side becomes 18, which is 16 times 256/224, rounded; torchvision's composition of the two steps."""
    v2 = import_torchvision("transforms.v2")
    transform = v2.Compose([v2.Resize(18), v2.CenterCrop(16)])
    images, _ = from_folder(folder).test.__getitems__(keys_of(0, range(12)))
    for image, original in zip(images, originals(folder, "val"), strict=True):
        assert torch.allclose(image, normalized(transform(original)), atol=1e-5)


@pytest.mark.parametrize(("size", "shorter_side"), [(224, 256), (16, 18), (32, 37), (96, 110)])
def test_the_share_of_a_test_image_that_is_kept(folder: Path, size: int, shorter_side: int) -> None:
    """Of an image of the shorter side's length nothing is resized: its middle comes out as it is."""
    pixels = np.random.default_rng(1).integers(0, 256, (shorter_side, shorter_side + 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "val" / "a" / "0.png")
    config = DataConfig(name="imagefolder", root=str(folder), image_size=size, augment="resized_crop_flip")
    made = load_data(config, seed=0)
    assert made.shape == (3, size, size)
    top, left = round((shorter_side - size) / 2), round((shorter_side + 6 - size) / 2)
    expected = normalized(pixels[top : top + size, left : left + size])
    assert torch.allclose(made.test.__getitems__([(0, 0)])[0][0], expected, atol=1e-5)


def test_nothing_is_held_and_no_copy_is_made(folder: Path) -> None:
    made = from_folder(folder)
    assert not made.train.held
    assert not made.test.held
    assert not list(folder.rglob("*.npz"))


def test_draws_depend_on_seed_epoch_and_index_alone(folder: Path) -> None:
    train_set = from_folder(folder).train
    whole, _ = train_set.__getitems__([(index % 3, index) for index in range(12)])
    for index in range(12):
        assert torch.equal(train_set.__getitems__([(index % 3, index)])[0][0], whole[index])
    again = pickle.loads(pickle.dumps(train_set))  # as it travels to a spawned process
    assert torch.equal(again.__getitems__([(index % 3, index) for index in range(12)])[0], whole)
    first, _ = train_set.__getitems__(keys_of(0, range(12)))
    for seed, epoch in ((0, 1), (1, 0)):
        other, _ = from_folder(folder, seed).train.__getitems__(keys_of(epoch, range(12)))
        assert (first != other).flatten(1).any(1).sum() >= 10  # of 12; the central crop of a long image may recur
    tests = [from_folder(folder, n).test.__getitems__(keys_of(n, range(12)))[0] for n in (0, 3)]
    assert torch.equal(*tests)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(folder: Path, workers: int) -> None:
    train_set = from_folder(folder, train_samples=9).train
    batches = [keys_of(1, [8, 0]), [], keys_of(2, range(1, 8))]
    for got, expected in zip(
        batch_loader(train_set, batches, workers), batch_loader(train_set, batches, 0), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_subset_is_drawn_by_the_index_within_it(folder: Path) -> None:
    """As the other augmentations are: the same file at another index is cut otherwise."""
    part = from_folder(folder, train_samples=6).train
    kept = data.spread_subset(from_folder(folder).train.labels, 6).tolist()
    assert kept != list(range(6))
    crop = AreaCrop(16, 0)
    files = originals(folder, "train")
    images, _ = part.__getitems__(keys_of(4, range(6)))
    for index, (image, file) in enumerate(zip(images, kept, strict=True)):
        assert torch.allclose(image, normalized(crop(files[file], 4, index)), atol=1e-5)


@pytest.mark.parametrize("name", ["mnist5k", "digits", "cifar10", "synthetic"])
def test_other_sets_have_no_original_images(name: Any) -> None:
    with pytest.raises(ConfigError, match=rf"none, crop or crop_flip with data\.name {name}") as caught:
        DataConfig(name=name, augment="resized_crop_flip")
    assert (caught.value.key, caught.value.value) == ("data.augment", "resized_crop_flip")


def test_a_step_of_training(folder: Path) -> None:
    """The same for any number of loader processes; the last test images are fewer than an evaluation step takes."""
    results = []
    for workers in (0, 2):
        config = {
            "gpus": 2,
            "per_gpu_batch_size": 6,
            "device": "cpu",
            "precision": "fp64",
            "data": {
                "name": "imagefolder",
                "root": str(folder),
                "image_size": 16,
                "augment": "resized_crop_flip",
                "workers": workers,
            },
            "model": {"width": 4},
            "budget": {"epochs": None, "steps": 1, "eval_batch_size": 5},
            "evaluation": {"population_samples": [12]},
        }
        results.append(train(config_from_dict(config)))
    assert results[0].status == "ok"
    assert (results[0].steps, results[0].samples) == (1, 12)
    assert results[0].losses == results[1].losses
    assert results[0].history[-1]["test"] == results[1].history[-1]["test"]
