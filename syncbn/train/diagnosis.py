"""A diagnosis of a trained model: which layers suffer from small batches, at which size, and what helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.layers import BatchError, SampleGroups
from syncbn.population import LayerDivergence, Population
from syncbn.train.batches import fetched, forward, loss_of, metrics_of, split
from syncbn.train.checkpoint import whole_checkpoint
from syncbn.train.config import ConfigError, LocalError, RunConfig, load_config, require
from syncbn.train.data.order import order_of
from syncbn.train.data.samples import Key, batch_loader
from syncbn.train.evaluate import Seen, evaluate, evaluate_statistics
from syncbn.train.launch import open_session
from syncbn.train.logical_gpus import Partition, Placement
from syncbn.train.paired import Difference, independent_difference, paired_difference
from syncbn.train.result import Metric, RunResult
from syncbn.train.schedule import batches_of
from syncbn.train.state import Run, prepare
from syncbn.train.stored import load_model_tensors
from syncbn.train.task import Sum, Task


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Measurements on a trained model. :meth:`print` shows them, with what they mean in words."""

    title: str
    """The model, and its normalization if it is known."""
    trained_at: int | None
    """Normalization batch size in training; None if it is not known."""
    samples: int
    """Training samples that the divergences are measured on."""
    layers: dict[int, list[LayerDivergence]]
    """Divergence of every layer for each normalization batch size, with the samples ordered as in training."""
    shuffled: list[LayerDivergence]
    """Divergence at the trained size, or else the largest, with shuffled samples. It differs if the samples of a batch
    are alike, as with class skew."""
    metric: Metric | None = None
    """What the test set is evaluated by; None if it was not."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The test set with running, batch and population statistics, as in :attr:`RunResult.evaluations`."""
    per_sample: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """For the names in :attr:`scores`, the metric's total and count of each test sample: float64 (n, 2, K) for K
    classes. Empty if they are not known."""
    test_samples: int | None = None
    """Number of test samples, if it is known."""
    evaluated_at: int | None = None
    """Largest batch of the evaluation with batch statistics, if that is not :attr:`trained_at`."""
    uses: dict[str, int] = field(default_factory=dict)
    """Layers that the model applies several times in one forward pass, and how often."""
    config: RunConfig | None = None
    """Configuration of the run; None for a model that no run made."""

    @property
    def scores(self) -> dict[str, float | None]:
        """The metric by statistics: ``running``, ``batch``, or the population estimator (``mean``, ``total``)."""
        if self.metric is None:
            return {}
        return {
            entry["estimator"] or entry["statistics"]: entry["test"] and entry["test"][self.metric.name]
            for entry in self.evaluations
        }

    def gain(self, first: str, second: str) -> Difference | None:
        """By how much the second of two :attr:`scores` is the better one, with its interval over test samples.

        None if the scores alone do not tell how large their noise is.
        """
        metric, scores, pairs = self.metric, self.scores, self.per_sample
        before, after = scores[first], scores[second]
        if metric is None or before is None or after is None:
            return None
        if first in pairs and second in pairs and pairs[first].shape == pairs[second].shape:
            found = paired_difference(pairs[first], pairs[second], of_samples=metric.of_samples)
        elif metric.of_samples and self.test_samples is not None:
            found = independent_difference(before, after, self.test_samples)
        else:
            return None
        if metric.sign < 0:
            return found
        return Difference(-found.value, -found.high, -found.low, found.samples)

    @property
    def advice(self) -> list[str]:
        """What the measurements mean, one sentence each, the most important first."""
        from syncbn.train.advice import advice

        return advice(self)

    def print(self) -> None:
        """Print the scores, the table of layers and the advice."""
        from syncbn.train.advice import print_diagnosis

        print_diagnosis(self)


