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
from syncbn.train.batches import fetched, forward
from syncbn.train.checkpoint import load_weights
from syncbn.train.config import ConfigError, RunConfig, load_config, require
from syncbn.train.data.order import order_of
from syncbn.train.data.samples import batch_loader
from syncbn.train.evaluate import evaluate, evaluate_statistics
from syncbn.train.launch import open_session
from syncbn.train.logical_gpus import Partition, Placement
from syncbn.train.result import Metric
from syncbn.train.schedule import batches_of
from syncbn.train.state import Run, prepare
from syncbn.train.task import Task

FEW = 16.0
"""Effective samples below which a layer is reported. A batch mean is then off by a quarter of a standard deviation."""
MATTERS = 0.005
"""Smallest difference of the metric that is reported; relative, unless its values are fractions."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Measurements on a trained model."""

    config: RunConfig
    metric: Metric
    samples: int  # training samples that the divergences are measured on
    evaluations: list[dict[str, Any]]
    """The test set with running, batch and population statistics, as in :attr:`RunResult.evaluations`."""
    layers: dict[int, list[LayerDivergence]]
    """Divergence of every layer for each normalization batch size, with the samples ordered as in training."""
    shuffled: list[LayerDivergence]
    """Divergence at the trained size with shuffled samples. It differs only if training had class skew."""

    @property
    def scores(self) -> dict[str, float | None]:
        """The metric by statistics: ``running``, ``batch``, or the population estimator (``mean``, ``total``)."""
        return {
            entry["estimator"] or entry["statistics"]: entry["test"] and entry["test"][self.metric.name]
            for entry in self.evaluations
        }

    @property
    def trained_at(self) -> int:
        """Normalization batch size in training."""
        size = self.config.normalization_batch_size
        assert size is not None
        return size


