"""Population statistics: what the normalization statistics are over many samples, with the weights as they are.

Running statistics are an average over a training's last steps, in which the weights moved; population statistics are
recomputed afterwards over n samples ("precise BN"; Wu and Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv
2105.07576, section 3). The difference between the two is an error of estimation, not of training. How far the
statistics of a single batch are from the population's says how noisy the training was: :class:`LayerDivergence`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import resolve
from syncbn.functional.running import unbiased
from syncbn.functional.statistics import WIRE_DTYPE, group_sums, moments
from syncbn.layers import SmallBatchNorm

Estimator = Literal["mean", "total"]
"""How the population's variance is estimated: ``total``, the variance of all samples together (within plus between
batches; fvcore's and detectron2's precise BN), or ``mean``, the count-weighted mean of the batches' unbiased variances
(Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 2). The mean is the same."""

Where = Callable[[str, nn.Module], bool]
Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with a count (G, 1), mean (G, C) and biased variance (G, C), float64, a row for each normalization batch."""


@dataclass(frozen=True)
class LayerDivergence:
    """How far a layer's batch statistics are from its population's: KL(N(mean_B, var_B) || N(mean, var)).

    Over i.i.d. batches of m Gaussian values the mean divergence is :func:`gaussian_divergence`, close to 1/m. Values of
    an image are correlated, so a batch of N images of H x W pixels is worth far fewer than N*H*W.
    """

    layer: str
    """Qualified name within the model."""
    count: float
    """Values a channel in one normalization batch (samples times pixels), averaged over the batches."""
    kl: float | None
    """Mean over batches and live channels; None without a live channel."""
    effective: float | None
    """The number of i.i.d. Gaussian values whose mean divergence is ``kl``: the effective size of the batch."""
    running_kl: float | None
    """The same divergence of the running statistics, N(running_mean, running_var), from the population's."""
    channels: int
    dead: int
    """Channels whose population variance is below ``eps``; they have no part in the means."""


class LayerStatistics:
    """Sums over the normalization batches of one layer, from which its population statistics follow.

    All sums are float64 and additive: over batches, and over processes (:meth:`reduce`).
    """

    def __init__(self, num_features: int, eps: float, device: torch.device) -> None:
        self.eps = eps
        # Rows: count * mean, count * (var + mean^2), count * unbiased var; and unweighted: mean, mean^2, var, ln(var).
        self._sums = torch.zeros(7, num_features, dtype=WIRE_DTYPE, device=device)
        self._counts = torch.zeros(2, dtype=WIRE_DTYPE, device=device)  # values a channel, batches

    def add(self, count: Tensor, mean: Tensor, var: Tensor, weight: float = 1.0) -> None:
        """Add batches: count (G, 1), mean and biased var (G, C); ``weight`` is 1 / (ranks that add the same batch).

        A batch with a statistic that is not finite is left out, as it is kept out of running statistics.
        """
        finite = (mean.isfinite() & var.isfinite()).all(1, keepdim=True)
        count, mean, var = (torch.where(finite, value, 0.0) for value in (count, mean, var))
        filled = (count > 0).to(WIRE_DTYPE) * weight
        square = mean.square()
        weighted = (mean, var + square, unbiased(var, count))
        plain = (mean, square, var, torch.log(var + self.eps))
        rows = [(value * count * weight).sum(0) for value in weighted] + [(value * filled).sum(0) for value in plain]
        self._sums += torch.stack(rows)
        self._counts += torch.stack((count.sum() * weight, filled.sum()))

    @property
    def packed(self) -> Tensor:
        """All sums as one vector, to be reduced over processes; setting it writes them back."""
        return torch.cat((self._sums.flatten(), self._counts))

    @packed.setter
    def packed(self, values: Tensor) -> None:
        self._sums = values[:-2].reshape_as(self._sums)
        self._counts = values[-2:]

    @property
    def count(self) -> Tensor:
        """() float64: values a channel, over all batches."""
        return self._counts[0]

    @property
    def mean(self) -> Tensor:
        """(C,) float64: mean over all values."""
        return self._sums[0] / self.count.clamp(min=1)

    def var(self, estimator: Estimator = "total", *, biased: bool = False) -> Tensor:
        """(C,) float64: the population's variance, unbiased, as running variances are."""
        if estimator == "mean":
            return self._sums[2] / self.count.clamp(min=1)
        var = (self._sums[1] / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)
        return var if biased else unbiased(var, self.count)

    def divergence(self, layer: str, running: tuple[Tensor, Tensor] | None) -> LayerDivergence:
        """The divergence of the batches added, and of ``running`` (mean and variance), from the population."""
        batches = self._counts[1].clamp(min=1)
        mean, mean_square, var, log_var = (row / batches for row in self._sums[3:])
        sigma2 = self.var(biased=True)
        live = sigma2 > self.eps
        shift = (mean_square - 2 * self.mean * mean + self.mean.square()).clamp(min=0)
        kl = _mean_of(_divergence(shift, var + self.eps, log_var, sigma2 + self.eps), live)
        drift = None
        if running is not None:
            running_mean, running_var = (value.to(WIRE_DTYPE) for value in running)
            wide = running_var + self.eps
            each = _divergence((running_mean - self.mean).square(), wide, wide.log(), sigma2 + self.eps)
            drift = _mean_of(each, live)
        return LayerDivergence(
            layer=layer,
            count=float(self.count / batches),
            kl=kl,
            effective=None if kl is None else effective_count(kl),
            running_kl=drift,
            channels=len(sigma2),
            dead=int((~live).sum()),
        )


