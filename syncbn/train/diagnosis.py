"""A diagnosis of a trained model: which layers suffer from small batches, at which size, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
"""Effective samples below which a layer is reported: its batch mean is then off by a quarter of a standard deviation or
more. A rule of thumb."""
MATTERS = 0.005
"""Smallest difference of test errors that is reported."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Measurements on a trained model."""

    config: RunConfig
    samples: int
    """Training images that the divergences are measured on."""
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
        for s in sorted({*(sizes or _powers(config.global_batch_size)), size}):
            if s > samples:
                continue
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


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


def _divergences(run: Run, size: int, samples: int, skew: int) -> list[LayerDivergence]:
    """Each layer's divergence with normalization batches of ``size`` consecutive training images."""
    train, c, epoch = run.data.train, run.config, run.schedule.epochs
    order = epoch_order(train.labels, skew, c.seed, epoch).tolist()[: samples // size * size]
    # Whole normalization batches, about a global batch at a time.
    together = max(1, c.global_batch_size // size) * size
    population = Population(run.model)
    with population.observing(), torch.no_grad():
        for x, _ in batch_loader(train, batches_of([(epoch, i) for i in order], together), 0):
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
    """What the measurements mean, one sentence each, the most important first."""
    words = [_of_estimation(found), _of_mismatch(found), _of_order(found), _of_noise(found)]
    return [word for word in words if word] or ["Nothing here suggests that small batches harmed this model."]


def _of_estimation(found: Diagnosis) -> str:
    running, population = found.errors["running"], min(found.errors["mean"], found.errors["total"])
    if running - population <= MATTERS:
        return ""
    return (
        f"Estimation: with population statistics the error is {_percent(population)} and not {_percent(running)}. "
        "Recompute them after training (syncbn.update_population_statistics)."
    )


def _of_mismatch(found: Diagnosis) -> str:
    batch, best = found.errors["batch"], min(found.errors[kind] for kind in ("running", "mean", "total"))
    if batch is None or best - batch <= MATTERS:
        return ""
    return (
        f"Mismatch: with the statistics of its own batches of {found.trained_at} the error is {_percent(batch)}, with "
        f"fixed ones at least {_percent(best)}. The model uses information about which samples share a batch, and "
        "inference does not have it. Train with larger normalization batches, BatchRenorm or GroupNorm."
    )


def _of_order(found: Diagnosis) -> str:
    own = {layer.layer: layer.effective for layer in found.layers.get(found.trained_at, [])}
    pairs = [(own.get(layer.layer), layer.effective) for layer in found.shuffled]
    ratios = sorted(shuffled / trained for trained, shuffled in pairs if trained and shuffled)
    if not ratios or ratios[len(ratios) // 2] < 2:
        return ""
    return (
        f"Order: a shuffled batch of {found.trained_at} would have {ratios[len(ratios) // 2]:.0f} times as many "
        "effective samples in the median layer, because the samples of a batch are alike. Shuffle the images, "
        "synchronize over GPUs that see other samples, or use BatchRenorm or GroupNorm."
    )


def _of_noise(found: Diagnosis) -> str:
    suffering = {size: [x.layer for x in layers if _suffers(x)] for size, layers in found.layers.items()}
    own = suffering.get(found.trained_at, [])
    if not own:
        return ""
    named = ", ".join(own[:3]) + (", ..." if len(own) > 3 else "")
    words = (
        f"Noise: at {found.trained_at} samples, as trained, {len(own)} of {len(found.shuffled)} layers "
        f"have fewer than {FEW:.0f} effective samples ({named})."
    )
    enough = next((size for size, layers in suffering.items() if size > found.trained_at and not layers), None)
    if enough is None:
        return f"{words} No size tried is enough for all layers: use BatchRenorm, or train anew with GroupNorm."
    factor = -(-enough // found.trained_at)
    return f"{words} {enough} are enough: synchronize over {factor} GPUs (SyncBatchNorm), or use BatchRenorm."


def _suffers(layer: LayerDivergence) -> bool:
    return layer.effective is not None and layer.effective < FEW


def print_diagnosis(found: Diagnosis) -> None:
    """Print errors, the table of layers and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    c = found.config
    console.print(
        f"{c.model.name}, norm {c.norm.name}, trained with {found.trained_at} samples per mean; "
        f"measured on {found.samples} training images",
        highlight=False,
    )
    for entry in found.evaluations:
        kind = f"population statistics ({entry['estimator']}, {entry['samples']} images)" if entry["estimator"] else ""
        kind = kind or f"{entry['statistics']} statistics"
        error = "cannot be computed" if entry["test_error"] is None else _percent(entry["test_error"])
        console.print(f"  test error with {kind}: {error}", highlight=False)
    table = Table(title="KL of batch from population statistics (effective samples), by normalization batch size")
    table.add_column("layer")
    for size in found.layers:
        table.add_column(f"{size}{'*' if size == found.trained_at else ''}", justify="right")
    table.add_column("running", justify="right")
    for row in zip(*found.layers.values(), strict=True):
        cells = [f"{_number(x.kl)} ({_number(x.effective)})" for x in row]
        table.add_row(row[0].layer, *cells, _number(row[-1].running_kl))
    console.print(table)
    console.print("* as trained; running: KL of the running from the population statistics", highlight=False)
    for sentence in advice(found):
        console.print(f"- {sentence}", highlight=False, markup=False)


def _percent(error: float) -> str:
    return f"{100 * error:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
