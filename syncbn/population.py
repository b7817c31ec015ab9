"""Population statistics: the mean and variance of a layer's input over many samples, with frozen weights.

Running statistics average over the last steps of training, in which the weights moved. Population statistics are
recomputed after training ("precise BN"; Wu and Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section
3). If they change the test error, the running statistics were a bad estimate. How far the statistics of one batch are
from those of the population measures the noise in training (:class:`LayerDivergence`).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import resolve
from syncbn.domain_statistics import holders
from syncbn.functional.running import unbiased
from syncbn.functional.statistics import WIRE_DTYPE, group_sums, moments
from syncbn.layers import BatchError, BatchRenorm, SmallBatchNorm

Estimator = Literal["mean", "total"]
"""How the variance of the population is estimated. ``total`` is the variance of all samples together, within plus
between batches, as in fvcore and detectron2. ``mean`` is the mean of the batches' unbiased variances, weighted by count
(Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 2). Both have the same mean."""

Where = Callable[[str, nn.Module], bool]
Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with count (G, 1), mean (G, C) and biased variance (G, C), float64, a row for each normalization batch."""


class RunningStatistics:
    """The running means and variances of a model's layers, to be averaged over all ranks in one collective.

    A moving average is linear in its inputs, so the mean of the ranks' averages is the average of the ranks' means.
    Therefore it is enough to average before an evaluation or a checkpoint: the result is the same as after averaging in
    every step.
    """

    def __init__(self, model: nn.Module, kind: type[SmallBatchNorm] = SmallBatchNorm) -> None:
        layers = [m for m in model.modules() if isinstance(m, kind)]
        held = [holder for layer in layers for _, holder in holders(layer)]
        self._buffers = [b for m in held for b in (m.running_mean, m.running_var) if b is not None]
        self._pending: tuple[Tensor, Any] | None = None

    def start(self) -> None:
        """Begin the reduction, which runs in the background."""
        assert self._pending is None, "a reduction is under way"
        if self._buffers and _world_size() > 1:
            # In float64 the average of equal values is that value, and float32 averages are rounded once.
            flat = torch.cat([b.detach().to(torch.float64) for b in self._buffers])
            self._pending = flat, dist.all_reduce(flat, async_op=True)

    def finish(self) -> None:
        """Wait for the reduction, if there is one, and write the averages."""
        if self._pending is not None:
            flat, work = self._pending
            work.wait()
            _write(flat / dist.get_world_size(), self._buffers)
            self._pending = None


def reconcile(model: nn.Module) -> None:
    """Replace the running statistics of this package's layers by their mean over all ranks, in one collective.

    Call it on every rank before evaluating or saving a model whose layers are not synchronized, such as
    :class:`~syncbn.GhostBatchNorm`. Every rank must have the same layers. ``num_batches_tracked`` stays as it is. The
    statistics of all domains (:func:`syncbn.domains`) are replaced. Without an initialized process group nothing
    changes.

    Args:
        model: a model with layers of this package. Torch's own batch normalizations are left alone.

    Example:
        >>> import syncbn
        >>> model = nn.Sequential(nn.Linear(4, 8), syncbn.GhostBatchNorm(8, ghost_batch_size=2))
        >>> loss = model(torch.randn(6, 4)).sum()  # each rank trains on its own data
        >>> reconcile(model)  # then all ranks have the same running statistics
    """
    statistics = RunningStatistics(model)
    statistics.start()
    statistics.finish()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def _write(flat: Tensor, tensors: list[Tensor]) -> None:
    """Write the consecutive values of ``flat`` into the tensors."""
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


@dataclass(frozen=True)
class LayerDivergence:
    """How far the batch statistics of a layer are from its population's: KL(N(mean_B, var_B) || N(mean, var)).

    For batches of m independent Gaussian values the mean divergence is :func:`gaussian_divergence`, about 1/m. The
    pixels of an image are correlated, so a batch of N images of H x W pixels diverges like far fewer than N*H*W values.
    """

    layer: str
    """Qualified name within the model."""
    count: float
    """Values per channel in one normalization batch (samples times pixels), mean over the batches."""
    kl: float | None
    """Mean over batches and live channels. None if no channel is live."""
    effective: float | None
    """The effective batch size: the number of independent Gaussian values whose mean divergence is ``kl``."""
    running_kl: float | None
    """The divergence of N(running_mean, running_var) from the population."""
    channels: int
    dead: int
    """Number of channels whose population variance is below ``eps``. The means leave them out."""