def _divergence(shift: Tensor, var: Tensor, log_var: Tensor, population: Tensor) -> Tensor:
    """KL of two Gaussians from the squared distance of their means, their variances and the first one's logarithm."""
    return 0.5 * ((var + shift) / population - 1 - log_var + population.log())


def _mean_of(values: Tensor, where: Tensor) -> float | None:
    return float(values[where].mean()) if bool(where.any()) else None


def gaussian_divergence(m: float) -> float:
    """Mean of KL(N(mean_B, var_B) || N(mean, var)) over batches of ``m`` > 1 i.i.d. Gaussian values; var_B is biased.

    1/(2m) - (1/m + digamma((m-1)/2) + ln(2/m))/2: E[var_B] = (m-1)/m, E[(mean_B - mean)^2] = 1/m and E[ln var_B] =
    digamma((m-1)/2) + ln(2/m), as m var_B is chi-squared with m-1 degrees of freedom. 0.142 at m = 8, near 1/m beyond.
    """
    digamma = float(torch.special.digamma(torch.tensor((m - 1) / 2, dtype=torch.float64)))
    return 1 / (2 * m) - (1 / m + digamma + math.log(2 / m)) / 2


def effective_count(kl: float) -> float | None:
    """The m at which :func:`gaussian_divergence` is ``kl``; None above 10^9 (no divergence to speak of)."""
    low, high = math.log(1 + 1e-6), math.log(1e9)
    if not kl > gaussian_divergence(math.exp(high)):
        return None
    for _ in range(80):  # bisection on the logarithm; the divergence falls with m
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_divergence(math.exp(middle)) > kl else (low, middle)
    return math.exp((low + high) / 2)


# ---- over a model


def normalization_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalizations of a model that keep running statistics, by qualified name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@contextmanager
def batch_statistics(
    model: nn.Module,
    observe: Callable[[str], Observer] | None = None,
    layers: Mapping[str, _BatchNorm] | None = None,
) -> Iterator[None]:
    """Let a model normalize by batch statistics, and leave everything as it was afterwards.

    Within the context the model is in evaluation mode (dropout off), but its batch normalizations normalize as in
    training, over the same groups and processes. Their running statistics do not move.

    Args:
        model: a model with this package's layers or torch's.
        observe: called once with each layer's name for the function that its batches' statistics are given to.
        layers: those that are to do so, by name; None is all.
    """
    layers = normalization_layers(model) if layers is None else layers
    modes = {module: module.training for module in model.modules()}
    hooks: list[Any] = []
    observers: list[tuple[SmallBatchNorm, Any]] = []
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        model.eval()
        for name, layer in layers.items():
            observer = _ignore if observe is None else observe(name)
            layer.training = True
            if isinstance(layer, SmallBatchNorm):
                observers.append((layer, layer.observer))
                layer.observer = lambda _, count, mean, var, observer=observer: observer(count, mean, var)
            else:  # torch's own layers show nothing and update their buffers, which are put back
                kept += [(buffer, buffer.clone()) for buffer in layer.buffers(recurse=False)]
                hooks.append(layer.register_forward_pre_hook(_show_input(observer)))
        with _eager():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for small, before in observers:
            small.observer = before
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled code knows nothing of hooks that were added later. Nothing is compiled before the compiler is loaded."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _ignore(count: Tensor, mean: Tensor, var: Tensor) -> None:
    pass


