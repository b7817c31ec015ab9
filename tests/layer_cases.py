"""Random layers and batches for the property tests: how they are drawn, and the tensors of a case."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import syncbn
from syncbn.layers import SmallBatchNorm

CASES = int(os.environ.get("SYNCBN_CASES", "150"))
"""In all files together. Without the variable the same cases are drawn each time."""
LAYERS = {"sync": syncbn.SyncBatchNorm, "ghost": syncbn.GhostBatchNorm, "renorm": syncbn.BatchRenorm}
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded", "offset")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def drawn(share: float) -> settings:
    """The settings of a test that has this share of the cases."""
    return settings(
        max_examples=math.ceil(share * CASES),
        derandomize="SYNCBN_CASES" not in os.environ,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, its state, and the batch that each rank has for one step."""

    layer: str
    sizes: tuple[int, ...]
    """Samples of each rank."""
    shape: tuple[int, ...]
    """Channels and what follows."""
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    parameters: str = "float32"
    """The layer's own dtype."""
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    """Of the input, and of the residual and the output's gradient."""
    loc: float = 0.0
    """Mean of the channels in standard deviations; every second one has the opposite sign."""
    std: float = 1.0
    poison: tuple[float, int] | None = None
    """A value, and the element of the batch that has it."""
    training: bool = True
    tracked: int = 0
    """Updates of the running statistics so far. 0: they have their first values."""
    needs: tuple[bool, bool, bool] = (True, True, True)
    """Whether input, weight and bias need gradients."""
    historyless: tuple[bool, ...] = ()
    """The ranks whose batch needs no gradient if it is empty."""
    residual: bool = False
    seed: int = 0

    @property
    def shares(self) -> bool:
        """Whether the ranks share statistics in training."""
        return self.layer == "sync" or bool(self.options.get("sync"))

    def needs_input(self, rank: int) -> bool:
        dropped = self.sizes[rank] == 0 and rank < len(self.historyless) and self.historyless[rank]
        return self.needs[0] and not dropped