def diagnose(
    folder: Path, samples: int = 1024, sizes: Sequence[int] | None = None, *, task: Task | None = None
) -> Diagnosis:
    """Measure how the trained model of a run depends on its normalization batch, in this process.

    :func:`diagnose_model` does it for a model that no run of this package made.

    Args:
        folder: folder of a run, with its configuration and its weights or last checkpoint.
        samples: training samples to use; at most all of them.
        sizes: normalization batch sizes to try besides the run's own; by default powers of two up to the global batch.
        task: what was trained, in place of the task that the run's configuration names.

    Returns:
        The measurements: ``evaluations`` and ``scores`` (the metric by kind of statistics), ``layers`` (divergence of
        each layer for each size), ``shuffled`` (with shuffled samples), ``trained_at``, ``samples``, ``metric`` and
        ``config``; ``advice`` says what they mean, and ``print()`` shows all.

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
        raise ConfigError("checkpoint", folder, f"a run whose norm uses batch statistics, not {config.norm.name}")
    require(samples >= 2, "samples", samples, "an integer of at least 2")
    require(all(s >= 1 for s in sizes or ()), "sizes", sizes, "batch sizes of at least 1")
    config = replace(config, evaluation=replace(config.evaluation, batch=True, population_samples=[samples]))
    with open_session(config, None) as accelerator:
        run = prepare(config, Partition.of(config, Placement()), accelerator, given=task)
        try:
            load_model_tensors(run.model, weights)
        except RuntimeError as error:  # weights of another network
            expected = f"a run of the task {run.task_name}, whose model has other weights; give `task`"
            raise ConfigError("checkpoint", folder, expected) from error
        run.model.to(run.device, run.dtype)
        samples = min(samples, len(run.data.train))
        require(size <= samples, "samples", samples, f"at least {size}, the normalization batch of the run")
        return _measured(run, size, samples, sizes)


def _measured(run: Run, size: int, samples: int, sizes: Sequence[int] | None) -> Diagnosis:
    """The diagnosis of a run whose trained weights are loaded."""
    config, seen = run.config, _Seen(run)
    evaluations, _ = evaluate_statistics(run, evaluate(run, run.data.test, seen.of("running")), seen.of)
    layers = _by_size(run, size, samples, sizes)
    name = config.model.name if config.task.name == "classification" else run.task_name
    found = Diagnosis(
        title=f"{name}, norm {config.norm.name}",
        trained_at=size,
        samples=samples,
        layers=layers,
        shuffled=_divergences(run, size, samples, 1) if config.data.class_skew > 1 else layers[size],
        metric=run.task.metric,
        evaluations=evaluations,
        test_samples=len(run.data.test),
        config=config,
    )
    return replace(found, per_sample=seen.checked(found.scores))


class _Seen:
    """The metric's total and count of each test sample, by kind of statistics."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pairs: dict[str, dict[int, Tensor]] = {}

    def of(self, kind: str) -> Seen:
        """What the evaluation with this kind of statistics calls with each batch."""
        pairs = self._pairs.setdefault(kind, {})

        def add(keys: list[Key], outputs: Any, targets: Any) -> None:
            ones = [1] * len(keys)
            # Outputs may be of no sample in particular, and the metric one of several samples or of the whole set.
            with suppress(TypeError, KeyError, LocalError):
                for (_, index), out, target in zip(keys, split(outputs, ones), split(targets, ones), strict=True):
                    pairs[index] = self._pair(out, target)

        return add

    def _pair(self, outputs: Any, targets: Any) -> Tensor:
        name = self._run.task.metric.name
        if name != "loss":
            return metrics_of(self._run, outputs, targets)[name].cpu().view(2, -1)
        total, count = loss_of(self._run, outputs, targets, [1])
        return torch.tensor([[float(total)], [float(count)]], dtype=torch.float64)

    def checked(self, scores: dict[str, float | None]) -> dict[str, Tensor]:
        """Those of the kinds whose samples, added up, have the score that was found for the whole test set."""
        found = {}
        for kind, pairs in self._pairs.items():
            score = scores.get(kind)
            if score is not None and len(pairs) == len(self._run.data.test):
                stacked = torch.stack([pairs[index] for index in range(len(pairs))])
                total, count = stacked.sum(0)
                if math.isclose(Sum(total, count).mean(), score, rel_tol=1e-6, abs_tol=1e-9):
                    found[kind] = stacked
        return found


def _find(folder: Path) -> tuple[RunConfig, Path]:
    weights = folder / "model.safetensors"
    if not weights.is_file() and (checkpoint := whole_checkpoint(folder / "checkpoint")) is not None:
        weights = checkpoint / "model.safetensors"
    if not weights.is_file() or not (folder / "config.yaml").is_file():
        expected = "the folder of a run, with config.yaml and model.safetensors or a checkpoint"
        raise ConfigError("checkpoint", folder, expected)
    status = "ok"
    with suppress(ConfigError):  # unfinished, or damaged: the weights are what counts
        status = RunResult.from_json(folder / "result.json").status
    require(status == "ok", "checkpoint", folder, "a run that did not diverge")
    return load_config(folder / "config.yaml"), weights


def _by_size(run: Run, own: int, samples: int, sizes: Sequence[int] | None) -> dict[int, list[LayerDivergence]]:
    """The layers' divergences at the run's own size and at the others, ordered as in training."""
    powers = [2**k for k in range(run.config.global_batch_size.bit_length())]
    layers = {}
    for size in sorted(size for size in {*(sizes or powers), own} if size <= samples):
        try:
            layers[size] = _divergences(run, size, samples, run.config.data.class_skew)
        except LocalError as error:
            # One value per channel has no variance, as in a network that ends in 1x1 maps.
            if not isinstance(error.__cause__, BatchError):
                raise
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