def diagnose(
    folder: Path, samples: int = 1024, sizes: Sequence[int] | None = None, *, task: Task | None = None
) -> Diagnosis:
    """Measure how a trained model depends on its normalization batch, in this process.

    Args:
        folder: folder of a run, with its configuration and its weights or last checkpoint.
        samples: training samples to use; at most all of them.
        sizes: normalization batch sizes to try besides the run's own; by default powers of two up to the global batch.
        task: what was trained, in place of the task that the run's configuration names.

    Returns:
        The measurements: ``evaluations`` and ``scores`` (the metric by kind of statistics), ``layers`` (divergence of
        each layer for each size), ``shuffled`` (with shuffled samples), ``trained_at``, ``samples``, ``metric`` and
        ``config``.

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
        run = prepare(config, Partition.of(config, Placement()), accelerator, given=task)
        try:
            load_weights(run.model, weights)
        except RuntimeError as error:  # weights of another network
            expected = f"a run of the task {run.task_name}, whose model has other weights; give `task`"
            raise ConfigError("checkpoint", str(folder), expected) from error
        run.model.to(run.device, run.dtype)
        samples = min(samples, len(run.data.train))
        require(size <= samples, "samples", samples, f"at least {size}, the normalization batch of the run")
        evaluations, _ = evaluate_statistics(run, evaluate(run, run.data.test))
        layers = _by_size(run, size, samples, sizes)
        skewed = config.data.class_skew > 1
        return Diagnosis(
            config=config,
            metric=run.task.metric,
            samples=samples,
            evaluations=evaluations,
            layers=layers,
            shuffled=_divergences(run, size, samples, 1) if skewed else layers[size],
        )


def _find(folder: Path) -> tuple[RunConfig, Path]:
    pointer = folder / "checkpoint" / "latest"
    weights = folder / "model.safetensors"
    if not weights.is_file() and pointer.is_file():
        weights = folder / "checkpoint" / pointer.read_text().strip() / "model.safetensors"
    if not weights.is_file() or not (folder / "config.yaml").is_file():
        expected = "the folder of a run, with config.yaml and model.safetensors or a checkpoint"
        raise ConfigError("checkpoint", str(folder), expected)
    return load_config(folder / "config.yaml"), weights


def _by_size(run: Run, own: int, samples: int, sizes: Sequence[int] | None) -> dict[int, list[LayerDivergence]]:
    """The layers' divergences at the run's own size and at the others, ordered as in training."""
    powers = [2**k for k in range(run.config.global_batch_size.bit_length())]
    layers = {}
    for size in sorted(size for size in {*(sizes or powers), own} if size <= samples):
        try:
            layers[size] = _divergences(run, size, samples, run.config.data.class_skew)
        except ValueError as error:  # one value per channel has no variance, as in a network that ends in 1x1 maps
            if size == own or sizes is not None:
                raise ConfigError("sizes", size, f"a batch that every layer can normalize ({error})") from error
    return layers


def _divergences(run: Run, size: int, samples: int, skew: int) -> list[LayerDivergence]:
    train, c, epoch = run.data.train, run.config, run.schedule.epochs
    order = order_of(len(train), train.labels, skew, c.seed, epoch)[: samples // size * size]
    # Whole normalization batches, about a global batch at a time.
    together = max(1, c.global_batch_size // size) * size
    population = Population(run.model)
    with population.observing(), torch.no_grad():
        batches = batches_of([(epoch, i) for i in order], together)
        for keys, batch in zip(batches, fetched(run, batch_loader(train, batches, 0)), strict=True):
            index = torch.arange(len(keys), device=run.device) // size
            groups = SampleGroups(index=index, number=len(keys) // size, smallest=size)
            for layer in run.norms:
                layer.sample_groups = groups
            forward(run, run.model, *batch)
    return population.divergences()


# ---- in words


def advice(found: Diagnosis) -> list[str]:
    """What the measurements mean, one sentence each, the most important first."""
    size, words, metric = found.trained_at, [], found.metric
    known = {kind: score for kind, score in found.scores.items() if score is not None}
    running = known["running"]
    population = min(known["mean"], known["total"], key=lambda score: metric.sign * score)
    matters = MATTERS * (1 if metric.percent else abs(running))
    if metric.sign * (running - population) > matters:
        words.append(
            f"Estimation: with population statistics the {metric.name} is {metric.shown(population)} and not "
            f"{metric.shown(running)}. Recompute them after training (syncbn.update_population_statistics)."
        )
    best = min(running, population, key=lambda score: metric.sign * score)
    if "batch" in known and metric.sign * (best - known["batch"]) > matters:
        words.append(
            f"Mismatch: with the statistics of its own batches of {size} the {metric.name} is "
            f"{metric.shown(known['batch'])}, with fixed ones at {'most' if metric.higher_is_better else 'least'} "
            f"{metric.shown(best)}. The model uses information about which samples share a batch, and "
            "inference does not have it. Train with larger normalization batches, BatchRenorm or GroupNorm."
        )
    own = {layer.layer: layer.effective for layer in found.layers.get(size, [])}
    pairs = [(own.get(layer.layer), layer.effective) for layer in found.shuffled]
    ratio = median_high([shuffled / trained for trained, shuffled in pairs if trained and shuffled] or [0.0])
    if ratio >= 2:
        words.append(
            f"Order: a shuffled batch of {size} would have {ratio:.0f} times as many effective samples in the median "
            "layer, because the samples of a batch are alike. Shuffle the samples, synchronize over GPUs that see "
            "others, or use BatchRenorm or GroupNorm."
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
    name = c.model.name if c.task.name == "classification" else c.task.name
    console.print(
        f"{name}, norm {c.norm.name}, trained with {found.trained_at} samples per mean; "
        f"measured on {found.samples} training samples"
    )
    for entry in found.evaluations:
        detail = f" ({entry['estimator']}, {entry['samples']} samples)" if entry["estimator"] else ""
        kind = f"{entry['statistics']} statistics{detail}"
        values = entry["test"]
        shown = "cannot be computed" if values is None else found.metric.shown(values[found.metric.name])
        console.print(f"  test {found.metric.name} with {kind}: {shown}")
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
