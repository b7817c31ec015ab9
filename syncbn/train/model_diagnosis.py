"""A diagnosis of any model on any batches, whoever trained it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.layers import BatchError, BatchRenorm, SampleGroups, SmallBatchNorm
from syncbn.population import Population, batch_statistics, restored
from syncbn.train.batches import described
from syncbn.train.config import ConfigError, require
from syncbn.train.diagnosis import Diagnosis
from syncbn.train.result import Metric
from syncbn.trees import leaves, tree_map

Forward = Callable[[nn.Module, Any], Any]
Evaluate = Callable[[nn.Module], "float | Tensor"]

_BATCHES_OF_A_SIZE = 8
"""The default sizes leave at least so many normalization batches to compare."""
_WHOLE_BATCH = SampleGroups(index=None, number=1)


def diagnose_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    trained_at: int | None = None,
    sizes: Sequence[int] | None = None,
    samples: int = 1024,
    forward: Forward | None = None,
    evaluate: Evaluate | None = None,
    metric: Metric | None = None,
) -> Diagnosis:
    """Measure how any trained model depends on its normalization batch, in this process.

    The samples are cut anew into normalization batches of each size, and the model is run on each batch with the
    statistics of that batch. It is left as it was: weights, buffers, modes and hooks.

    Args:
        model: a model with torch's BatchNorm or this package's layers, in any mode.
        batches: training data in the order of training, such as a DataLoader: inputs of the model, each a tensor or a
            tuple of arguments; or, with ``forward``, tensors or dictionaries, lists and tuples of tensors. Samples are
            in dimension 0.
        trained_at: samples that shared one mean in training, if that is known.
        sizes: normalization batch sizes to try besides ``trained_at``; by default powers of two.
        samples: samples to use; at most all of them.
        forward: ``forward(model, batch)`` runs the model, for batches that also hold targets.
        evaluate: ``evaluate(model)`` returns the score on a test set, as a number or as a tensor (n,) with the score of
            each test sample, whose mean is taken. Only the latter tells whether a difference is noise. It is called
            with running, batch and population statistics; batch statistics are those of the batches that it makes.
        metric: name and direction of that score.

    Returns:
        The measurements, as of :func:`diagnose`: ``advice`` says what they mean, and ``print()`` shows all.

    Raises:
        ConfigError: the model has no batch normalization with running statistics, there are too few samples, a size
            cannot be measured, or ``evaluate`` returns something else.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from syncbn.train import diagnose_model
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
        >>> found = diagnose_model(model, x.split(32), trained_at=4)
        >>> sorted(found.layers), found.layers[4][0].layer
        ([2, 4, 8, 16, 32], '1')
    """
    _check(model, samples, evaluate, metric)
    data = _gathered(batches, samples, pairs=forward is not None)
    samples = min(samples, len(leaves(data)[0]))
    chosen = _sizes(samples, sizes, trained_at)
    with _left_as_it_was(model):
        probe = _Probe(model, data, samples, forward or _called)
        found, population = _of_layers(probe, chosen, trained_at, required={*(sizes or ()), trained_at})
        if evaluate is None or metric is None:
            return found
        return replace(found, metric=metric, **_Scores(model, evaluate, metric).of(population, found))


def _check(model: nn.Module, samples: int, evaluate: Evaluate | None, metric: Metric | None) -> None:
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    require(alone, "model", type(model).__name__, "one process: call it without a process group")
    both = (evaluate is None) == (metric is None)
    require(both, "metric", metric, "a syncbn.train.Metric if there is `evaluate`, else None")
    normalized = "a model with batch normalization that keeps running statistics"
    require(bool(Population(model).layers), "model", type(model).__name__, normalized)
    require(samples >= 2, "samples", samples, "an integer of at least 2")


def _of_layers(
    probe: _Probe, sizes: list[int], trained_at: int | None, required: set[int | None]
) -> tuple[Diagnosis, Population]:
    """The diagnosis without scores, and the population at the size that the model was trained at."""
    populations = _by_size(probe, sizes, required)
    own = max(populations) if trained_at is None else trained_at
    shuffled = torch.randperm(probe.samples, generator=torch.Generator().manual_seed(0))
    found = Diagnosis(
        title=type(probe.model).__name__,
        trained_at=trained_at,
        samples=probe.samples,
        layers={size: population.divergences() for size, population in populations.items()},
        shuffled=probe.population(own, shuffled).divergences(),
        uses=_uses(populations[own], probe.samples // own),
    )
    return found, populations[own]


# ---- the samples


def _gathered(batches: Iterable[Any], samples: int, pairs: bool) -> Any:
    """The first ``samples`` samples, as one batch."""
    kept, number = [], 0
    for batch in batches:
        lengths = {len(x) if x.ndim else 0 for x in leaves(batch)}
        if len(lengths) != 1:
            raise ConfigError("batches", sorted(lengths), "tensors that all have the samples in dimension 0")
        inputs = pairs or isinstance(batch, Tensor | tuple)
        expected = "tensors or tuples of arguments; or give `forward`, such as lambda model, batch: model(batch[0])"
        require(inputs, "batches", type(batch).__name__, expected)
        kept.append(batch)
        number += lengths.pop()
        if number >= samples:
            break
    require(number >= 2, "batches", f"{number} samples", "at least 2 samples, to compare batches")
    return _joined(kept)


def _joined(trees: list[Any]) -> Any:
    """Trees of tensors of the same structure, concatenated in dimension 0."""
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(trees)
    if isinstance(first, Mapping):
        return {key: _joined([tree[key] for tree in trees]) for key in first}
    if isinstance(first, list | tuple):
        parts = [_joined(list(part)) for part in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def _sizes(samples: int, sizes: Sequence[int] | None, trained_at: int | None) -> list[int]:
    most = max(1, samples // _BATCHES_OF_A_SIZE)
    given = [2**k for k in range(most.bit_length())] if sizes is None else list(sizes)
    for key, values in (("sizes", given), ("trained_at", [] if trained_at is None else [trained_at])):
        for size in values:
            expected = f"from 1 to {samples // 2}, as the divergence is that of several batches of {samples} samples"
            require(1 <= size <= samples // 2, key, size, expected)
    require(bool(given) or trained_at is not None, "sizes", sizes, "at least one size")
    return sorted({*given, *([] if trained_at is None else [trained_at])})


# ---- the layers


def _called(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class _Probe:
    """Runs a model on normalization batches that are cut from the same samples."""

    def __init__(self, model: nn.Module, data: Any, samples: int, forward: Forward) -> None:
        self.model, self._data, self.samples, self._forward = model, data, samples, forward
        self._device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def population(self, size: int, order: Tensor | None = None) -> Population:
        """The population and the divergence from it of whole batches of ``size``, taken in ``order``.

        One forward pass is one normalization batch, so the rows of a layer need not be samples.
        """
        population = Population(self.model)
        with population.observing(), torch.no_grad():
            for start in range(0, self.samples // size * size, size):
                index = slice(start, start + size) if order is None else order[start : start + size]
                self._forward(self.model, self._part(index))
        return population

    def _part(self, index: slice | Tensor) -> Any:
        return tree_map(lambda x: x[index].to(self._device), self._data)


def _by_size(probe: _Probe, sizes: list[int], required: set[int | None]) -> dict[int, Population]:
    """The population for each size. Default sizes at which a layer has one value per channel are left out."""
    found, refused = {}, None
    for size in sizes:
        try:
            found[size] = probe.population(size)
        except BatchError as error:
            refused = ConfigError("sizes", size, f"a batch that every layer can normalize ({error})")
            if size in required:
                raise refused from error
    if not found:
        assert refused is not None, "each size was found or refused"
        raise refused
    return found


def _uses(population: Population, passes: int) -> dict[str, int]:
    """The layers that are applied several times in each forward pass, and how often."""
    uses = {name: round(float(sums.counts[1]) / passes) for name, sums in population.statistics().items()}
    return {name: number for name, number in uses.items() if number > 1}


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes and layers. Within, a layer takes a batch for one group, and errors have its name."""
    with ExitStack() as stack:
        stack.enter_context(restored(model.buffers()))
        for name, module in model.named_modules():
            stack.callback(setattr, module, "training", module.training)
            if isinstance(module, SmallBatchNorm):
                for attribute, value in (("sample_groups", _WHOLE_BATCH), ("qualified_name", name or None)):
                    stack.callback(setattr, module, attribute, getattr(module, attribute))
                    setattr(module, attribute, value)
        yield


