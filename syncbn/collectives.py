"""The one reduction, and the processes that take part in it.

A layer keeps a :class:`Scope`, which can be pickled. Its process group is looked up or made when first needed.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import lockstep
from syncbn.lockstep import Position, Reduction
from syncbn.torch_internals import (
    constant_result,
    functional_collectives,
    group_size,
    is_differentiated_forward,
)

_AVAILABLE = dist.is_available()
_Groups: TypeAlias = "weakref.WeakValueDictionary[tuple[int, ...], dist.ProcessGroup]"
# By world, the groups that were made here or passed in by users, by their ranks. The references are weak, so that a
# group that torch has destroyed does not live on here with its sockets.
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, _Groups] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Scope:
    """Which processes share statistics: the default world, runs of consecutive ranks, or given ranks."""

    sync_group_size: int | None = None
    """Consecutive ranks that share statistics; it divides the world size."""
    ranks: tuple[int, ...] | None = None
    """Global ranks of a process group, in its order."""

    def __post_init__(self) -> None:
        if self.sync_group_size is not None and self.ranks is not None:
            raise ValueError("give process_group or sync_group_size, not both")
        check_positive("sync_group_size", self.sync_group_size)


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a positive integer or None."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a positive integer or None, got {value!r}")


def make_scope(process_group: Any = None, sync_group_size: int | None = None) -> Scope:
    """The scope of a ``process_group``: a :class:`ProcessGroup`, a 1-D device mesh or a sequence of global ranks.

    On ranks outside a group ``dist.new_group`` returns a value that is neither, which is an error.
    """
    if process_group is None:
        return Scope(sync_group_size=sync_group_size)
    if isinstance(process_group, Sequence):
        return Scope(sync_group_size=sync_group_size, ranks=tuple(process_group))
    mesh = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", ())
    if isinstance(process_group, mesh):
        if process_group.ndim != 1:
            raise ValueError(f"process_group must have one dimension if it is a device mesh, got {process_group!r}")
        process_group = process_group.get_group()
    ranks: tuple[int, ...] = ()
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        with contextlib.suppress(KeyError):  # a group that was destroyed
            ranks = tuple(dist.get_process_group_ranks(process_group))
    if not ranks:
        raise ValueError(
            "process_group must be a process group that this process is in, a device mesh or a sequence of ranks, "
            f"got {process_group!r}"
        )
    _known_groups()[ranks] = process_group
    return Scope(sync_group_size=sync_group_size, ranks=ranks)


def _known_groups() -> _Groups:
    """The groups of the present world."""
    world = dist.group.WORLD
    assert world is not None, "called only with an initialized world"
    return _groups.setdefault(world, weakref.WeakValueDictionary())


def _members(scope: Scope) -> tuple[int, ...]:
    """Global ranks of the scope's group that this process is in."""
    world = dist.get_world_size()
    if scope.ranks is not None:
        if dist.get_rank() not in scope.ranks:
            raise ValueError(
                f"process_group holds the ranks {scope.ranks}, and not this process's rank {dist.get_rank()}; "
                "give each process a group that it is in"
            )
        return scope.ranks
    size = scope.sync_group_size or world
    if world % size:
        raise ValueError(f"sync_group_size={size} does not divide the world size {world}; take a divisor of {world}")
    first = dist.get_rank() // size * size
    return tuple(range(first, first + size))


def resolve(scope: Scope) -> dist.ProcessGroup | None:
    """The process group of ``scope``, or None if this process is its only member.

    A group is made once per world, by its members alone: other ranks need not call. Every member makes the same groups
    in the same order, because all ranks run the same model.
    """
    if not (_AVAILABLE and dist.is_initialized()):
        return None
    ranks = _members(scope)
    if len(ranks) == 1:
        return None
    whole = ranks == tuple(range(dist.get_world_size()))
    if whole and scope.ranks is None:
        return dist.group.WORLD
    groups = _known_groups()
    group = groups.get(ranks)  # a group that a user passed in comes first, even one of all ranks
    if group is None:
        group = dist.group.WORLD if whole else dist.new_group(list(ranks), use_local_synchronization=True)
        assert group is not None, "this rank is a member"
        groups[ranks] = group
    return group


@constant_result
def resolve_name(scope: Scope) -> str | None:
    """The name of :func:`resolve`'s group, a string that a compiled graph can hold.

    Tracing may keep the name, as a group stays the same for as long as its world lives.
    """
    group = resolve(scope)
    return None if group is None else group.group_name


class _AllReduceSum(torch.autograd.Function):
    """Sum over a process group. Its derivatives, of any order and in either mode, are sums over the group as well."""

    @staticmethod
    def forward(tensor: Tensor, group_name: str) -> Tensor:
        with torch.no_grad():
            return _start(tensor, group_name).wait()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad, ctx.group_name), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        summed: Tensor = _AllReduceSum.apply(tangent, ctx.group_name)  # type: ignore[no-untyped-call]
        return summed

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], tensor: Tensor, group_name: str) -> tuple[Tensor, int | None]:
        return _AllReduceSum.apply(tensor, group_name), in_dims[0]  # type: ignore[no-untyped-call]


