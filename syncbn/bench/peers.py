"""The contenders: our layers, and what else computes the same. Each makes a step, forward and backward, of a problem.

A step is given no gradients to clear and accumulates none: ``torch.autograd.grad`` returns those of the input and of
the parameters, the same for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.bench import textbook
from syncbn.bench.problem import D_MAX, EPS, MOMENTUM, R_MAX, Problem
from syncbn.compat import import_torchvision


@dataclass(frozen=True)
class Step:
    """Forward and backward of one layer. Called, it returns the output and the gradients of ``known``."""

    function: Callable[[Tensor], Tensor]
    """Of x; a residual it has from where it was made."""
    known: tuple[Tensor, ...]
    """The leaves: input, weight, bias and, if there is one, residual."""
    grad_output: Tensor
    buffers: tuple[Tensor, ...] = ()
    """Running statistics, which are there whether or not a backward pass holds on to them."""

    def __call__(self) -> Sequence[Tensor]:
        y = self.function(self.known[0])
        return y, *torch.autograd.grad(y, self.known, self.grad_output)


class UnavailableError(Exception):
    """A peer that cannot run here, with the reason."""


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str
    """What it computes: one of :data:`syncbn.bench.correctness.KINDS`."""
    make: Callable[[Problem], Step]
    """Raises UnavailableError where it cannot run."""
    ours: bool = False
    compiled: bool = False
    """Needs seconds for each new shape."""


# -- steps -------------------------------------------------------------------------------------------------------------


def _step(
    function: Callable[[Tensor], Tensor],
    problem: Problem,
    parameters: Sequence[Tensor],
    residual: Tensor | None = None,
    buffers: Sequence[Tensor] = (),
) -> Step:
    x = problem.x.detach().requires_grad_()
    known = (x, *parameters, *(() if residual is None else (residual,)))
    return Step(function, known, problem.grad_output, tuple(buffers))


def _prepare(layer: Any, problem: Problem) -> Any:
    """The problem's parameters and running statistics, in a layer with BatchNorm's names."""
    layer = layer.to(problem.device)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(problem, name))
    return layer


def _layer_step(layer: Any, problem: Problem) -> Step:
    layer = _prepare(layer, problem)
    return _step(layer, problem, (layer.weight, layer.bias), buffers=tuple(layer.buffers()))


def _leaves(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias = (t.clone().requires_grad_() for t in (problem.weight, problem.bias))
    return weight, bias, problem.running_mean.clone(), problem.running_var.clone()


# -- ours --------------------------------------------------------------------------------------------------------------


def _sync(problem: Problem) -> Step:
    return _layer_step(syncbn.SyncBatchNorm(problem.num_features, EPS, MOMENTUM), problem)


def _ghost(groups: int | None) -> Callable[[Problem], Step]:
    def make(problem: Problem) -> Step:
        size = problem.shape.size[0] // (groups or problem.groups)
        return _layer_step(syncbn.GhostBatchNorm(problem.num_features, size, EPS, MOMENTUM), problem)

    return make


def _renorm(problem: Problem) -> Step:
    layer = syncbn.BatchRenorm(
        problem.num_features,
        EPS,
        MOMENTUM,
        r_max=R_MAX,
        d_max=D_MAX,
        warmup_steps=0,
        r_ramp_end=0,
        d_ramp_end=0,
    )
    return _layer_step(layer, problem)


def _fused(with_residual: bool) -> Callable[[Problem], Step]:
    def make(problem: Problem) -> Step:
        layer = _prepare(syncbn.SyncBatchNorm(problem.num_features, EPS, MOMENTUM, activation="relu"), problem)
        if not with_residual:
            return _step(layer, problem, (layer.weight, layer.bias), buffers=tuple(layer.buffers()))
        residual = problem.residual.detach().requires_grad_()
        return _step(
            lambda x: layer(x, residual), problem, (layer.weight, layer.bias), residual, tuple(layer.buffers())
        )

    return make


# -- torch's -----------------------------------------------------------------------------------------------------------


def _batchnorm(problem: Problem) -> nn.Module:
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer: nn.Module = _prepare(layers[problem.x.dim()](problem.num_features, EPS, MOMENTUM), problem)
    return layer


def _local(problem: Problem) -> Step:
    return _layer_step(_batchnorm(problem), problem)


def _torch_ops(with_residual: bool) -> Callable[[Problem], Step]:
    """BatchNorm, the addition and ReLU as a residual block of torchvision has them, the latter in place."""

    def make(problem: Problem) -> Step:
        layer: Any = _batchnorm(problem)
        relu = nn.ReLU(inplace=True)
        if not with_residual:
            return _step(lambda x: relu(layer(x)), problem, (layer.weight, layer.bias), None, tuple(layer.buffers()))
        residual = problem.residual.detach().requires_grad_()

        def block(x: Tensor) -> Tensor:
            out = layer(x)
            out += residual
            return relu(out)  # type: ignore[no-any-return]

        return _step(block, problem, (layer.weight, layer.bias), residual, tuple(layer.buffers()))

    return make


def _torch_sync(problem: Problem) -> Step:
    """torch's SyncBatchNorm at its core: the module falls back to the local layer when it is alone, this does not."""
    if problem.device.type != "cuda":
        raise UnavailableError("torch's SyncBatchNorm needs CUDA")
    if not dist.is_initialized():
        raise UnavailableError("it needs a process group")
    function = importlib.import_module("torch.nn.modules._functions").SyncBatchNorm
    weight, bias, mean, var = _leaves(problem)
    group = problem.group or dist.group.WORLD

    def normalize(x: Tensor) -> Tensor:
        return function.apply(x, weight, bias, mean, var, EPS, MOMENTUM, group, problem.world_size)  # type: ignore[no-any-return]

    return _step(normalize, problem, (weight, bias))