class LayerStatistics:
    """Sums over the normalization batches of one layer, float64. They add over batches and over processes."""

    def __init__(self, num_features: int, eps: float, device: torch.device) -> None:
        self.eps = eps
        # Rows: count * mean, count * (var + mean^2), count * unbiased var; and unweighted: mean, mean^2, var, ln(var).
        self.sums = torch.zeros(7, num_features, dtype=WIRE_DTYPE, device=device)
        self.counts = torch.zeros(2, dtype=WIRE_DTYPE, device=device)  # values per channel, batches

    def add(self, count: Tensor, mean: Tensor, var: Tensor, weight: float = 1.0) -> None:
        """Add batches: count (G, 1), mean and biased var (G, C).

        If several ranks add the same batch, ``weight`` is 1 / their number. Batches whose statistics are not finite are
        left out, as they are left out of running statistics.
        """
        finite = (mean.isfinite() & var.isfinite()).all(1, keepdim=True)
        count, mean, var = (torch.where(finite, value, 0.0) for value in (count, mean, var))
        filled = (count > 0).to(WIRE_DTYPE) * weight
        square = mean.square()
        weighted = (mean, var + square, unbiased(var, count))
        plain = (mean, square, var, torch.log(var + self.eps))
        rows = [(value * count * weight).sum(0) for value in weighted] + [(value * filled).sum(0) for value in plain]
        self.sums.add_(torch.stack(rows))
        self.counts.add_(torch.stack((count.sum() * weight, filled.sum())))

    @property
    def count(self) -> Tensor:
        """() float64: values per channel in all batches."""
        return self.counts[0]

    @property
    def mean(self) -> Tensor:
        """(C,) float64: mean of all values."""
        return self.sums[0] / self.count.clamp(min=1)

    def var(self, estimator: Estimator = "total", *, biased: bool = False) -> Tensor:
        """(C,) float64: variance of the population, unbiased like running variances."""
        if estimator == "mean":
            return self.sums[2] / self.count.clamp(min=1)
        var = (self.sums[1] / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)
        return var if biased else unbiased(var, self.count)

    def divergence(self, layer: str, running: tuple[Tensor, Tensor]) -> LayerDivergence:
        """The divergence of the batches added, and of ``running`` (mean and variance), from the population."""
        batches = self.counts[1].clamp(min=1)
        mean, mean_square, var, log_var = (row / batches for row in self.sums[3:])
        sigma2 = self.var(biased=True)
        live = sigma2 > self.eps
        shift = (mean_square - 2 * self.mean * mean + self.mean.square()).clamp(min=0)
        kl = _divergence(shift, var + self.eps, log_var, sigma2 + self.eps, live)
        running_mean, running_var = (value.to(WIRE_DTYPE) for value in running)
        shift, running_var = (running_mean - self.mean).square(), running_var + self.eps
        return LayerDivergence(
            layer=layer,
            count=float(self.count / batches),
            kl=kl,
            effective=None if kl is None else effective_count(kl),
            running_kl=_divergence(shift, running_var, running_var.log(), sigma2 + self.eps, live),
            channels=len(sigma2),
            dead=int((~live).sum()),
        )


def _divergence(shift: Tensor, var: Tensor, log_var: Tensor, population: Tensor, live: Tensor) -> float | None:
    """Mean over live channels of the KL of two Gaussians. ``shift`` is the squared distance of their means."""
    kl = 0.5 * ((var + shift) / population - 1 - log_var + population.log())
    return float(kl[live].mean()) if bool(live.any()) else None


def gaussian_divergence(m: float) -> float:
    """Mean of KL(N(mean_B, var_B) || N(mean, var)) over batches of ``m`` > 1 independent Gaussian values.

    var_B is biased. With E[var_B] = (m-1)/m, E[(mean_B - mean)^2] = 1/m and E[ln var_B] = digamma((m-1)/2) + ln(2/m)
    (m var_B is chi-squared with m-1 degrees of freedom) it is 1/(2m) - (1/m + digamma((m-1)/2) + ln(2/m))/2. This is
    0.142 at m = 8 and close to 1/m for larger m.
    """
    digamma = float(torch.special.digamma(torch.tensor((m - 1) / 2, dtype=torch.float64)))
    return 1 / (2 * m) - (1 / m + digamma + math.log(2 / m)) / 2


