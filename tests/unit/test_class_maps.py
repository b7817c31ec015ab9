"""Losses and metrics of class maps against the same in float64, pixel by pixel; ignored pixels; divided batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from syncbn.train.task import Sum
from syncbn.train.tasks.class_maps import confusion, overlap_metrics, pixel_loss, sample_loss

IGNORED = 255
CLASSES = 4
SHAPES = {"2d": (5, 6), "3d": (2, 4, 3)}


def drawn(size: tuple[int, ...], samples: int = 3) -> tuple[Tensor, Tensor]:
    """Scores, and masks in which a fifth is ignored, sample 0 has no class 3, and the last sample is ignored."""
    generator = torch.Generator().manual_seed(len(size))
    scores = torch.randn(samples, CLASSES, *size, generator=generator, dtype=torch.float64) * 2
    classes = torch.randint(CLASSES, (samples, *size), generator=generator)
    classes[0][classes[0] == 3] = 1
    classes[torch.rand(classes.shape, generator=generator) < 0.2] = IGNORED
    classes[-1] = IGNORED
    return scores, classes


def pixels_of(scores: Tensor, classes: Tensor) -> list[list[tuple[list[float], int]]]:
    """For each sample its counted pixels: softmax probabilities, by plain arithmetic, and class."""
    samples = []
    for one, truth in zip(scores.flatten(2), classes.flatten(1), strict=True):
        found = []
        for column, label in zip(one.T.tolist(), truth.tolist(), strict=True):
            if label != IGNORED:
                whole = sum(math.exp(x) for x in column)
                found.append(([math.exp(x) / whole for x in column], label))
        samples.append(found)
    return samples


def dice_by_hand(pixels: list[tuple[list[float], int]]) -> float:
    losses = []
    for c in range(CLASSES):
        common = sum(p[c] for p, label in pixels if label == c)
        size = sum(p[c] for p, _ in pixels) + sum(label == c for _, label in pixels)
        if any(label == c for _, label in pixels):
            losses.append(1 - 2 * common / size)
    return sum(losses) / len(losses)


def cross_entropies(pixels: list[tuple[list[float], int]]) -> list[float]:
    return [-math.log(p[label]) for p, label in pixels]


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_losses_by_hand(size: tuple[int, ...]) -> None:
    scores, classes = drawn(size)
    samples = [pixels for pixels in pixels_of(scores, classes) if pixels]
    assert len(samples) == 2

    entropies = [value for pixels in samples for value in cross_entropies(pixels)]
    found = pixel_loss(scores, classes, IGNORED)
    assert float(found.count) == len(entropies)
    assert found.mean() == pytest.approx(sum(entropies) / len(entropies), rel=1e-12)

    dice = [dice_by_hand(pixels) for pixels in samples]
    found = sample_loss(scores, classes, IGNORED, with_cross_entropy=False)
    assert float(found.count) == 2
    assert found.mean() == pytest.approx(sum(dice) / 2, rel=1e-12)

    means = [sum(values) / len(values) for values in map(cross_entropies, samples)]
    found = sample_loss(scores, classes, IGNORED, with_cross_entropy=True)
    assert found.mean() == pytest.approx((sum(dice) + sum(means)) / 2, rel=1e-12)


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_metrics_by_hand(size: tuple[int, ...]) -> None:
    scores, classes = drawn(size)
    scores[:, 2] -= 100  # a class that is never predicted
    pairs = [(max(range(CLASSES), key=p.__getitem__), c) for pixels in pixels_of(scores, classes) for p, c in pixels]
    dice, ious = [], []
    for c in range(CLASSES):
        both = sum(p == c and label == c for p, label in pairs)
        either = sum(p == c or label == c for p, label in pairs)
        ious.append(both / either)
        dice.append(2 * both / (both + either))
    found = overlap_metrics(confusion(scores, classes, IGNORED), first=1)
    assert found["dice"].mean() == pytest.approx(sum(dice[1:]) / 3, rel=1e-12)
    assert found["miou"].mean() == pytest.approx(sum(ious) / 4, rel=1e-12)
    assert found["pixel_error"].mean() == pytest.approx(sum(p != c for p, c in pairs) / len(pairs), rel=1e-12)
    assert dice[2] == 0


def test_a_class_that_does_not_occur_is_left_out_of_the_mean() -> None:
    classes = torch.tensor([[[0, 0, 1, 1, IGNORED]]])
    scores = torch.full((1, CLASSES, 1, 5), -9.0)
    for pixel, predicted in enumerate((0, 1, 1, 1, 3)):  # the only prediction of class 3 is at the ignored pixel
        scores[0, predicted, 0, pixel] = 9.0
    found = overlap_metrics(confusion(scores, classes, IGNORED), first=1)
    assert found["dice"].mean() == pytest.approx(2 * 2 / (2 + 3))
    assert found["miou"].mean() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["pixel_error"].mean() == pytest.approx(1 / 4)


def losses(scores: Tensor, classes: Tensor) -> list[Sum]:
    return [
        pixel_loss(scores, classes, IGNORED),
        sample_loss(scores, classes, IGNORED, with_cross_entropy=False),
        sample_loss(scores, classes, IGNORED, with_cross_entropy=True),
    ]


def test_sums_do_not_depend_on_how_the_samples_are_divided() -> None:
    scores, classes = drawn((5, 6), samples=6)
    scores.requires_grad_()
    for kind, whole in enumerate(losses(scores, classes)):
        parts = [losses(scores[cut], classes[cut])[kind] for cut in (slice(0, 1), slice(1, 3), slice(3, 6))]
        assert sum(float(part.count) for part in parts) == float(whole.count)
        assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-14)
        grads = [torch.autograd.grad(total, scores)[0] for total in (whole.total, sum(p.total for p in parts))]
        torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-15)
    cut = [overlap_metrics(confusion(scores[i : i + 2], classes[i : i + 2], IGNORED), 1) for i in (0, 2, 4)]
    for name, whole in overlap_metrics(confusion(scores, classes, IGNORED), 1).items():
        assert torch.equal(sum(part[name].total for part in cut), whole.total)
        assert torch.equal(sum(part[name].count for part in cut), whole.count)


def test_ignored_pixels_have_no_gradient() -> None:
    scores, classes = drawn((5, 6))
    scores.requires_grad_()
    for loss in losses(scores, classes):
        (gradient,) = torch.autograd.grad(loss.total, scores)
        assert torch.isfinite(gradient).all()
        ignored = (classes == IGNORED).unsqueeze(1).expand_as(gradient)
        assert (gradient[ignored] == 0).all()
        assert (gradient[~ignored] != 0).all()


def test_a_batch_in_which_all_is_ignored() -> None:
    scores, classes = drawn((5, 6))
    scores.requires_grad_()
    for loss in losses(scores[-1:], classes[-1:]):
        assert (loss.total.item(), loss.count.item()) == (0, 0)
        (gradient,) = torch.autograd.grad(loss.total, scores)
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    """65,536 pixels: more than float16 can count."""
    scores = torch.zeros(1, 2, 256, 256, dtype=dtype)
    classes = torch.zeros(1, 256, 256, dtype=torch.int64)
    pixel, dice, both = (loss.mean() for loss in losses(scores, classes))
    assert pixel == pytest.approx(math.log(2), rel=1e-5)
    assert dice == pytest.approx(1 - 2 * 0.5 / 1.5, rel=1e-5)
    assert both == pytest.approx(pixel + dice, rel=1e-5)