_GATHER_LIMIT = 8
"""Group size up to which a reduction on the CPU gathers and adds. With gloo on one host this takes half to two thirds
of the time of an all-reduce, which goes around the ring twice. All ranks add in the same order."""


@torch.library.custom_op("syncbn::sum_over_ranks", mutates_args=())
def _sum_over_ranks(tensor: Tensor, group_name: str) -> Tensor:
    """The reduction in a compiled graph on the CPU. The group's size is read at run time, as it may change."""
    return _start(tensor, group_name).wait().clone()


@_sum_over_ranks.register_fake
def _(tensor: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class PendingSum(NamedTuple):
    """A reduction that may still be running."""

    tensor: Tensor
    """The collective's result; the sum itself if no collective was started."""
    started: bool = False
    gathered: int = 0
    """The number of ranks whose tensors were gathered one after the other; 0 if the collective adds them."""
    tagged: bool = False
    """Whether the ranks' tags of :mod:`syncbn.lockstep` follow their tensors."""
    shape: torch.Size = torch.Size()
    """Of the sum."""
    position: Position | None = None
    """None in a graph that is being compiled."""

    def wait(self) -> Tensor:
        """The sum. On CUDA the stream waits, and the host goes on.

        Raises RuntimeError if the tags show that the ranks have reduced different layers.
        """
        if not self.started:
            return self.tensor
        if self.position is None:
            waited: Tensor = functional_collectives.wait_tensor(self.tensor)
            return waited
        result: Tensor | None = None
        try:
            result = functional_collectives.wait_tensor(self.tensor)
        finally:
            lockstep.end(self.position, result)
        assert result is not None, "waited for"
        if not self.gathered and not self.tagged:
            return result
        ranks = self.gathered or 1
        rows = result.view(ranks, result.numel() // ranks)
        if self.tagged:
            rows, tags = rows[:, : -lockstep.TAG_SIZE], rows[:, -lockstep.TAG_SIZE :]
            check = lockstep.check_each if self.gathered else lockstep.check_sum
            check(tags, self.position)
        summed: Tensor = rows.sum(0).view(self.shape)
        return summed


def start_all_reduce_sum(tensor: Tensor, group_name: str | None, reduction: Reduction | None = None) -> PendingSum:
    """Start :func:`all_reduce_sum`. Work done before ``wait()`` overlaps with the collective."""
    if group_name is None:
        return PendingSum(tensor)
    if (tensor.requires_grad and torch.is_grad_enabled()) or is_differentiated_forward():
        summed: Tensor = _AllReduceSum.apply(tensor, group_name)  # type: ignore[no-untyped-call]
        return PendingSum(summed)
    if torch.compiler.is_compiling():
        if tensor.device.type == "cpu":
            return PendingSum(_sum_over_ranks(tensor, group_name))
        return PendingSum(functional_collectives.all_reduce(tensor.contiguous(), "sum", group_name), started=True)
    return _start(tensor, group_name, reduction)


def _start(tensor: Tensor, group_name: str, reduction: Reduction | None = None) -> PendingSum:
    source = tensor.contiguous()
    position, tagged = lockstep.begin(source, group_name, reduction)
    try:
        if tagged:
            source = torch.cat((source.flatten(), source.new_tensor(lockstep.tag(reduction))))
        gathered = 0
        if source.is_cpu and (size := group_size(group_name)) <= _GATHER_LIMIT:
            gathered = size
            result = functional_collectives.all_gather_into_tensor(source, size, group_name)
        else:
            result = functional_collectives.all_reduce(source, "sum", group_name)
    except BaseException:
        lockstep.end(position)
        raise
    return PendingSum(result, True, gathered, tagged, tensor.shape, position)


def all_reduce_sum(tensor: Tensor, group_name: str | None, reduction: Reduction | None = None) -> Tensor:
    """The sum of ``tensor`` over the ranks of the group, or ``tensor`` itself without a group. One collective.

    Differentiable any number of times: the gradient of a sum over ranks is the sum of the ranks' gradients.
    ``reduction`` names the layer, for the checks of :mod:`syncbn.lockstep`.
    """
    return start_all_reduce_sum(tensor, group_name, reduction).wait()


def gathered(own: Tensor) -> Tensor:
    """The tensors of all ranks of the default process group, (ranks, *), which have one shape. One collective."""
    found = own.new_empty(dist.get_world_size(), *own.shape)
    dist.all_gather(list(found.unbind()), own)
    return found


def max_over_ranks(value: int, group_name: str, device: torch.device, name: str) -> int:
    """The largest of the ranks' values. One collective and a host synchronization, so it must be called rarely.

    ``name`` tells a watchdog who waits for them.
    """
    own = torch.tensor(value, device=device)
    with lockstep.watched(name, own, group_name):
        result = functional_collectives.all_reduce(own, "max", group_name)
        return int(functional_collectives.wait_tensor(result).item())
