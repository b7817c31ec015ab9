"""``syncbn diagnose``: which layers of a trained model suffer from small batches, at which size, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from syncbn.layers import SampleGroups
from syncbn.population import LayerDivergence, Population
from syncbn.train.checkpoint import load_weights
from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.config_io import load_config
from syncbn.train.data.datasets import batch_loader
from syncbn.train.data.order import epoch_order
from syncbn.train.estimation import evaluate_statistics
from syncbn.train.evaluate import evaluate
from syncbn.train.logical_gpus import Layout, Placement
from syncbn.train.session import open_session
from syncbn.train.state import Run, prepare

FEW = 16.0
"""Effective samples below which a layer is said to suffer: the batch's mean is then off by a quarter of a standard
deviation and more. A rule of thumb, not a law."""
MATTERS = 0.005
"""Difference of test errors that is worth a word."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was measured on a trained model."""

    config: RunConfig
    samples: int
    """Training images that the divergences are measured on."""
    evaluations: list[dict[str, Any]]
    """Errors under running, batch and population statistics, as in :attr:`RunResult.evaluations`."""
    layers: dict[int, list[LayerDivergence]]
    """For each normalization batch size, in samples, the divergence of every layer, in the training's kind of order."""
    shuffled: list[LayerDivergence]
    """The same at the trained size with the images shuffled; equal to it unless the order was skewed."""

    @property
    def errors(self) -> dict[str, Any]:
        """Test error by kind of statistics (``running``, ``batch``) or estimator of the population's."""
        return {entry["estimator"] or entry["statistics"]: entry["test_error"] for entry in self.evaluations}

    @property
    def trained_at(self) -> int:
        """Normalization batch size of the training."""
        size = self.config.normalization_batch_size
        assert size is not None
        return size


def diagnose(folder: Path, samples: int = 1024, sizes: Sequence[int] | None = None) -> Diagnosis:
    """Measure a trained model, in this process.

    Args:
        folder: of a run: its configuration, and its weights or its last checkpoint.
        samples: training images to use; at most all of them.
        sizes: normalization batch sizes to try; by default powers of two up to the global batch, and the run's own.

    Raises:
        ConfigError: no such run, a norm without batch statistics, or a size that is no positive integer.
    """
    config, weights = _find(folder)
    size = config.normalization_batch_size
    if size is None or config.norm.name == "mabn":  # whose windows are no batch's statistics
        raise ConfigError("checkpoint", str(folder), f"a run whose norm uses batch statistics, not {config.norm.name}")
    if samples < 2 or any(s < 1 for s in sizes or ()):
        raise ConfigError("samples", samples, "at least 2, and batch sizes of at least 1")
    wanted = replace(config.evaluation, batch=True, population_samples=[samples])
    config = replace(config, evaluation=wanted)
    with open_session(config, None) as accelerator:
        run = prepare(config, Layout.of(config, Placement()), accelerator, None, False, False)
        load_weights(run.model, weights)
        run.model.to(run.device, run.dtype)
        samples = min(samples, len(run.data.train))
        if size > samples:
            raise ConfigError("samples", samples, f"at least {size}, the normalization batch of the run")
        chosen = [s for s in sorted({*(sizes or _powers(config.global_batch_size)), size}) if s <= samples]
        error, loss, _ = evaluate(
            run.model, run.data.test, config.budget.eval_batch_size, Placement(), run.device, run.dtype
        )
        evaluations, _ = evaluate_statistics(run, {"test_error": error, "test_loss": loss})
        skew = config.data.class_skew
        layers = {}
        for s in chosen:
            try:
                layers[s] = _divergences(run, s, samples, skew)
            except ValueError as error:  # too few values for a variance, as in a network that ends in 1x1 maps
                if s == size or sizes is not None:
                    raise ConfigError("sizes", s, f"a batch that every layer can normalize ({error})") from error
        shuffled = layers[size] if skew == 1 else _divergences(run, size, samples, 1)
    return Diagnosis(config=config, samples=samples, evaluations=evaluations, layers=layers, shuffled=shuffled)


