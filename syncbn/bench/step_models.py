"""The training steps that are timed: a model, its normalization, a batch, and one step of SGD."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.compat import import_torchvision
from syncbn.convert import convert
from syncbn.layers import BatchRenorm
from syncbn.population import RunningStatistics
from syncbn.train.tasks.models import cifar_resnet, initialize

ModelName = Literal["resnet20", "resnet50"]
Precision = Literal["fp32", "bf16"]
Step = Callable[[], Tensor]

VARIANTS = ("local", "sync", "ghost", "renorm")
"""torch's BatchNorm, left as it is, and this package's layers."""
LEARNING_RATE = 1e-3
"""Small, so that the loss of a batch of two images falls from the first steps on, as is checked."""
TOLERANCE = 1e-9
"""Largest relative difference in float64 of what is equal: rounding, through twenty layers."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """What a step works on."""

    model: ModelName
    batch: int
    """Images of each process."""
    image_size: int
    """Side of the square images in pixels."""
    ghost_batch_size: int
    channels_last: bool = False

    @property
    def classes(self) -> int:
        return 10 if self.model == "resnet20" else 1000


CPU_SHAPES = (
    Shape("resnet20", 8, 32, 4),
    # 64 pixels rather than ImageNet's 224: a step in a second, not ten, with the same layers, weights and collectives.
    # That is small maps: what a layer costs beside the memory it moves weighs more than it does in a real training.
    Shape("resnet50", 4, 64, 2),
)
CUDA_SHAPES = (
    Shape("resnet20", 128, 32, 32, channels_last=True),
    Shape("resnet50", 2, 224, 1, channels_last=True),
    Shape("resnet50", 8, 224, 4, channels_last=True),
    Shape("resnet50", 32, 224, 8, channels_last=True),
)


def missing(model: ModelName) -> str | None:
    """Why a model cannot be built here; None where it can."""
    if model == "resnet50":
        try:
            import_torchvision()
        except ImportError as error:
            return f"resnet50: {error}"
    return None


def variant_options(shape: Shape) -> dict[str, Mapping[str, Any]]:
    """For each of :data:`VARIANTS` but ``local`` the kind and the options that it is converted with.

    Renorm is within its warm-up, where its corrections are computed and then limited to none: the cost is that of any
    step, and its loss is local BatchNorm's.
    """
    return {
        "sync": {"kind": "sync"},
        "ghost": {"kind": "ghost", "ghost_batch_size": shape.ghost_batch_size},
        "renorm": {"kind": "renorm"},
    }


def build(shape: Shape, options: Mapping[str, Any] | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The shape's model in training mode, with the same weights whatever the normalization.

    Args:
        shape: which model.
        options: arguments of :func:`syncbn.convert`; None leaves torch's BatchNorm.
        device: where it is.
        dtype: of its parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if shape.model == "resnet20":
            model = cifar_resnet(20, 3, shape.classes, 16, nn.BatchNorm2d)
            initialize(model)
        else:
            model = import_torchvision("models").resnet50(weights=None, num_classes=shape.classes)
    if options is not None:
        convert(model, **options)
    memory_format = torch.channels_last if shape.channels_last else torch.contiguous_format
    moved: nn.Module = model.to(device=device, dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
    return moved


def make_batch(
    shape: Shape, device: torch.device, dtype: torch.dtype, rank: int = 0, processes: int = 1
) -> tuple[Tensor, Tensor]:
    """This process's consecutive share of a global batch of ``processes * shape.batch`` images, and their classes.

    The same images for the same total, however it is shared out.
    """
    total = shape.batch * processes
    generator = torch.Generator().manual_seed(total)
    x = torch.randn(total, 3, shape.image_size, shape.image_size, generator=generator, dtype=torch.float64)
    y = torch.randint(shape.classes, (total,), generator=generator)
    share = slice(rank * shape.batch, (rank + 1) * shape.batch)
    memory_format = torch.channels_last if shape.channels_last else torch.contiguous_format
    return x[share].to(device, dtype).contiguous(memory_format=memory_format), y[share].to(device)


def wrap(model: nn.Module) -> DistributedDataParallel:
    """The model under DistributedDataParallel, its buffers left to its layers, as in the trainer."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(model, **options)


