"""Every private part of torch that this package uses: the reason, the public alternative, and what that would cost.

A step (forward and backward) of ``SyncBatchNorm(16)`` on a (2, 16, 8, 8) CPU tensor takes about 100 us on torch 2.13.
What costs less than 3 % of that in its public form is used in that form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
"""Other subclasses (fake tensors, DTensor) have rules of their own for every operation."""


def is_transformed() -> bool:
    """Whether a transform of torch.func or torch.jit.trace is active: both need operations that they know."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or has_transforms()


def has_transforms() -> bool:
    """Whether a transform of torch.func is active. Private: torch has no public query."""
    return torch._C._are_functorch_transforms_active()


def in_forward_ad() -> bool:
    """Whether a level of forward-mode differentiation is entered (``torch.autograd.forward_ad.dual_level``).

    Private: the public ``unpack_dual`` tells it of one tensor and takes 0.4 us, and a layer has four.
    """
    return forward_ad._current_level >= 0


def is_differentiated_forward() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is active, outside of a graph."""
    return not torch.compiler.is_compiling() and (has_transforms() or in_forward_ad())


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is no wrapper, and operations on it are neither transformed nor seen by a ``TorchDispatchMode``.

    Private: dispatch modes and transforms have no public query. ``torch.jit.is_tracing`` is a Python function; each
    call of one takes about 1 % of a small layer's step.
    """
    return not (
        type(x) not in PLAIN_TYPES
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


def runs_at_once(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs when it is called, on x's own values, and nothing but autograd observes it.

    Kernels that read memory may run only then. It is not so while torch.compile or make_fx trace, under a transform,
    and under a ``TorchDispatchMode``.
    """
    return not torch.compiler.is_compiling() and is_plain(x)


def in_backward() -> bool:
    """Whether this thread runs a backward pass. Private: torch has no public query."""
    return torch._C._current_graph_task_id() != -1


def is_profiled() -> bool:
    """Whether a profiler records what this thread does. Private: torch has no public query."""
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def group_size(group_name: str) -> int:
    """The number of ranks of a process group.

    Private: ``torch.distributed.get_world_size`` takes a group object, and torch has no public function from a name to
    its group. A compiled graph can only hold the name.
    """
    return dist.distributed_c10d._get_group_size_by_name(group_name)  # type: ignore[arg-type]


def group_of(group_name: str) -> dist.ProcessGroup:
    """The process group of a name. Private for the same reason."""
    return dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type, attr-defined]


def store_of_world() -> Store:
    """The store of the default process group, through which its processes have met.

    Private: the public way is to keep the store that ``init_process_group`` was given, which users need not do.
    """
    return dist.distributed_c10d._get_default_store()


def host_of_store(store: Any) -> str | None:
    """The name or address of the machine that serves a store; None for one that has no such machine, as in a file.

    Private: torch does not export the class of a store with prefixed keys.
    """
    while isinstance(store, dist.distributed_c10d.PrefixStore):
        store = store.underlying_store
    host: str | None = getattr(store, "host", None)
    return host


functional_collectives: Any = torch.ops._c10d_functional
"""Collectives that take a group's name and return a new tensor; ``wait_tensor`` waits for it.

Private: ``torch.distributed.all_reduce`` is as fast, but takes a group object and changes its argument in place. These
operators are what both eager mode and a compiled graph can run.
"""


def constant_result(function: Any) -> Any:
    """Decorator: tracing runs ``function`` and keeps its result, as ``torch.compiler.assume_constant_result`` does.

    Private: the public decorator imports the compiler when it is applied, which takes 2 s in each process.
    """
    function._dynamo_marked_constant = True
    return function


def static_address(tensor: Tensor) -> Tensor:
    """Mark a tensor that is no buffer as one that stays where it is, so that CUDA graphs may change it; returns it.

    Private: the public ``torch._dynamo.mark_static_address`` sets this attribute too. Its module takes 2 s to import.
    """
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return tensor


def vector_instructions() -> str:
    """The widest vector instructions of this processor: ``"avx512"``, ``"avx2"`` or ``"default"``.

    Private: the public ``torch.backends.cpu.get_cpu_capability`` says what torch uses, which may be less.
    """
    if torch.cpu._is_avx512_supported():
        return "avx512"
    return "avx2" if torch.cpu._is_avx2_supported() else "default"


def assert_async(condition: Tensor, message: str) -> None:
    """An error if the () bool tensor is false. On CUDA the device raises it and the host does not wait.

    Private: ``torch._assert`` reads the tensor on the host.
    """
    torch._assert_async(condition, message)
