"""Studies with made-up results of every shape that a report has to show."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study_fakes import ERROR

from syncbn.population import effective_count
from syncbn.study.analysis.summary import Summary, summary_of
from syncbn.study.plan.contrasts import contrasts_from, default_contrasts
from syncbn.study.plan.grid import Arm, Cell, Study, Sweep, cell_key
from syncbn.train.config import (
    BudgetConfig,
    DataConfig,
    ModelConfig,
    NormConfig,
    OptimizerConfig,
    RunConfig,
    config_to_dict,
)
from syncbn.train.result import Metric, RunResult

WHOLE = 128
"""Images in the global batch of the decoupled sweep."""
ARMS: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "batch": ("Local BatchNorm", {"name": "batch"}, 0.42, 0.9),
    "sync": ("SyncBatchNorm", {"name": "sync"}, 0.0, 0.0),
    "sync4": ("SyncBatchNorm over 4 GPUs", {"name": "sync", "eps": 2e-5}, 0.11, 0.5),
    "renorm": ("Local BatchRenorm", {"name": "renorm"}, 0.16, 0.2),
    "frozen": ("Statistics frozen half-way", {"name": "frozen"}, 0.30, 0.3),
    "slow": ("Local BatchNorm, momentum 0.01", {"name": "batch", "momentum": 0.01}, 0.36, 0.6),
    "group": ("GroupNorm", {"name": "group"}, 0.012, 0.0),
    "layer": ("LayerNorm", {"name": "layer"}, 0.030, 0.0),
    "instance": ("InstanceNorm", {"name": "instance"}, 0.055, 0.0),
    "ws_group": ("GroupNorm with weight standardization", {"name": "ws_group"}, 0.006, 0.0),
    "evonorm": ("EvoNorm S0", {"name": "evonorm"}, 0.017, 0.0),
    "none": ("No normalization", {"name": "none"}, 0.20, 0.0),
}
"""Label, norm, cost of a normalization batch of 1, and the part of it that is an error of estimation."""
LAYERS = ["stem.norm", "stage1.0.norm1", "stage1.0.norm2", "stage2.0.norm1", "stage2.0.norm2", "stage3.0.norm1"]


def grid_study(arms: int = 12, values: int = 8, seeds: int = 6, **changes: Any) -> Study:
    """A decoupled sweep as the studies of this package have it, with local BatchNorm, the ill, as the reference."""
    sizes = tuple(2**i for i in range(values))
    chosen = dict(list(ARMS.items())[:arms])
    study = Study(
        name="grid",
        title="Small batches: what they cost, and which remedy works",
        question="128 images of CIFAR-10 are cut into ever smaller normalization batches. What does that cost?",
        base={"data": {"name": "cifar10"}, "model": {"name": "resnet20"}, "budget": {"epochs": 10}},
        arms=tuple(
            Arm(name=name, label=label, overrides={"norm": norm}, reference=name == "batch")
            for name, (label, norm, _, _) in chosen.items()
        ),
        seeds=tuple(range(seeds)),
        sweep=Sweep(values=sizes, global_batch_size=WHOLE),
    )
    study = replace(study, **changes)
    return study if "contrasts" in changes else replace(study, contrasts=_each_against_the_reference(study))


def _each_against_the_reference(study: Study) -> Any:
    at = {"per_gpu_batch_size": 2} if 2 in study.axes.get("per_gpu_batch_size", ()) else {}
    entry = {"arm": [arm.name for arm in study.arms[1:]], "at": at, "against": {"arm": "batch"}}
    return contrasts_from([entry], study, "contrasts") if study.arms[1:] else ()


def cells_of(study: Study) -> list[Cell]:
    """What ``study_cells`` makes of these studies, without its checks, which take a minute."""
    cells = []
    for seed in study.seeds:
        for arm in study.arms:
            cells += [_cell(study, arm, seed, point) for point in study.points(arm)]
    return cells


def _cell(study: Study, arm: Arm, seed: int, point: Any) -> Cell:
    at = dict(point)
    norm = NormConfig(**arm.overrides["norm"])
    size, gpus = at.get("per_gpu_batch_size", 4), 16
    if study.sweep is None or study.sweep.kind == "decoupled":
        size = size if norm.uses_batch else WHOLE
        gpus = WHOLE // size
    steps = 400 if at.get("hold") == "steps" else None
    config = RunConfig(
        gpus=gpus,
        per_gpu_batch_size=size,
        sync_group_size=min(4, gpus) if arm.name == "sync4" else None,
        seed=seed,
        data=DataConfig(name="cifar10", class_skew=at.get("data.class_skew", 1)),
        model=ModelConfig(name="resnet20"),
        norm=norm,
        optimizer=OptimizerConfig(lr=0.1),
        budget=BudgetConfig(epochs=None if steps else 10, steps=steps),
    )
    return Cell(arm=arm.name, seed=seed, point=point, config=config, key=cell_key(config))


def results_of(cells: list[Cell], **options: Any) -> dict[str, RunResult]:
    """A result for each cell's key, as training might have ended."""
    sizes = {"train_samples": 50_000, "test_samples": 10_000}
    return {cell.key: replace(result_of(cell, **options), **sizes) for cell in cells}


