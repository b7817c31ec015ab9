"""The studies behind the advice: the errors of trained models, and what the advice measured of the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from syncbn.advise import Remedy, advise
from syncbn.advise.remedies import expected_harm, recommended
from syncbn.study import Setting
from syncbn.study.analysis.statistics import interval
from syncbn.train import RunConfig, train
from syncbn.train.config import ModelConfig, TaskConfig


def run(setting: Setting) -> dict[str, float]:
    """The test ``error`` of a training with local statistics.

    Where larger scores are better, the error is 1 minus the score. A diverged run has the error of guessing, 0.9. The
    options are the sections ``data`` and ``model`` of a classification, or ``segmentation``, the options of that task.
    """
    result = train(_config(setting))
    error = 0.9
    if result.status == "ok":
        error = 1 - result.score if result.metric.higher_is_better else result.score
    return {"error": error}


def aligned(setting: Setting) -> dict[str, float]:
    """What the advice measures of the same tasks: ``alignment_1``, ``alignment_2`` and so on, by size.

    An alignment of -1 stands for a batch that a layer cannot normalize.
    """
    found = advise(_config(setting))
    by_size = {remedy.normalization_batch_size: remedy.alignment for remedy in found.remedies}
    return {f"alignment_{size}": -1.0 if value is None else value for size, value in by_size.items()}


def _config(setting: Setting) -> RunConfig:
    given, options = setting.config, setting.options
    if "segmentation" in options:
        return replace(given, task=TaskConfig(name="segmentation", options=options["segmentation"]))
    data = replace(given.data, **options["data"])
    return replace(given, task=TaskConfig(), data=data, model=ModelConfig(**options["model"]))


@dataclass(frozen=True)
class Judged:
    """Advice beside what training gave, for one number of samples per GPU and one seed of the advice."""

    recommended: int
    """The recommended normalization batch size, the largest if none is recommended."""
    cheapest: int
    """The smallest size that is not shown to be worse than the best one."""
    safe: bool
    """Whether the recommended size is not shown to be worse than the best one."""
    excess: float
    """The mean error of the recommended size, less that of the best one."""

    @property
    def right(self) -> bool:
        return self.recommended == self.cheapest


def judge(errors: Mapping[int, Sequence[float]], alignment: Mapping[int, float]) -> Judged:
    """Compare the advice with trained errors.

    A size is worse than the best, which has the smallest mean error, if the 95 % interval (Student's t) of the
    difference over the seeds is above 0.

    Args:
        errors: by normalization batch size, from the local one to that of all GPUs, the error of each seed.
        alignment: by the same sizes; -1 for a batch that cannot be normalized.
    """
    sizes, best = sorted(errors), _best(errors)
    fine = [size for size in sizes if not _worse(errors, size, best)]
    remedies = [
        Remedy(gpus=size // sizes[0], normalization_batch_size=size, alignment=alignment[size], exchange_ms=0.0)
        for size in sizes
    ]
    found = recommended(remedies)
    size = sizes[-1] if found is None else found.normalization_batch_size
    excess = float(np.mean(errors[size]) - np.mean(errors[best]))
    return Judged(recommended=size, cheapest=fine[0], safe=size in fine, excess=excess)


@dataclass(frozen=True)
class Foretold:
    """What training gave where the advice expected a certain harm."""

    number: int
    """Sizes of a task, an order and a seed of the advice."""
    worse: float
    """The share whose error is shown to be worse than the best size's."""
    cost: float
    """The median difference of the mean error from that of the best size."""


@dataclass(frozen=True)
class Validation:
    """The advice of all seeds of a study beside its errors."""

    settings: int
    """Tasks, orders and numbers of samples per GPU."""
    advice: int
    """Pieces of advice: settings times seeds."""
    right: tuple[float, float, float]
    """The share of advice that is right, and its 95 % interval over tasks and orders (a bootstrap)."""
    safe: tuple[float, float, float]
    """The same of advice that is not shown to be worse than the best."""
    near: float
    """The share that is safe and at most twice the cheapest size that would do."""
    within: float
    """The share whose mean error is at most a point above the best; seeds that fail widen an interval."""
    correlation: tuple[float, float, float]
    """Spearman's, of an alignment with what its size costs against the best, with its interval likewise."""
    foretold: Mapping[str, Foretold]
    """By the harm that was expected."""


def validate(errors: Path, alignments: Path) -> Validation:
    """Judge the advice by the ``results.csv`` of the studies ``advise_errors`` and ``advise_alignments``."""
    trained, measured = pd.read_csv(errors), pd.read_csv(alignments)
    by_block = dict(list(measured.groupby(["arm", "data.class_skew"])))
    blocks = [_Block.of(runs, by_block[key]) for key, runs in trained.groupby(["arm", "data.class_skew"])]
    advice = [judgement for block in blocks for judgement in block.judged]
    return Validation(
        settings=sum(len(block.cost) - 1 for block in blocks),
        advice=len(advice),
        right=_spread(blocks, lambda some: np.mean([j.right for block in some for j in block.judged])),
        safe=_spread(blocks, lambda some: np.mean([j.safe for block in some for j in block.judged])),
        within=float(np.mean([judgement.excess <= 0.01 for judgement in advice])),
        near=float(np.mean([j.safe and j.recommended <= 2 * j.cheapest for j in advice])),
        correlation=_spread(blocks, _correlation),
        foretold=_foretold(blocks),
    )


@dataclass(frozen=True)
class _Block:
    """The runs of one task and order."""

    judged: list[Judged]
    alignment: Mapping[int, list[float]]
    """By size, of each seed."""
    cost: Mapping[int, float]
    """By size: the mean error, less that of the best size."""
    worse: Mapping[int, bool]
    """By size: whether its error is shown to be worse than the best."""

    @classmethod
    def of(cls, runs: pd.DataFrame, measured: pd.DataFrame) -> _Block:
        table = runs.pivot(index="normalization_batch_size", columns="seed", values="test_error")
        if table.isna().any(axis=None) or measured.filter(like="test_alignment_").isna().any(axis=None):
            raise ValueError(f"expected all runs of {runs['arm'].iloc[0]} to be done")
        errors = {int(size): list(row) for size, row in table.iterrows()}
        by_size = {size: list(measured[f"test_alignment_{size}"]) for size in errors}
        judged = [
            judge({n: errors[n] for n in errors if n >= b}, {n: by_size[n][seed] for n in errors if n >= b})
            for b in sorted(errors)[:-1]
            for seed in range(len(measured))
        ]
        best = _best(errors)
        cost = {size: float(np.mean(values) - np.mean(errors[best])) for size, values in errors.items()}
        return cls(judged, by_size, cost, {size: _worse(errors, size, best) for size in errors})


def _best(errors: Mapping[int, Sequence[float]]) -> int:
    return min(errors, key=lambda size: float(np.mean(errors[size])))


def _worse(errors: Mapping[int, Sequence[float]], size: int, best: int) -> bool:
    """Whether the interval of the difference, paired by seed, is above 0."""
    return size != best and interval(np.subtract(errors[size], errors[best]))[1] > 0


def _foretold(blocks: Sequence[_Block]) -> dict[str, Foretold]:
    found: dict[str, list[tuple[bool, float]]] = {}
    for block in blocks:
        for size, alignments in block.alignment.items():
            for value in alignments:
                found.setdefault(expected_harm(value), []).append((block.worse[size], block.cost[size]))
    return {
        harm: Foretold(len(cells), float(np.mean([w for w, _ in cells])), float(np.median([c for _, c in cells])))
        for harm, cells in found.items()
    }


def _correlation(blocks: Sequence[_Block]) -> float:
    alignment = [float(np.mean(values)) for block in blocks for values in block.alignment.values()]
    return float(spearmanr(alignment, [value for block in blocks for value in block.cost.values()]).statistic)


def _spread(blocks: list[_Block], of: Callable[[Sequence[_Block]], Any]) -> tuple[float, float, float]:
    drawn = np.random.default_rng(0).integers(len(blocks), size=(2000, len(blocks)))
    values = [float(of([blocks[i] for i in row])) for row in drawn]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(of(blocks)), float(low), float(high)


def lines(found: Validation) -> list[str]:
    """The validation as a page shows it."""
    right, safe = (" to ".join(f"{100 * share:.0f}" for share in part[1:]) for part in (found.right, found.safe))
    rows = [
        f"| recommended size not shown to be worse than the best | {100 * found.safe[0]:.0f} % ({safe}) |",
        f"| its mean error at most a point above the best | {100 * found.within:.0f} % |",
        f"| recommended size at most twice the smallest that is not shown to be worse | {100 * found.near:.0f} % |",
        f"| the smallest that is not shown to be worse | {100 * found.right[0]:.0f} % ({right}) |",
        f"| rank correlation of alignment and cost | {found.correlation[0]:.2f} ({found.correlation[1]:.2f} to "
        f"{found.correlation[2]:.2f}) |",
    ]
    rows = [f"| {found.advice} pieces of advice in {found.settings} settings | |", "|---|---|", *rows, ""]
    rows += ["| expected harm | sizes | shown to be worse than the best | median cost in points |", "|---|---|---|---|"]
    rows += [
        f"| {harm} | {cell.number} | {100 * cell.worse:.0f} % | {100 * cell.cost:.1f} |"
        for harm in ("none", "some", "large")
        if (cell := found.foretold.get(harm)) is not None
    ]
    return rows
