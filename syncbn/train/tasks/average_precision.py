"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from torch import Tensor

Image = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What was found in an image (``boxes``, ``scores``, ``labels``); what is there (``boxes``, ``labels``, ``crowd``)."""


def coco_tools() -> tuple[Any, Any]:
    """pycocotools' classes of a data set and of an evaluation. Raises ImportError if it is not installed."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise ImportError("average precision needs pycocotools; install: pip install 'syncbn[detection]'") from error
    return COCO, COCOeval


def average_precision(images: Sequence[Image], num_classes: int) -> dict[str, float]:
    """``map``, the mean over overlaps of 0.5 to 0.95, and ``map50``, at an overlap of 0.5; both means over the classes.

    NaN if there is no object.
    """
    COCO, COCOeval = coco_tools()
    there: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (detected, truth) in enumerate(images, start=1):
        for box, label, crowd in _rows(truth, "labels", "crowd"):
            entry = {"id": len(there) + 1, "image_id": number, "category_id": label, "iscrowd": int(crowd)}
            there.append({**entry, **_place(box)})
        for box, label, score in _rows(detected, "labels", "scores"):
            entry = {"id": len(found) + 1, "image_id": number, "category_id": label, "score": score}
            found.append({**entry, **_place(box)})
    if all(entry["iscrowd"] for entry in there):
        return {"map": math.nan, "map50": math.nan}
    if not found:  # which pycocotools does not read
        return {"map": 0.0, "map50": 0.0}
    with redirect_stdout(StringIO()):
        truths, answers = COCO(), COCO()
        shared = {
            "images": [{"id": number} for number in range(1, len(images) + 1)],
            "categories": [{"id": label} for label in range(num_classes)],
        }
        truths.dataset, answers.dataset = {**shared, "annotations": there}, {**shared, "annotations": found}
        truths.createIndex()
        answers.createIndex()
        evaluation = COCOeval(truths, answers, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": float(evaluation.stats[0]), "map50": float(evaluation.stats[1])}


def _rows(image: dict[str, Tensor], *names: str) -> Any:
    return zip(image["boxes"].tolist(), *(image[name].tolist() for name in names), strict=True)


def _place(box: list[float]) -> dict[str, Any]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return {"bbox": [left, top, width, height], "area": width * height}