def retold(results: dict[str, RunResult], metric: Metric, score: Callable[[float], float]) -> dict[str, RunResult]:
    """The results as those of another task: ``score`` of what the error was is its metric, beside another one."""

    def told(test: dict[str, float | None] | None) -> dict[str, float | None] | None:
        if test is None or test["error"] is None:
            return None
        return {"loss": test["loss"], "other": 0.5, metric.name: score(test["error"])}

    return {
        key: replace(
            result,
            task="liver:Liver",
            metric=metric,
            test=told(result.test),
            history=[entry | {"test": told(entry["test"])} for entry in result.history],
            evaluations=[entry | {"test": told(entry["test"])} for entry in result.evaluations],
        )
        for key, result in results.items()
    }


def result_of(cell: Cell, *, samples: tuple[int, ...] = (128, 1024), layers: int = len(LAYERS)) -> RunResult:
    """The result of a cell: small normalization batches cost what :data:`ARMS` says; some runs diverge."""
    draw = random.Random(
        f"{cell.arm} {cell.point} {cell.seed}" if cell.config.norm.uses_batch else f"{cell.arm} {cell.seed}"
    )
    _, _, cost, estimation = ARMS[cell.arm]
    size = cell.config.normalization_batch_size
    size = None if size is None else max(1.0, size / min(cell.config.data.class_skew, size))
    lost = cost * (1.0 if size is None else size**-0.9)
    base = 0.085 + draw.gauss(0, 0.003)
    diverged = (cell.arm == "batch" and size == 1 and cell.seed % 3 == 1) or (cell.arm == "none" and cell.seed == 2)
    error = base + max(0.0, lost * (1 + draw.gauss(0, 0.06)))
    config = config_to_dict(cell.config)
    return RunResult(
        status="diverged" if diverged else "ok",
        task="classification",
        metric=ERROR,
        test=None if diverged else _test(error),
        steps=390,
        samples=50_000,
        seconds=100.0,
        samples_per_second=500 * (0.8 if size is not None else 0.7) * (1 + draw.gauss(0, 0.02)),
        parameters=270_000,
        losses=[2.3, 1.9] if diverged else [2.3 - 0.001 * step + draw.gauss(0, 0.01) for step in range(390)],
        history=[] if diverged else _history(error, draw),
        evaluations=[] if diverged else _evaluations(error, lost * estimation, size, samples, draw),
        layers=[] if diverged or size is None else _layers(size, layers, draw),
        peak_memory_bytes=int(3e8 * (1 + draw.gauss(0, 0.01))),
        train_samples=0,
        validation_samples=0,
        test_samples=0,
        processes=1,
        environment={"python": "3.12", "torch": "2.13", "device": "CPU (x86_64)", "git_commit": "0123abc"},
        config=config,
    )