@st.composite
def cases(draw: Any, ranks: int) -> Case:
    name = draw(st.sampled_from(sorted(LAYERS)))
    options = draw(st.fixed_dictionaries(_options(name)))
    sizes = tuple(draw(st.integers(0, 9)) for _ in range(ranks))
    if (size := options.get("ghost_batch_size")) and options["remainder"] == "error":
        sizes = tuple(n // size * size for n in sizes)
    if options.pop("enough_groups", False):
        options["max_ghost_groups"] = max(1, -(-max(sizes) // size)) + draw(st.integers(0, 2))
    length = st.one_of(st.integers(1, 5), st.sampled_from([0, 1, 2, 17, 33]))
    spatial = draw(st.lists(length, max_size=3).filter(lambda found: math.prod(found) <= 128))
    dtype = draw(st.sampled_from(DTYPES))
    poison = st.tuples(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**5))
    return Case(
        layer=name,
        sizes=sizes,
        shape=(draw(st.integers(1, 70)), *spatial),
        options=options,
        dtype=dtype,
        parameters=draw(st.sampled_from([dtype, "float32", "float64"])),
        layouts=draw(st.tuples(*2 * [st.sampled_from(LAYOUTS)])),
        loc=draw(st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4])),
        std=draw(st.sampled_from([1.0, 1e-2, 1e2])),
        poison=draw(st.none() | st.none() | st.none() | poison),
        training=draw(st.sampled_from([True, True, True, False])),
        tracked=draw(st.integers(0, 12)),
        needs=draw(st.tuples(*3 * [st.sampled_from([True, True, False])])),
        historyless=draw(st.tuples(*ranks * [st.booleans()])),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


def _options(name: str) -> dict[str, Any]:
    """What each option of a layer is drawn from."""
    options: dict[str, Any] = {
        "eps": st.sampled_from([1e-5, 1e-3, 1e-8, 0.1]),
        "momentum": st.sampled_from([0.1, None, 0.01, 1.0, 0.0]),
        "affine": st.sampled_from([True, True, False]),
        "bias": st.sampled_from([True, True, False]),
        "activation": st.sampled_from([None, None, "relu", "leaky_relu", "silu"]),
    }
    if name != "renorm":
        options["track_running_stats"] = st.sampled_from([True, True, False])
    if name != "sync":
        sizes = st.integers(1, 4) if name == "ghost" else st.none() | st.integers(1, 4)
        options |= {"ghost_batch_size": sizes, "remainder": st.sampled_from(["smaller", "error"])}
        options["sync"] = st.booleans()
    if name == "ghost":
        options["running_update"] = st.sampled_from(["mean", "sequential", "total"])
        options["enough_groups"] = st.booleans()
    if name == "renorm":
        options |= {"r_max": st.sampled_from([1.0, 1.5, 3.0]), "d_max": st.sampled_from([0.0, 0.5, 5.0])}
        options |= {"warmup_steps": st.integers(0, 4)}
        options |= {"r_ramp_end": st.integers(4, 10), "d_ramp_end": st.integers(4, 10)}
    return options


@dataclass(frozen=True)
class Tensors:
    """What the case's ranks hold, by rank, in the dtypes of the case."""

    x: list[Tensor]
    dy: list[Tensor]
    residual: list[Tensor | None]
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor


def tensors(case: Case) -> Tensors:
    """Drawn by the case's seed; the same on all processes."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dtype, own, c = getattr(torch, case.dtype), getattr(torch, case.parameters), case.shape[0]
    buffers = own if own.itemsize >= 4 else torch.float32
    whole, batch = (sum(case.sizes), *case.shape), []
    offset = case.loc * (1 - 2 * (torch.arange(c) % 2)).double()
    x = case.std * (normal(*whole) + offset.view(c, *(1,) * (len(whole) - 2)))
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    if case.poison is not None and x.numel():
        x.view(-1)[case.poison[1] % x.numel()] = case.poison[0]
    for values, layout in ((x, case.layouts[0]), (normal(*whole), case.layouts[1]), (normal(*whole), case.layouts[1])):
        batch.append([arranged(part.to(dtype), layout) for part in values.split(case.sizes)])
    spread = torch.exp(normal(c)) if case.tracked else torch.ones(c, dtype=torch.float64)
    mean = case.std * (offset + normal(c)) if case.tracked else torch.zeros(c, dtype=torch.float64)
    affine, biased = case.options.get("affine", True), case.options.get("bias", True)
    return Tensors(
        x=batch[0],
        dy=batch[1],
        residual=batch[2] if case.residual else [None] * len(case.sizes),
        weight=normal(c).to(own) if affine else None,
        bias=normal(c).to(own) if affine and biased else None,
        running_mean=mean.to(buffers),
        running_var=((case.std**2 if case.tracked else 1.0) * spread).to(buffers),
    )


def arranged(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another memory format; an expanded one repeats the first sample, or else its elements."""
    if layout == "channels_last" and t.dim() in (4, 5):
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "expanded" and len(t):
        return (t[:1] if t.dim() == 2 or len(t) % 2 else t[..., :1]).expand_as(t)
    if layout == "offset":
        return torch.cat((t.new_full((1,), math.nan), t.flatten()))[1:].view(t.shape)
    return t.contiguous()


def make_layer(case: Case, held: Tensors) -> SmallBatchNorm:
    """The layer in the case's state."""
    layer = LAYERS[case.layer](case.shape[0], **case.options, dtype=getattr(torch, case.parameters))
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (mine := getattr(layer, name)) is not None:
                mine.copy_(getattr(held, name))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(case.tracked)
    for name, needs in zip(("weight", "bias"), case.needs[1:], strict=True):
        if getattr(layer, name) is not None:
            getattr(layer, name).requires_grad_(needs)
    return layer.train(case.training)


def _strides(t: Tensor) -> list[int]:
    """Of the dimensions that have more than one element: the others' have no meaning."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def take_step(case: Case, held: Tensors, rank: int) -> dict[str, Any]:
    """What the rank's layer makes of its batch: output, gradients, buffers; or the error that it raises."""
    layer = make_layer(case, held)
    x, residual = held.x[rank].detach(), held.residual[rank]
    x.requires_grad_(case.needs_input(rank))
    if residual is not None:
        residual = residual.detach().requires_grad_(case.needs[0])
    found: dict[str, Any] = {"error": None}
    try:
        y = layer(x, residual)
    except ValueError as error:
        found["error"] = str(error)
    else:
        if y.requires_grad:
            y.backward(held.dy[rank])
        found |= {"y": y.detach(), "strides": _strides(y) == _strides(torch.empty_like(x)), "dx": x.grad}
        found["dresidual"] = None if residual is None else residual.grad
        found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return found | (
        {} if layer.running_mean is None else {"num_nonfinite_batches": layer.num_nonfinite_batches.clone()}
    )