def _find(folder: Path) -> tuple[RunConfig, Path]:
    pointer = folder / "checkpoint" / "latest"
    weights = folder / "model.safetensors"
    if not weights.is_file() and pointer.is_file():
        weights = folder / "checkpoint" / pointer.read_text().strip() / "model.safetensors"
    if not weights.is_file() or not (folder / "config.yaml").is_file():
        expected = "the folder of a run, with config.yaml and model.safetensors or a checkpoint"
        raise ConfigError("checkpoint", str(folder), expected)
    return load_config(folder / "config.yaml"), weights


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _divergences(run: Run, size: int, samples: int, skew: int) -> list[LayerDivergence]:
    """Each layer's divergence with normalization batches of ``size`` consecutive training images."""
    train, c = run.data.train, run.config
    order = epoch_order(train.labels, skew, c.seed, run.schedule.epochs).tolist()[: samples // size * size]
    # About a global batch at a time, in whole normalization batches.
    together = max(1, c.global_batch_size // size) * size
    keys = [[(run.schedule.epochs, i) for i in order[at : at + together]] for at in range(0, len(order), together)]
    population = Population(run.model)
    with population.observing(), torch.no_grad():
        for x, _ in batch_loader(train, keys, 0):
            groups = SampleGroups(
                index=torch.arange(len(x), device=run.device).div(size, rounding_mode="floor"),
                number=len(x) // size,
                smallest=size,
            )
            for layer in run.norms:
                layer.sample_groups = groups
            run.model(x.to(run.device, run.dtype))
    return population.divergences()


# ---- in words


def advice(found: Diagnosis) -> list[str]:
    """What the figures say, a sentence each, the most important first."""
    words = [*_of_estimation(found), *_of_mismatch(found), *_of_order(found), *_of_noise(found)]
    return words or ["Nothing here suggests that small batches did this model any harm."]


def _of_estimation(found: Diagnosis) -> list[str]:
    errors = found.errors
    running, population = errors["running"], min(errors["mean"], errors["total"])
    if running - population > MATTERS:
        return [
            f"Estimation: with population statistics the error is {_percent(population)} and not {_percent(running)}; "
            "recompute them after training (syncbn.update_population_statistics)."
        ]
    return []


def _of_mismatch(found: Diagnosis) -> list[str]:
    errors = found.errors
    batch, best = errors["batch"], min(errors[kind] for kind in ("running", "mean", "total"))
    if batch is None or best - batch <= MATTERS:
        return []
    return [
        f"Mismatch: with the statistics of its own batches of {found.trained_at} the error is {_percent(batch)}, with "
        f"any fixed ones at least {_percent(best)}. The model reads something from which samples share a batch, and "
        "loses it at inference: train with larger normalization batches, BatchRenorm or GroupNorm."
    ]


def _of_order(found: Diagnosis) -> list[str]:
    own = {layer.layer: layer.effective for layer in found.layers.get(found.trained_at, [])}
    pairs = [(own.get(layer.layer), layer.effective) for layer in found.shuffled]
    ratios = sorted(shuffled / trained for trained, shuffled in pairs if trained and shuffled)
    if not ratios or ratios[len(ratios) // 2] < 2:
        return []
    return [
        f"Order: shuffled, a batch of {found.trained_at} would be worth {ratios[len(ratios) // 2]:.0f} times as many "
        "effective samples in the middle layer. Its samples are alike: shuffle, synchronize over GPUs that see other "
        "samples, or take BatchRenorm or GroupNorm."
    ]


def _of_noise(found: Diagnosis) -> list[str]:
    suffering = {size: [x.layer for x in layers if _suffers(x)] for size, layers in found.layers.items()}
    own = suffering.get(found.trained_at, [])
    if not own:
        return []
    named = ", ".join(own[:3]) + (", ..." if len(own) > 3 else "")
    words = (
        f"Noise: at the {found.trained_at} samples it was trained with, {len(own)} of {len(found.shuffled)} layers "
        f"have fewer than {FEW:.0f} effective samples ({named})."
    )
    enough = next((size for size, layers in suffering.items() if size > found.trained_at and not layers), None)
    if enough is None:
        return [f"{words} No size tried is enough for all: take BatchRenorm, or GroupNorm if it is to be trained anew."]
    factor = -(-enough // found.trained_at)
    return [f"{words} {enough} are enough: synchronize over {factor} GPUs (SyncBatchNorm), else take BatchRenorm."]


def _suffers(layer: LayerDivergence) -> bool:
    return layer.effective is not None and layer.effective < FEW


def print_diagnosis(found: Diagnosis) -> None:
    """Errors, the table of layers and the advice, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    c = found.config
    console.print(
        f"{c.model.name}, norm {c.norm.name}, trained with {found.trained_at} samples to a mean; "
        f"measured on {found.samples} training images",
        highlight=False,
    )
    for entry in found.evaluations:
        kind = f"population statistics ({entry['estimator']}, {entry['samples']} images)" if entry["estimator"] else ""
        kind = kind or f"{entry['statistics']} statistics"
        error = "cannot be computed" if entry["test_error"] is None else _percent(entry["test_error"])
        console.print(f"  test error with {kind}: {error}", highlight=False)
    table = Table(title="KL of batch from population statistics, and effective samples, by normalization batch size")
    table.add_column("layer")
    for size in found.layers:
        table.add_column(f"{size}{'*' if size == found.trained_at else ''}", justify="right")
    table.add_column("running", justify="right")
    for row in zip(*found.layers.values(), strict=True):
        cells = [f"{_number(x.kl)} ({_number(x.effective)})" for x in row]
        table.add_row(row[0].layer, *cells, _number(row[-1].running_kl))
    console.print(table)
    console.print("* as trained; running: KL of the running statistics from the population's", highlight=False)
    for sentence in advice(found):
        console.print(f"- {sentence}", highlight=False, markup=False)


def _percent(error: float) -> str:
    return f"{100 * error:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