def backward(model: nn.Module, x: Tensor, y: Tensor, processes: int = 1, precision: Precision = "fp32") -> Tensor:
    """Forward, loss and backward; returns this process's share of the global batch's mean loss, ()."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(x)
        loss = F.cross_entropy(logits, y, reduction="sum") / (len(y) * processes)
    shared = RunningStatistics(model, BatchRenorm) if processes > 1 else None
    if shared is not None:  # renorm's, which its next forward uses; nothing else has any to share
        shared.start()
    (loss * processes).backward()  # the gradients are averaged over the processes
    if shared is not None:
        shared.finish()
    return loss.detach()


def make_step(model: nn.Module, x: Tensor, y: Tensor, processes: int = 1, precision: Precision = "fp32") -> Step:
    """A function that takes one step of SGD with momentum on the same batch each time, and returns :func:`backward`."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, x, y, processes, precision)
        optimizer.step()
        return loss

    return step


def whole(shape: Shape, processes: int) -> Shape:
    """The shape of the same global batch on one process."""
    return replace(shape, batch=shape.batch * processes)


def gradient_difference(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two models' gradients, relative to the largest value of each parameter's."""
    largest = 0.0
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        largest = max(largest, float((p.grad - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-6)))
    return largest


# ---- checks


def check_alone(shape: Shape) -> dict[str, float]:
    """On one process, in float64: the largest relative difference of loss and gradients, for each pair that is equal.

    Raises:
        RuntimeError: a difference beyond :data:`TOLERANCE`.
    """
    x, y = make_batch(shape, CPU, torch.float64)
    local = build(shape, None, CPU, torch.float64)
    loss = backward(local, x, y)
    equal: dict[str, Mapping[str, Any]] = {
        "sync alone = local": {"kind": "sync"},
        "one ghost group = local": {"kind": "ghost", "ghost_batch_size": shape.batch},
        "renorm in its warm-up = local": {"kind": "renorm"},
    }
    found = {name: _against(shape, options, x, y, local, loss) for name, options in equal.items()}
    groups = len(y) // shape.ghost_batch_size
    chunked = build(shape, None, CPU, torch.float64)
    losses = [backward(chunked, a, b, 1) for a, b in zip(x.chunk(groups), y.chunk(groups), strict=True)]
    for parameter in chunked.parameters():
        assert parameter.grad is not None
        parameter.grad /= groups
    ghost = {"kind": "ghost", "ghost_batch_size": shape.ghost_batch_size}
    found["ghost groups = local on each chunk"] = _against(shape, ghost, x, y, chunked, sum(losses) / groups)
    return checked(found)


def _against(shape: Shape, options: Mapping[str, Any], x: Tensor, y: Tensor, truth: nn.Module, loss: Any) -> float:
    model = build(shape, options, CPU, torch.float64)
    difference = abs(float(backward(model, x, y) / loss) - 1)
    return max(difference, gradient_difference(model, truth))


def checked(differences: dict[str, float]) -> dict[str, float]:
    """``differences``, all within :data:`TOLERANCE`; RuntimeError else."""
    for what, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{what} does not hold: they differ by {difference:.1e}, expected {TOLERANCE:.0e}")
    return differences


def check_together(shape: Shape) -> dict[str, float]:
    """On the processes of a world, in float64: as :func:`check_alone`, against one process with the whole batch."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    x, y = make_batch(shape, CPU, torch.float64, rank, processes)
    all_x, all_y = make_batch(whole(shape, processes), CPU, torch.float64)
    found = {}
    for what, here, there in (
        ("sync = local on the whole batch", {"kind": "sync"}, None),
        ("local = a ghost group for each process", None, {"kind": "ghost", "ghost_batch_size": shape.batch}),
    ):
        model = wrap(build(shape, here, CPU, torch.float64))
        loss = backward(model, x, y, processes)
        dist.all_reduce(loss)
        truth = build(shape, there, CPU, torch.float64)
        difference = abs(float(loss / backward(truth, all_x, all_y)) - 1)
        found[f"{processes} processes: {what}"] = max(difference, gradient_difference(model.module, truth))
    return checked(found)
