"""A diagnosis of a trained model: which layers suffer from small batches, at which size, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_high
from typing import Any

import torch

from syncbn.layers import SampleGroups
from syncbn.population import LayerDivergence, Population
from syncbn.train.checkpoint import load_weights
from syncbn.train.config import ConfigError, RunConfig, load_config, require
from syncbn.train.data.datasets import batch_loader
from syncbn.train.data.order import epoch_order
from syncbn.train.evaluate import evaluate, evaluate_statistics
from syncbn.train.launch import open_session
from syncbn.train.logical_gpus import Partition, Placement
from syncbn.train.schedule import batches_of
from syncbn.train.state import Run, prepare

FEW = 16.0
"""Effective samples below which a layer is reported. A batch mean is then off by a quarter of a standard deviation."""
MATTERS = 0.005
"""Smallest difference of test errors that is reported."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Measurements on a trained model."""

    config: RunConfig
    samples: int  # training images that the divergences are measured on
    evaluations: list[dict[str, Any]]
    """Test errors with running, batch and population statistics, as in :attr:`RunResult.evaluations`."""
    layers: dict[int, list[LayerDivergence]]
    """Divergence of every layer for each normalization batch size, with the images ordered as in training."""
    shuffled: list[LayerDivergence]
    """Divergence at the trained size with shuffled images. It differs only if training had class skew."""

    @property
    def errors(self) -> dict[str, Any]:
        """Test error by statistics: ``running``, ``batch``, or the population estimator (``mean``, ``total``)."""
        return {entry["estimator"] or entry["statistics"]: entry["test_error"] for entry in self.evaluations}

    @property
    def trained_at(self) -> int:
        """Normalization batch size in training."""
        size = self.config.normalization_batch_size
        assert size is not None
        return size


def diagnose(folder: Path, samples: int = 1024, sizes: Sequence[int] | None = None) -> Diagnosis:
    """Measure how a trained model depends on its normalization batch, in this process.

    Args:
        folder: folder of a run, with its configuration and its weights or last checkpoint.
        samples: training images to use; at most all of them.
        sizes: normalization batch sizes to try besides the run's own; by default powers of two up to the global batch.

    Returns:
        The measurements: ``evaluations`` and ``errors`` (test errors by kind of statistics), ``layers`` (divergence of
        each layer for each size), ``shuffled`` (with shuffled images), ``trained_at``, ``samples`` and ``config``.

    Raises:
        ConfigError: the folder holds no run, its norm has no batch statistics, or a size cannot be measured.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from syncbn.train import diagnose, load_config, train
        >>> data = {"data.name": "synthetic", "data.synthetic_samples": 64, "data.image_size": 8}
        >>> run = {"gpus": 2, "per_gpu_batch_size": 4, "budget.epochs": 1, "device": "cpu"}
        >>> config = load_config(None, {**data, **run, "model.width": 4})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train(config, Path(folder))
        ...     found = diagnose(Path(folder), samples=64)
        >>> found.trained_at, sorted(found.layers)
        (4, [1, 2, 4, 8])
    """
    config, weights = _find(folder)
    size = config.normalization_batch_size
    if size is None or config.norm.name == "mabn":  # its windows are not the statistics of a batch
        raise ConfigError("checkpoint", str(folder), f"a run whose norm uses batch statistics, not {config.norm.name}")
    require(samples >= 2, "samples", samples, "an integer of at least 2")
    require(all(s >= 1 for s in sizes or ()), "sizes", sizes, "batch sizes of at least 1")
    config = replace(config, evaluation=replace(config.evaluation, batch=True, population_samples=[samples]))
    with open_session(config, None) as accelerator:
        run = prepare(config, Partition.of(config, Placement()), accelerator, None, False, False)
        load_weights(run.model, weights)
        run.model.to(run.device, run.dtype)
        samples = min(samples, len(run.data.train))
        require(size <= samples, "samples", samples, f"at least {size}, the normalization batch of the run")
        error, loss, _ = evaluate(run)
        evaluations, _ = evaluate_statistics(run, {"test_error": error, "test_loss": loss})
        skew = config.data.class_skew
        layers = {}
        powers = [2**k for k in range(config.global_batch_size.bit_length())]
        for s in sorted(s for s in {*(sizes or powers), size} if s <= samples):
            try:
                layers[s] = _divergences(run, s, samples, skew)
            except ValueError as error:  # one value per channel has no variance, as in a network that ends in 1x1 maps
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


