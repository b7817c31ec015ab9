"""The contenders: our layers, and other code that computes the same.

A contender is a function from a :class:`~syncbn.bench.problem.Problem` to a :class:`LayerStep`. No step accumulates
gradients: all use ``torch.autograd.grad``. The formulas written out here are those of textbooks and most projects, one
eager operation after another; ``torch.compile`` is given them too. They take no numerical care: E[x^2] - E[x]^2 loses
the variance if the mean is large, and the bench shows that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.bench.problem import D_MAX, EPS, GROUPS, MOMENTUM, R_MAX, Problem
from syncbn.compat import import_torchvision


@dataclass(frozen=True)
class LayerStep:
    """Forward and backward of one layer. A call returns the output and the gradients of ``known``."""

    function: Callable[[Tensor], Tensor]
    known: tuple[Tensor, ...]  # input, weight, bias and, if there is one, the residual
    grad_output: Tensor
    buffers: tuple[Tensor, ...] = ()  # running statistics, which do not count as saved for backward

    def __call__(self) -> Sequence[Tensor]:
        y = self.function(self.known[0])
        return y, *torch.autograd.grad(y, self.known, self.grad_output)


class LayerTensors(NamedTuple):
    """(C,) float32 each; the running statistics are updated in place."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


class UnavailableError(Exception):
    """A peer cannot run here."""


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str  # what it computes, as for :func:`syncbn.bench.correctness.reference`
    make: Callable[[Problem], LayerStep]  # raises UnavailableError if it cannot run here
    ours: bool = False
    compiled: bool = False  # compiles for seconds for each new shape


def _layer_step(
    layer: Any, problem: Problem, function: Callable[..., Tensor] | None = None, with_residual: bool = False
) -> LayerStep:
    """The step of a layer, or of the ``function`` of x and perhaps the residual that calls it."""
    layer = layer.to(problem.device)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(layer, name):
                getattr(layer, name).copy_(getattr(problem, name))
    call = function or layer
    known, buffers = (problem.x.detach().requires_grad_(), layer.weight, layer.bias), tuple(layer.buffers())
    if not with_residual:
        return LayerStep(call, known, problem.grad_output, buffers)
    residual = problem.residual.detach().requires_grad_()
    return LayerStep(lambda x: call(x, residual), (*known, residual), problem.grad_output, buffers)


def _sync(problem: Problem, activation: Any = None, with_residual: bool = False) -> LayerStep:
    layer = syncbn.SyncBatchNorm(problem.num_features, EPS, MOMENTUM, activation=activation)
    return _layer_step(layer, problem, with_residual=with_residual)


def _ghost(problem: Problem, groups: int) -> LayerStep:
    size = problem.shape.size[0] // groups
    return _layer_step(syncbn.GhostBatchNorm(problem.num_features, size, EPS, MOMENTUM), problem)


def _renorm(problem: Problem) -> LayerStep:
    layer = syncbn.BatchRenorm(
        problem.num_features, EPS, MOMENTUM, r_max=R_MAX, d_max=D_MAX, warmup_steps=0, r_ramp_end=0, d_ramp_end=0
    )
    return _layer_step(layer, problem)


def _batchnorm(problem: Problem) -> nn.Module:
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return layers[problem.x.dim()](problem.num_features, EPS, MOMENTUM)


def _batchnorm_relu(problem: Problem) -> LayerStep:
    layer, relu = _batchnorm(problem), nn.ReLU(inplace=True)
    return _layer_step(layer, problem, lambda x: relu(layer(x)))


def _batchnorm_add_relu(problem: Problem) -> LayerStep:
    """As in torchvision's residual blocks: the addition and ReLU work in place."""
    layer, relu = _batchnorm(problem), nn.ReLU(inplace=True)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        out = layer(x)
        out += residual
        return relu(out)  # type: ignore[no-any-return]

    return _layer_step(layer, problem, block, with_residual=True)