def plain_study(
    *,
    seeds: int = 6,
    reference: str | None = "batch",
    arms: tuple[str, ...] = ("batch", "sync", "group"),
    **changes: Any,
) -> Study:
    """A study without axes: some of :data:`ARMS`, one of them (or none) the reference."""
    study = grid_study(seeds=seeds, sweep=None)
    chosen = {arm.name: arm for arm in study.arms}
    study = replace(study, arms=tuple(replace(chosen[name], reference=name == reference) for name in arms))
    return replace(study, **({"contrasts": default_contrasts(study)} | changes))


def with_errors(study: Study, errors: dict[str, list[float | str]]) -> tuple[list[Cell], dict[str, RunResult]]:
    """Cells and results of a study whose arms have these errors by seed, or "diverged", or "missing"."""
    cells, results = cells_of(study), {}
    for cell in cells:
        error = errors[cell.arm][study.seeds.index(cell.seed)]
        if error == "missing":
            continue
        result = result_of(cell)
        if isinstance(error, float):
            entries = [_entry("running", None, None, error)]
            result = replace(result, status="ok", test={"loss": error, "error": error}, evaluations=entries)
        else:
            result = replace(result, status="diverged", test=None, history=[], evaluations=[])
        results[cell.key] = result
    return cells, results


def summary_with(study: Study, errors: dict[str, list[float | str]]) -> Summary:
    """The same, summarized."""
    return summary_of(study, *with_errors(study, errors))


def _test(error: float) -> dict[str, float | None]:
    return {"loss": 3 * error, "error": error}


def _history(error: float, draw: random.Random) -> list[dict[str, Any]]:
    entries = []
    for epoch in range(1, 11):
        now = error + (0.9 - error) * 0.6**epoch * (1 + draw.gauss(0, 0.2)) if epoch < 10 else error
        entries.append({"epoch": epoch, "step": 39 * epoch, "train_loss": 3 * now, "test": _test(now)})
    return entries


def _evaluations(
    error: float, lost: float, size: float | None, samples: tuple[int, ...], draw: random.Random
) -> list[dict[str, Any]]:
    found = [_entry("running", None, None, error)]
    if size is not None:
        found.append(_entry("batch", None, None, error - 0.9 * lost + 0.15 / size + abs(draw.gauss(0, 0.002))))
        for n in samples:
            missed = 4 / n
            found.append(_entry("population", "mean", n, error - lost * (0.9 - missed) + 0.05 / size))
            found.append(_entry("population", "total", n, error - lost * (1 - missed)))
    return found


def _entry(statistics: str, estimator: str | None, samples: int | None, error: float) -> dict[str, Any]:
    return {"statistics": statistics, "estimator": estimator, "samples": samples, "test": _test(error)}


def _layers(size: float, layers: int, draw: random.Random) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in range(layers):
        side = 32 >> min(3, number // 2)
        count = size * side * side
        worth = 1.2 + count ** (0.6 + 0.02 * min(number, 15)) * (1 + draw.gauss(0, 0.02))
        kl = 1 / worth
        name = LAYERS[number] if layers == len(LAYERS) else f"layer{number // 8}.{number % 8}.norm"
        found.append(
            {
                "layer": name,
                "count": count,
                "kl": kl,
                "effective": effective_count(kl),
                "running_kl": kl / 9,
                "channels": 16,
                "dead": int(draw.random() < 0.1),
            }
        )
    return found


def open_page(path: Path, profile: Path) -> str:
    """The page's DOM as a browser without a network builds it; skips without one, fails on any message."""
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium to open the page")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={profile / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = ["chromium", *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    return done.stdout