def _divergences(run: Run, size: int, samples: int, skew: int) -> list[LayerDivergence]:
    train, c, epoch = run.data.train, run.config, run.schedule.epochs
    order = epoch_order(train.labels, skew, c.seed, epoch).tolist()[: samples // size * size]
    # Whole normalization batches, about a global batch at a time.
    together = max(1, c.global_batch_size // size) * size
    population = Population(run.model)
    with population.observing(), torch.no_grad():
        for x, _ in batch_loader(train, batches_of([(epoch, i) for i in order], together), 0):
            index = torch.arange(len(x), device=run.device) // size
            groups = SampleGroups(index=index, number=len(x) // size, smallest=size)
            for layer in run.norms:
                layer.sample_groups = groups
            run.model(x.to(run.device, run.dtype))
    return population.divergences()


# ---- in words


def advice(found: Diagnosis) -> list[str]:
    """What the measurements mean, one sentence each, the most important first."""
    size, errors, words = found.trained_at, found.errors, []
    population = min(errors["mean"], errors["total"])
    if errors["running"] - population > MATTERS:
        words.append(
            f"Estimation: with population statistics the error is {_percent(population)} and not "
            f"{_percent(errors['running'])}. Recompute them after training (syncbn.update_population_statistics)."
        )
    batch, best = errors["batch"], min(errors["running"], population)
    if batch is not None and best - batch > MATTERS:
        words.append(
            f"Mismatch: with the statistics of its own batches of {size} the error is {_percent(batch)}, with fixed "
            f"ones at least {_percent(best)}. The model uses information about which samples share a batch, and "
            "inference does not have it. Train with larger normalization batches, BatchRenorm or GroupNorm."
        )
    own = {layer.layer: layer.effective for layer in found.layers.get(size, [])}
    pairs = [(own.get(layer.layer), layer.effective) for layer in found.shuffled]
    ratio = median_high([shuffled / trained for trained, shuffled in pairs if trained and shuffled] or [0.0])
    if ratio >= 2:
        words.append(
            f"Order: a shuffled batch of {size} would have {ratio:.0f} times as many effective samples in the median "
            "layer, because the samples of a batch are alike. Shuffle the images, synchronize over GPUs that see other "
            "samples, or use BatchRenorm or GroupNorm."
        )
    suffering = {
        tried: [x.layer for x in layers if x.effective is not None and x.effective < FEW]
        for tried, layers in found.layers.items()
    }
    if few := suffering.get(size):
        named = ", ".join(few[:3]) + (", ..." if len(few) > 3 else "")
        enough = next((tried for tried, layers in suffering.items() if tried > size and not layers), None)
        remedy = "No size tried is enough for all layers: use BatchRenorm, or train anew with GroupNorm."
        if enough is not None:
            gpus = -(-enough // size)
            remedy = f"{enough} are enough: synchronize over {gpus} GPUs (SyncBatchNorm), or use BatchRenorm."
        words.append(
            f"Noise: at {size} samples, as trained, {len(few)} of {len(found.shuffled)} layers have fewer than "
            f"{FEW:.0f} effective samples ({named}). {remedy}"
        )
    return words or ["Nothing here suggests that small batches harmed this model."]


def print_diagnosis(found: Diagnosis) -> None:
    """Print errors, the table of layers and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    c = found.config
    console.print(
        f"{c.model.name}, norm {c.norm.name}, trained with {found.trained_at} samples per mean; "
        f"measured on {found.samples} training images"
    )
    for entry in found.evaluations:
        detail = f" ({entry['estimator']}, {entry['samples']} images)" if entry["estimator"] else ""
        kind = f"{entry['statistics']} statistics{detail}"
        error = "cannot be computed" if entry["test_error"] is None else _percent(entry["test_error"])
        console.print(f"  test error with {kind}: {error}")
    table = Table(title="KL of batch from population statistics (effective samples), by normalization batch size")
    table.add_column("layer")
    for heading in (*(f"{size}{'*' * (size == found.trained_at)}" for size in found.layers), "running"):
        table.add_column(heading, justify="right")
    for row in zip(*found.layers.values(), strict=True):
        cells = [f"{_number(x.kl)} ({_number(x.effective)})" for x in row]
        table.add_row(row[0].layer, *cells, _number(row[-1].running_kl))
    console.print(table)
    console.print("* as trained; running: KL of the running from the population statistics")
    for sentence in advice(found):
        console.print(f"- {sentence}", markup=False)


def _percent(error: float) -> str:
    return f"{100 * error:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