# ---- the scores


class _Scores:
    """A user's evaluation of a model with each kind of statistics."""

    def __init__(self, model: nn.Module, evaluate: Evaluate, metric: Metric) -> None:
        self._model, self._evaluate, self._metric = model, evaluate, metric
        self._entries: list[dict[str, Any]] = []
        self._per_sample: dict[str, Tensor] = {}

    def of(self, population: Population, found: Diagnosis) -> dict[str, Any]:
        """The fields of a :class:`Diagnosis` about scores; ``population`` is that of the trained or largest size."""
        size = found.trained_at or max(found.layers)
        samples = found.samples // size * size
        self._add("running", None, None)
        largest = None
        # BatchRenorm pulls batch statistics to the running ones, so they would give the first score again.
        if not any(isinstance(layer, BatchRenorm) for layer in population.layers.values()):
            with batch_statistics(self._model), _whatever_the_mode(population) as seen:
                self._add("batch", None, None)
            largest = max(seen, default=None)
        for estimator in ("mean", "total"):
            with population.used(estimator):
                self._add("population", estimator, samples)
        numbers = {len(pairs) for pairs in self._per_sample.values()}
        return {
            "evaluations": self._entries,
            "per_sample": self._per_sample,
            "test_samples": numbers.pop() if len(numbers) == 1 else None,
            "evaluated_at": largest,
        }

    def _add(self, statistics: str, estimator: str | None, samples: int | None) -> None:
        if statistics != "batch":
            self._model.eval()
        value: float | None = None
        try:
            with torch.no_grad():
                value = self._score(estimator or statistics, self._evaluate(self._model))
        except BatchError:
            if statistics != "batch":
                raise
        test = None if value is None else {self._metric.name: value}
        entry = {"statistics": statistics, "estimator": estimator, "samples": samples, "test": test}
        self._entries.append(entry)

    def _score(self, kind: str, found: Any) -> float:
        if isinstance(found, Tensor) and found.ndim == 1 and len(found) > 1:
            values = found.detach().cpu().double()
            self._per_sample[kind] = torch.stack((values, torch.ones_like(values)), 1).unsqueeze(2)
            found = values.mean()
        expected = "a function that returns a number, or a tensor (n,) with a score for each test sample"
        number = isinstance(found, int | float) or (isinstance(found, Tensor) and found.numel() == 1)
        shown = described(found) if isinstance(found, Tensor) else found
        require(number and not math.isnan(float(found)), "evaluate", shown, expected)
        return float(found)


@contextmanager
def _whatever_the_mode(population: Population) -> Iterator[set[int]]:
    """Keep the layers in training mode, even if an evaluation calls ``model.eval()``; yields the sizes of batches."""
    seen: set[int] = set()

    def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer.training = True
        seen.add(len(inputs[0]))

    with ExitStack() as stack:
        for layer in population.layers.values():
            # Before the hook that observes, which looks at the mode.
            stack.callback(layer.register_forward_pre_hook(before, prepend=True).remove)
        yield seen