# -- what is pasted, and what it compiles to ---------------------------------------------------------------------------


def _textbook(reduce: str, compiled: bool) -> Callable[[Problem], Step]:
    def make(problem: Problem) -> Step:
        weight, bias, running_mean, running_var = _leaves(problem)
        average = _averages(problem, reduce)
        count = problem.world_size * problem.x.numel() // problem.num_features

        def normalize(x: Tensor) -> Tensor:
            return textbook.batch_norm(x, weight, bias, running_mean, running_var, count, EPS, MOMENTUM, average)

        return _step(_compile(normalize) if compiled else normalize, problem, (weight, bias))

    return make


def _averages(problem: Problem, reduce: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two tensors to their averages over the processes, in a differentiable way."""
    group, size = problem.group, problem.world_size
    if group is None:
        return lambda mean, square: (mean, square)
    if reduce == "eager":
        eager = importlib.import_module("torch.distributed.nn.functional").all_reduce
        return lambda mean, square: (
            eager(mean.clone(), group=group) / size,
            eager(square.clone(), group=group) / size,
        )
    functional = importlib.import_module("torch.distributed._functional_collectives").all_reduce
    if reduce == "apart":
        return lambda mean, square: (
            functional(mean, "sum", group) / size,
            functional(square, "sum", group) / size,
        )

    def together(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        both = functional(torch.stack((mean, square)), "sum", group) / size
        return both[0], both[1]

    return together


def _compile(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # Afresh and for this shape alone, as it is fastest; graphs of earlier shapes would only cost time to look through.
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _ghost_loop(problem: Problem) -> Step:
    layer: Any = _batchnorm(problem)
    return _step(lambda x: textbook.ghost_loop(x, layer, problem.groups), problem, (layer.weight, layer.bias))


def _eager_renorm(problem: Problem) -> Step:
    weight, bias, mean, var = _leaves(problem)
    return _step(
        lambda x: textbook.batch_renorm(x, weight, bias, mean, var, EPS, MOMENTUM, R_MAX, D_MAX),
        problem,
        (weight, bias),
    )


# -- other packages' ---------------------------------------------------------------------------------------------------


def _torchrl_renorm(problem: Problem) -> Step:
    if problem.x.dim() != 2:
        raise UnavailableError("torchrl's BatchRenorm1d is for (N, C)")
    try:
        renorm = importlib.import_module("torchrl.modules").BatchRenorm1d
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"torchrl cannot be imported ({error})") from error
    layer = renorm(problem.num_features, momentum=MOMENTUM, eps=EPS, max_r=R_MAX, max_d=D_MAX, warmup_steps=0)
    layer = layer.to(problem.device)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
        layer.bias.copy_(problem.bias)
        layer.running_mean.copy_(problem.running_mean)
        # Releases differ in whether they keep the variance or its root.
        if hasattr(layer, "running_var"):
            layer.running_var.copy_(problem.running_var)
        else:
            layer.running_std.copy_(torch.sqrt(problem.running_var + EPS))
    return _step(layer, problem, (layer.weight, layer.bias), buffers=tuple(layer.buffers()))


def _timm(problem: Problem) -> Step:
    if problem.x.dim() != 4:
        raise UnavailableError("timm's BatchNormAct2d is for (N, C, H, W)")
    try:
        import_torchvision()  # timm imports it, and without this meets what it cannot load
        layer = importlib.import_module("timm.layers").BatchNormAct2d(problem.num_features, EPS, MOMENTUM)
    except ImportError as error:
        raise UnavailableError(f"timm cannot be imported ({error})") from error
    return _layer_step(layer, problem)


_ALL = (
    Contender("SyncBatchNorm", "batch", _sync, ours=True),
    Contender("BatchRenorm", "renorm", _renorm, ours=True),
    Contender("GhostBatchNorm", "ghost", _ghost(None), ours=True),
    Contender("GhostBatchNorm of 1 group", "batch", _ghost(1), ours=True),
    Contender("SyncBatchNorm + ReLU", "relu", _fused(False), ours=True),
    Contender("SyncBatchNorm + add + ReLU", "add_relu", _fused(True), ours=True),
    Contender("nn.BatchNorm", "local", _local),
    Contender("nn.BatchNorm, ReLU", "relu", _torch_ops(False)),
    Contender("nn.BatchNorm, add, ReLU", "add_relu", _torch_ops(True)),
    Contender("torch's SyncBatchNorm function", "batch", _torch_sync),
    Contender("textbook", "batch", _textbook("eager", compiled=False)),
    Contender("textbook compiled", "batch", _textbook("apart", compiled=True), compiled=True),
    Contender("textbook compiled, sums together", "batch", _textbook("together", compiled=True), compiled=True),
    Contender("loop over chunks", "ghost", _ghost_loop),
    Contender("renorm of eager ops", "renorm", _eager_renorm),
    Contender("torchrl's BatchRenorm1d", "renorm", _torchrl_renorm),
    Contender("timm's BatchNormAct2d", "relu", _timm),
)
CONTENDERS = {contender.name: contender for contender in _ALL}