def _torch_sync(problem: Problem) -> LayerStep:
    """The function inside torch's SyncBatchNorm: the module itself uses the local layer if it is alone in its group."""
    if problem.device.type != "cuda":
        raise UnavailableError("torch's SyncBatchNorm needs CUDA")
    if not dist.is_initialized():
        raise UnavailableError("it needs a process group")
    apply = importlib.import_module("torch.nn.modules._functions").SyncBatchNorm.apply
    more = (EPS, MOMENTUM, problem.group or dist.group.WORLD, problem.world_size)
    return _formula_step(lambda x, layer: apply(x, *layer, *more), problem)


def _formula_step(
    formula: Callable[[Tensor, LayerTensors], Tensor], problem: Problem, compiled: bool = False
) -> LayerStep:
    """The step of a function of x and of a layer's tensors."""
    weight, bias = (t.clone().requires_grad_() for t in (problem.weight, problem.bias))
    tensors = LayerTensors(weight, bias, problem.running_mean.clone(), problem.running_var.clone())

    def function(x: Tensor) -> Tensor:
        return formula(x, tensors)

    if compiled:
        # Static shapes compile to the fastest code. Without a reset each call first tries the graphs of earlier shapes.
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return LayerStep(function, (problem.x.detach().requires_grad_(), weight, bias), problem.grad_output)


def _textbook(problem: Problem, reduce: str, compiled: bool = False) -> LayerStep:
    average = _averages(problem, reduce)
    count = problem.world_size * problem.x.numel() // problem.num_features
    return _formula_step(lambda x, layer: _textbook_batch_norm(x, layer, count, average), problem, compiled)