def _show_input(observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observer(*moments(group_sums(inputs[0].detach())))

    return hook


class Population:
    """The population statistics of a model's layers, gathered batch by batch.

    Usage: under ``with population.observing():`` run the model, without gradients, on as many batches as wanted; then
    :meth:`statistics`, :meth:`divergences` or :meth:`used`. Under several processes each runs its own share of every
    batch, and all ranks call each method.
    """

    def __init__(self, model: nn.Module, where: Where | None = None) -> None:
        self.model = model
        self.layers = {name: m for name, m in normalization_layers(model).items() if where is None or where(name, m)}
        self._sums: dict[str, LayerStatistics] = {}
        for name, layer in self.layers.items():
            assert layer.running_mean is not None
            self._sums[name] = LayerStatistics(layer.num_features, layer.eps, layer.running_mean.device)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Gather the statistics of what the model is run on."""
        with batch_statistics(self.model, self._observer, self.layers):
            yield

    def _observer(self, name: str) -> Observer:
        layer, weight = self.layers[name], 1.0
        if (
            isinstance(layer, SmallBatchNorm)
            and layer.scope is not None
            and (group := resolve(layer.scope)) is not None
        ):
            weight = 1 / dist.get_world_size(group)  # each of its ranks adds the same batch
        return lambda count, mean, var: self._sums[name].add(count, mean, var, weight)

    def statistics(self) -> dict[str, LayerStatistics]:
        """The sums of each layer over all processes. One collective; gathering may go on afterwards."""
        found = {
            name: LayerStatistics(sums._sums.shape[1], sums.eps, sums.count.device) for name, sums in self._sums.items()
        }
        packed = [sums.packed for sums in self._sums.values()]
        if packed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat(packed)
            dist.all_reduce(flat)
            packed = list(flat.split([len(values) for values in packed]))
        for sums, values in zip(found.values(), packed, strict=True):
            sums.packed = values
        return found

    def divergences(self) -> list[LayerDivergence]:
        """How far the batches gathered, and the running statistics, are from the population, in the model's order."""
        found = []
        for name, sums in self.statistics().items():
            layer = self.layers[name]
            running = None
            if layer.running_mean is not None and layer.running_var is not None:
                running = layer.running_mean, layer.running_var
            found.append(sums.divergence(name, running))
        return found

    def write(self, estimator: Estimator = "total") -> None:
        """Put the population statistics in place of the running ones."""
        with torch.no_grad():
            for name, sums in self.statistics().items():
                layer = self.layers[name]
                if float(sums.count) == 0:  # evaluation does not reach it, as an auxiliary classifier
                    continue
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(sums.mean)
                layer.running_var.copy_(sums.var(estimator))

    @contextmanager
    def used(self, estimator: Estimator = "total") -> Iterator[None]:
        """Put the population statistics in place of the running ones for the time of the context."""
        buffers = [
            b for layer in self.layers.values() for b in (layer.running_mean, layer.running_var) if b is not None
        ]
        before = [buffer.clone() for buffer in buffers]
        self.write(estimator)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)


@torch.no_grad()
def update_population_statistics(
    model: nn.Module, batches: Iterable[Any], *, estimator: Estimator = "total", where: Where | None = None
) -> dict[str, LayerStatistics]:
    """Replace a trained model's running statistics by population statistics ("precise BN").

    Args:
        model: a model with this package's layers or torch's batch normalizations; its mode and weights stay.
        batches: inputs of the model, a tensor or a tuple of arguments each, from a thousand samples on (more for the
            last digit); batches may differ in size. Under several processes each gives its own share, and all ranks
            the same number of batches if the model synchronizes.
        estimator: see :data:`Estimator`.
        where: take only the layers for which ``where(qualified_name, layer)`` is true, such as those of a head on a
            backbone whose statistics are to stay; the others normalize by their running statistics. None is all.

    Returns:
        The statistics by layer, over all processes.

    Raises:
        ValueError: there was no batch, or the model has no batch normalization with running statistics.
    """
    population = Population(model, where)
    if not population.layers:
        raise ValueError("the model has no batch normalization with running statistics, so none can be recomputed")
    with population.observing():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    found = population.statistics()
    if all(float(sums.count) == 0 for sums in found.values()):
        raise ValueError("batches: got none with finite values, expected at least one non-empty batch")
    population.write(estimator)
    return found
