"""Losses and metrics of class maps: class scores (N, K, \\*size) against class numbers, int64 (N, \\*size).

Pixels whose class number is ``ignored`` count nothing. Every function returns sums, so no result depends on how the
samples were divided over batches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from syncbn.train.task import Sum


def pixel_loss(scores: Tensor, classes: Tensor, ignored: int) -> Sum:
    """Cross entropy over the counted pixels of all samples."""
    total = functional.cross_entropy(_wide(scores), classes, ignore_index=ignored, reduction="sum")
    return Sum(total, (classes != ignored).sum())


def sample_loss(scores: Tensor, classes: Tensor, ignored: int, *, with_cross_entropy: bool) -> Sum:
    """Dice loss over the samples with a counted pixel; ``with_cross_entropy``, plus the sample's mean cross entropy.

    The Dice loss of a sample is the mean over the classes c in its mask of 1 - 2 sum(p t) / (sum(p) + sum(t)). The sums
    are over the sample's counted pixels, p is the softmax probability of c, and t is 1 where the mask has c, else 0
    (Milletari et al. 2016, arXiv 1606.04797, with p and t instead of their squares, and no smoothing: a class in the
    mask has a denominator above 0).
    """
    scores = _wide(scores)
    counted = classes != ignored
    pixels = counted.flatten(1).sum(1)  # (N,)
    losses = _dice_losses(scores.softmax(1), classes, counted)
    if with_cross_entropy:
        each = functional.cross_entropy(scores, classes, ignore_index=ignored, reduction="none")
        losses = losses + each.flatten(1).sum(1) / pixels.clamp(min=1)
    return Sum(losses.sum(), (pixels > 0).sum())


def _dice_losses(probabilities: Tensor, classes: Tensor, counted: Tensor) -> Tensor:
    """The Dice loss of each sample (N,); 0, with a gradient of 0, for a sample without counted pixels."""
    p = (probabilities * counted.unsqueeze(1)).flatten(2)  # (N, K, pixels)
    index = torch.where(counted, classes, 0).flatten(1).unsqueeze(1)
    t = torch.zeros_like(p).scatter_(1, index, counted.flatten(1).unsqueeze(1).to(p.dtype))
    in_mask = t.sum(2)  # (N, K)
    present = in_mask > 0
    losses = 1 - 2 * (p * t).sum(2) / torch.where(present, p.sum(2) + in_mask, 1)
    return torch.where(present, losses, 0).sum(1) / present.sum(1).clamp(min=1)


def confusion(scores: Tensor, classes: Tensor, ignored: int) -> Tensor:
    """Counted pixels by class and predicted class: int64 (K, K)."""
    k = scores.shape[1]
    # A cell of its own takes the ignored pixels: their number need not be known, as a boolean mask would need it.
    cell = torch.where(classes != ignored, classes * k + scores.argmax(1), k * k)
    return cell.flatten().bincount(minlength=k * k + 1)[: k * k].view(k, k)


def overlap_metrics(found: Tensor, first: int) -> dict[str, Sum]:
    """The metrics of a confusion matrix (K, K).

    ``dice``: 2 (P and T) / (P + T) of each class from ``first`` on. ``miou``: (P and T) / (P or T) of each class. Both
    are means over the classes that occur in the masks or the predictions. ``pixel_error``: the fraction of counted
    pixels that are classified wrongly.
    """
    right, true, predicted = found.diagonal(), found.sum(1), found.sum(0)
    both = true + predicted
    return {
        "dice": Sum(2 * right[first:], both[first:]),
        "miou": Sum(right, both - right),
        "pixel_error": Sum(found.sum() - right.sum(), found.sum()),
    }


def _wide(scores: Tensor) -> Tensor:
    """Scores in float32 at least: sums over pixels in half precision would saturate."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