def _averages(problem: Problem, reduce: str) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A differentiable function of two tensors to their averages over the processes.

    ``reduce`` is ``"eager"`` (two eager all-reduces), ``"apart"`` (two that can be compiled) or ``"together"`` (one).
    """
    group, size = problem.group, problem.world_size
    if group is None:
        return lambda mean, square: (mean, square)
    if reduce == "eager":
        eager = importlib.import_module("torch.distributed.nn.functional").all_reduce
        return lambda mean, square: (eager(mean.clone(), group=group) / size, eager(square.clone(), group=group) / size)
    functional = importlib.import_module("torch.distributed._functional_collectives").all_reduce
    if reduce == "apart":
        return lambda mean, square: (functional(mean, "sum", group) / size, functional(square, "sum", group) / size)
    return lambda mean, square: (functional(torch.stack((mean, square)), "sum", group) / size).unbind()


def _textbook_batch_norm(
    x: Tensor, layer: LayerTensors, count: int, average: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> Tensor:
    """Batch normalization of x (N, C, *), of one size on all processes, with ``count`` elements per channel in all.

    ``average`` maps the means (C,) of x and of its square to their averages over the processes.
    """
    dims, view = _dims(x)
    wide = x.float()
    mean, square = average(wide.mean(dims), wide.square().mean(dims))
    var = square - mean.square()
    _update(layer, mean, var, count)
    scale = layer.weight * torch.rsqrt(var + EPS)
    return ((wide - mean.view(view)) * scale.view(view) + layer.bias.view(view)).to(x.dtype)


def _eager_batch_renorm(x: Tensor, layer: LayerTensors) -> Tensor:
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275) of (N, C, *) on one process, after its warm-up."""
    dims, view = _dims(x)
    wide = x.float()
    var, mean = torch.var_mean(wide, dims, correction=0)
    sigma_batch = torch.sqrt(var + EPS)
    with torch.no_grad():
        sigma = torch.sqrt(layer.running_var + EPS)
        r = (sigma_batch / sigma).clamp(1 / R_MAX, R_MAX)
        d = ((mean - layer.running_mean) / sigma).clamp(-D_MAX, D_MAX)
    _update(layer, mean, var, x.numel() // x.shape[1])
    normalized = (wide - mean.view(view)) / sigma_batch.view(view) * r.view(view) + d.view(view)
    return (normalized * layer.weight.view(view) + layer.bias.view(view)).to(x.dtype)


def _dims(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions to reduce over, and the shape in which a tensor (C,) broadcasts over x."""
    return (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))


def _update(layer: LayerTensors, mean: Tensor, var: Tensor, count: int) -> None:
    with torch.no_grad():
        layer.running_mean.lerp_(mean, MOMENTUM)
        layer.running_var.lerp_(var * (count / (count - 1)), MOMENTUM)


def _ghost_loop(problem: Problem) -> LayerStep:
    layer = _batchnorm(problem)
    return _layer_step(layer, problem, lambda x: torch.cat([layer(chunk) for chunk in x.chunk(GROUPS)]))


def _torchrl_renorm(problem: Problem) -> LayerStep:
    if problem.x.dim() != 2:
        raise UnavailableError("torchrl's BatchRenorm1d is for (N, C)")
    try:
        renorm = importlib.import_module("torchrl.modules").BatchRenorm1d
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"torchrl cannot be imported ({error})") from error
    layer = renorm(problem.num_features, momentum=MOMENTUM, eps=EPS, max_r=R_MAX, max_d=D_MAX, warmup_steps=0)
    step = _layer_step(layer, problem)
    if hasattr(layer, "running_std"):  # releases differ in whether they keep the variance or its root
        layer.running_std.copy_(torch.sqrt(problem.running_var + EPS))
    return step


def _timm(problem: Problem) -> LayerStep:
    if problem.x.dim() != 4:
        raise UnavailableError("timm's BatchNormAct2d is for (N, C, H, W)")
    try:
        import_torchvision()  # timm imports it, and would fail on a torchvision whose operators cannot be loaded
        layer = importlib.import_module("timm.layers").BatchNormAct2d(problem.num_features, EPS, MOMENTUM)
    except ImportError as error:
        raise UnavailableError(f"timm cannot be imported ({error})") from error
    return _layer_step(layer, problem)


_ALL = (
    Contender("SyncBatchNorm", "batch", _sync, ours=True),
    Contender("BatchRenorm", "renorm", _renorm, ours=True),
    Contender("GhostBatchNorm", "ghost", lambda p: _ghost(p, GROUPS), ours=True),
    Contender("GhostBatchNorm of 1 group", "batch", lambda p: _ghost(p, 1), ours=True),
    Contender("GhostBatchNorm of 2 groups", "halves", lambda p: _ghost(p, 2), ours=True),
    Contender("SyncBatchNorm + ReLU", "relu", lambda p: _sync(p, "relu"), ours=True),
    Contender("SyncBatchNorm + add + ReLU", "add_relu", lambda p: _sync(p, "relu", with_residual=True), ours=True),
    Contender("nn.BatchNorm", "local", lambda p: _layer_step(_batchnorm(p), p)),
    Contender("nn.BatchNorm, ReLU", "relu", _batchnorm_relu),
    Contender("nn.BatchNorm, add, ReLU", "add_relu", _batchnorm_add_relu),
    Contender("torch's SyncBatchNorm function", "batch", _torch_sync),
    Contender("textbook", "batch", lambda p: _textbook(p, "eager")),
    Contender("textbook compiled", "batch", lambda p: _textbook(p, "apart", True), compiled=True),
    Contender("textbook compiled, sums together", "batch", lambda p: _textbook(p, "together", True), compiled=True),
    Contender("loop over chunks", "ghost", _ghost_loop),
    Contender("renorm of eager ops", "renorm", lambda p: _formula_step(_eager_batch_renorm, p)),
    Contender("torchrl's BatchRenorm1d", "renorm", _torchrl_renorm),
    Contender("timm's BatchNormAct2d", "relu", _timm),
)
CONTENDERS = {contender.name: contender for contender in _ALL}
