"""One training step of a whole model: its normalization, its batch, SGD, and the checks in float64."""

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

from syncbn.buffers import RunningStatistics
from syncbn.compat import import_torchvision
from syncbn.convert import convert
from syncbn.layers import BatchRenorm
from syncbn.train.tasks.models import cifar_resnet, initialize

TrainingStep = Callable[[], Tensor]
Options = Mapping[str, Any] | None
"""Arguments of :func:`syncbn.convert`; None leaves torch's BatchNorm."""

LEARNING_RATE = 1e-3
"""Small enough that the loss of a batch of two images falls from the first steps on, which is checked."""
TOLERANCE = 1e-9
"""Largest relative difference in float64 between equal steps: rounding errors of twenty layers."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepConfig:
    """What a step works on."""

    model: Literal["resnet20", "resnet50"]
    batch: int
    """Images per process."""
    image_size: int
    """Side of the square images in pixels."""
    ghost_batch_size: int
    channels_last: bool = False

    @property
    def classes(self) -> int:
        return 10 if self.model == "resnet20" else 1000

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def variants(config: StepConfig) -> dict[str, Options]:
    """The normalizations to time: torch's BatchNorm and this package's layers.

    BatchRenorm is in its warm-up, in which r and d are computed and then clipped to 1 and 0. A step costs the same as
    later on, and its loss is that of local BatchNorm.
    """
    return {
        "local": None,
        "sync": {"kind": "sync"},
        "ghost": {"kind": "ghost", "ghost_batch_size": config.ghost_batch_size},
        "renorm": {"kind": "renorm"},
    }


def build(config: StepConfig, options: Options, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in training mode; its weights do not depend on the normalization.

    Raises:
        ImportError: the model is torchvision's, which is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if config.model == "resnet20":
            model = cifar_resnet(20, 3, config.classes, 16, nn.BatchNorm2d)
            initialize(model)
        else:
            model = import_torchvision("models").resnet50(weights=None, num_classes=config.classes)
    if options is not None:
        convert(model, **options)
    moved: nn.Module = model.to(device=device, dtype=dtype, memory_format=config.memory_format)  # type: ignore[call-overload]
    return moved


def make_batch(
    config: StepConfig, device: torch.device, dtype: torch.dtype, rank: int = 0, processes: int = 1
) -> tuple[Tensor, Tensor]:
    """This process's consecutive part of a global batch of ``processes * config.batch`` images, and their classes.

    The global batch depends on its size alone, so that one process can have the same images as several.
    """
    total = config.batch * processes
    generator = torch.Generator().manual_seed(total)
    x = torch.randn(total, 3, config.image_size, config.image_size, generator=generator, dtype=torch.float64)
    y = torch.randint(config.classes, (total,), generator=generator)
    part = slice(rank * config.batch, (rank + 1) * config.batch)
    return x[part].to(device, dtype).contiguous(memory_format=config.memory_format), y[part].to(device)


def wrap(model: nn.Module) -> DistributedDataParallel:
    """The model under DistributedDataParallel, which leaves buffers to the layers, as in training."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(model, **options)


def backward(model: nn.Module, x: Tensor, y: Tensor, processes: int = 1) -> Tensor:
    """Forward, loss and backward; returns this process's part of the global batch's mean loss, ()."""
    loss = F.cross_entropy(model(x), y, reduction="sum") / (len(y) * processes)
    # BatchRenorm needs the averages over the ranks in its next forward; other layers have nothing to average here.
    shared = RunningStatistics(model, BatchRenorm) if processes > 1 else None
    if shared is not None:
        shared.start()
    (loss * processes).backward()  # DistributedDataParallel averages the gradients over the processes
    if shared is not None:
        shared.finish()
    return loss.detach()


def make_step(model: nn.Module, x: Tensor, y: Tensor, processes: int = 1) -> TrainingStep:
    """A step of SGD with momentum, always on the same batch; it returns the loss as :func:`backward` does."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, x, y, processes)
        optimizer.step()
        return loss

    return step


# -- checks ------------------------------------------------------------------------------------------------------------


def check_alone(config: StepConfig) -> dict[str, float]:
    """Compare steps that must be equal, on one process in float64.

    Returns:
        For each pair the largest relative difference of loss and gradients.

    Raises:
        RuntimeError: a difference exceeds :data:`TOLERANCE`.
    """
    x, y = make_batch(config, CPU, torch.float64)
    local = build(config, None, CPU, torch.float64)
    loss = backward(local, x, y)
    chunked = build(config, None, CPU, torch.float64)
    groups = len(y) // config.ghost_batch_size
    losses = [backward(chunked, a, b) for a, b in zip(x.chunk(groups), y.chunk(groups), strict=True)]
    for parameter in chunked.parameters():
        assert parameter.grad is not None
        parameter.grad /= groups
    whole_batch = {"kind": "ghost", "ghost_batch_size": config.batch}
    options = variants(config)
    found = {}
    for what, here, truth, expected in (
        ("sync alone = local", options["sync"], local, loss),
        ("one ghost group = local", whole_batch, local, loss),
        ("renorm in its warm-up = local", options["renorm"], local, loss),
        ("ghost groups = local on each chunk", options["ghost"], chunked, torch.stack(losses).mean()),
    ):
        model = build(config, here, CPU, torch.float64)
        found[what] = _difference(model, backward(model, x, y), truth, expected)
    return checked(found)


def check_together(config: StepConfig) -> dict[str, float]:
    """As :func:`check_alone`, on all processes of a world, against one process with the whole batch."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    x, y = make_batch(config, CPU, torch.float64, rank, processes)
    all_x, all_y = make_batch(replace(config, batch=config.batch * processes), CPU, torch.float64)
    found = {}
    for what, here, there in (
        ("sync = local on the whole batch", {"kind": "sync"}, None),
        ("local = a ghost group for each process", None, {"kind": "ghost", "ghost_batch_size": config.batch}),
    ):
        model = wrap(build(config, here, CPU, torch.float64))
        loss = backward(model, x, y, processes)
        dist.all_reduce(loss)
        truth = build(config, there, CPU, torch.float64)
        expected = backward(truth, all_x, all_y)
        found[f"{processes} processes: {what}"] = _difference(model.module, loss, truth, expected)
    return checked(found)


def checked(differences: dict[str, float]) -> dict[str, float]:
    """Return ``differences``, or raise RuntimeError if one exceeds :data:`TOLERANCE`."""
    for what, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{what}: the steps differ by {difference:.1e}, expected at most {TOLERANCE:.0e}")
    return differences


def _difference(model: nn.Module, loss: Tensor, truth: nn.Module, expected: Tensor) -> float:
    """The largest difference of the losses and of the gradients, relative to the largest gradient of each parameter."""
    largest = abs(float(loss / expected) - 1)
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        largest = max(largest, float((p.grad - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-6)))
    return largest