def effective_count(kl: float) -> float | None:
    """The m at which :func:`gaussian_divergence` is ``kl``. None above 10^9."""
    low, high = math.log(1 + 1e-6), math.log(1e9)
    if not kl > gaussian_divergence(math.exp(high)):
        return None
    for _ in range(80):  # bisection on the logarithm; the divergence falls with m
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_divergence(math.exp(middle)) > kl else (low, middle)
    return math.exp((low + high) / 2)


def _layers(model: nn.Module, where: Where | None = None) -> dict[str, _BatchNorm]:
    """The batch-normalization layers that keep running statistics and are not frozen, by qualified name."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    norms = {name: m for name, m in norms.items() if not _is_frozen(m)}
    return {name: layer for name, layer in norms.items() if where is None or where(name, layer)}


def _is_frozen(layer: nn.Module) -> bool:
    return isinstance(layer, SmallBatchNorm) and layer.frozen_state is not None


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The running statistics that the layer uses now: those of a domain within :func:`syncbn.domain`."""
    held: Any = layer.holder() if isinstance(layer, SmallBatchNorm) else layer
    return held.running_mean, held.running_var


@contextmanager
def batch_statistics(
    model: nn.Module,
    observe: Callable[[str], Observer] | None = None,
    layers: Mapping[str, _BatchNorm] | None = None,
) -> Iterator[None]:
    """Within this context the model is in evaluation mode, but ``layers`` (default: all) normalize by batch statistics.

    They use the same groups of samples and processes as in training. Their running statistics do not change, and the
    mode of each module is restored at the end. ``observe`` is called once with the name of each layer; the function
    that it returns gets the statistics of each batch.
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            if _is_frozen(module):
                stack.callback(setattr, module, "frozen_state", module.frozen_state)
        model.eval()
        for name, layer in (_layers(model) if layers is None else layers).items():
            observer: Any = observe(name) if observe is not None else lambda *statistics: None
            layer.training = True
            if isinstance(layer, SmallBatchNorm):
                stack.callback(setattr, layer, "observer", layer.observer)
                layer.observer = lambda _, *statistics, observer=observer: observer(*statistics)
            else:  # torch's own layers have no observer and update their buffers
                stack.enter_context(restored(layer.buffers(recurse=False)))
                hook = partial(_observe_input, name, observer)
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        # Compiled code does not call hooks that were added later. If the compiler is not loaded, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """The tensors have their present values again when this context ends."""
    kept = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)


def _observe_input(name: str, observer: Observer, layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0].detach()
    if layer.training and x.numel() == layer.num_features:  # torch's own error does not name the layer
        shown = f"{type(layer).__name__} '{name}' (num_features={layer.num_features}), input of shape {tuple(x.shape)}"
        raise BatchError(f"{shown}: one value per channel has no variance; use a larger batch")
    observer(*moments(group_sums(x)))


class Population:
    """The population statistics of a model's layers, collected batch by batch.

    Run the model without gradients in ``with population.observing():``, then call :meth:`statistics`,
    :meth:`divergences` or :meth:`used`. Under several processes each rank runs its own share of every batch, and all
    ranks call each method.
    """

    def __init__(self, model: nn.Module, where: Where | None = None) -> None:
        self.model = model
        self.layers = _layers(model, where)
        self._sums = {
            name: LayerStatistics(layer.num_features, layer.eps, _running(layer)[0].device)
            for name, layer in self.layers.items()
        }

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Add the batches on which the model is run in this context."""
        with batch_statistics(self.model, self._observer, self.layers):
            yield

    def _observer(self, name: str) -> Observer:
        scope = getattr(self.layers[name], "scope", None)
        group = None if scope is None else resolve(scope)
        weight = 1.0 if group is None else 1 / dist.get_world_size(group)  # each of its ranks adds the same batch
        return partial(self._sums[name].add, weight=weight)

    def statistics(self) -> dict[str, LayerStatistics]:
        """The sums of each layer over all processes, in one collective. More batches may be added afterwards."""
        found = copy.deepcopy(self._sums)
        if found and _world_size() > 1:
            tensors = [tensor for layer in found.values() for tensor in (layer.sums, layer.counts)]
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            _write(flat, tensors)
        return found

    def divergences(self) -> list[LayerDivergence]:
        """How far the batches and the running statistics are from the population, in the order of the model."""
        return [sums.divergence(name, _running(self.layers[name])) for name, sums in self.statistics().items()]

    @torch.no_grad()
    def write(self, estimator: Estimator = "total") -> None:
        """Replace the running statistics by the population statistics."""
        for name, sums in self.statistics().items():
            if float(sums.count) > 0:  # evaluation does not use every layer, such as those of an auxiliary classifier
                mean, var = _running(self.layers[name])
                mean.copy_(sums.mean)
                var.copy_(sums.var(estimator))

    @contextmanager
    def used(self, estimator: Estimator = "total") -> Iterator[None]:
        """Replace the running statistics by the population statistics within this context."""
        with restored(buffer for layer in self.layers.values() for buffer in _running(layer)):
            self.write(estimator)
            yield


@contextmanager
def _uncorrected(model: nn.Module) -> Iterator[None]:
    """Within this context :class:`~syncbn.BatchRenorm` is plain batch normalization.

    Its corrections are towards the running statistics that are to be replaced. Those may be of other weights, and what
    they correct is the input of the next layer.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchRenorm)]
    for layer in layers:
        layer.corrects = False
    try:
        yield
    finally:
        for layer in layers:
            del layer.corrects


def _run_on_first(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, list | tuple) else batch
    parameter = next(model.parameters(), None)
    if parameter is not None and isinstance(x, Tensor):
        x = x.to(parameter.device)
    model(x)


@torch.no_grad()
def update_population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "total",
    where: Where | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, LayerStatistics]:
    """Replace the running statistics of a trained model by population statistics ("precise BN").

    The source is Wu and Johnson 2021, arXiv 2105.07576, section 3. The model's weights and training mode stay as they
    are, and so do frozen layers (:func:`syncbn.freeze`). The running statistics that are replaced have no influence, so
    that they may be those of other weights: :class:`~syncbn.BatchRenorm` normalizes without corrections. Within
    :func:`syncbn.domain` the statistics of the domain are replaced. Under several processes each rank gives its own
    share of the batches. If layers are synchronized, all ranks must give the same number of batches.

    Args:
        model: a model with layers of this package or torch's batch normalizations.
        batches: batches of inputs, such as a DataLoader of at least a thousand samples. Batches may have different
            sizes. As in ``torch.optim.swa_utils.update_bn``, the input is the first element if a batch is a list or a
            tuple, and comes to the device of the model.
        estimator: ``"total"`` or ``"mean"``, how the variance is estimated; see :data:`Estimator`.
        where: recompute only the layers for which ``where(qualified_name, layer)`` is true. The other layers normalize
            by their running statistics. None is all layers.
        forward: called with the model and a batch, where ``model(input)`` is not how the model is run.

    Returns:
        The statistics of each layer over all processes, by qualified name.

    Raises:
        ValueError: there is no batch with finite values, the model has no batch normalization with running statistics
            that is not frozen, or ``estimator`` is not known.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        >>> found = update_population_statistics(model, [torch.randn(64, 4) for _ in range(16)])
        >>> int(found["1"].count)
        1024
    """
    if estimator not in ("mean", "total"):
        raise ValueError(f"estimator must be 'mean' or 'total', got {estimator!r}")
    population = Population(model, where)
    if not population.layers:
        if any(map(_is_frozen, model.modules())):
            raise ValueError("the model has only frozen batch normalizations; call syncbn.unfreeze(model) first")
        raise ValueError("the model has no batch normalization with running statistics, so none can be recomputed")
    run = forward or _run_on_first
    with _uncorrected(model), population.observing():
        for batch in batches:
            run(model, batch)
    found = population.statistics()
    if all(float(sums.count) == 0 for sums in found.values()):
        raise ValueError("batches: got none with finite values, expected at least one non-empty batch")
    population.write(estimator)
    return found
