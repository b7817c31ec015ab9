"""What a step costs besides time: memory, collectives, launches, waits of the host."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUMBER_BYTES = 4
"""Of the numbers in which saved bytes are counted: those of float32."""

_SYNC_WARNING = "synchronizing CUDA operation"


@dataclass(frozen=True)
class Figures:
    """Of one step, forward and backward. None is a figure that was not to be had; ``missing`` says why."""

    saved_bytes: int | None = None
    """Kept for the backward pass beyond the input, the residual and the parameters."""
    saved_numbers: float | None = None
    """The same as float32 numbers for each channel and group."""
    peak_bytes: int | None = None
    """Most memory allocated during the step beyond what was there before it."""
    collectives: int | None = None
    wire_bytes: int | None = None
    """Handed to collectives by this process."""
    operations: int | None = None
    """Operations dispatched: on the CPU what comes nearest to kernels launched."""
    kernels: int | None = None
    """Kernels, copies and fills that the GPU ran."""
    kernel_seconds: float | None = None
    """The time of these alone, without the gaps between them."""
    host_synchronizations: int | None = None
    missing: str = ""


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach a device, and among them the collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.collectives = self.wire_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            if not name.startswith(("wait_tensor", "barrier", "monitored_barrier")):
                self.collectives += 1
                # What is sent; these put the tensors to receive into first.
                sent = args[1] if name.startswith(("allgather", "_allgather", "reduce_scatter_")) else args[0]
                self.wire_bytes += sum(t.numel() * t.element_size() for t in _tensors(sent))
        elif not func.is_view:
            self.operations += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def saved_bytes(step: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps in a step, each storage once, without those of ``known`` tensors."""
    # By storage; the tensor is held so that no address is used twice.
    kept: dict[int, Tensor] = {}
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in ignored:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most memory that is allocated at once during a step, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return int(most)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler's library writes to stderr at each start and stop, past Python's own."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def host_synchronizations(step: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a step, by torch's own account."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_SYNC_WARNING in str(warning.message) for warning in caught)


def kernels(step: Callable[[], object]) -> tuple[int, float]:
    """Kernels, copies and fills that the GPU runs in a step, and the seconds that they take."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with _quiet(), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events: Any = profile.events()
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    return len(on_device), sum(event.time_range.elapsed_us() for event in on_device) / 1e6


def measure_figures(
    step: Callable[[], object],
    known: Iterable[Tensor],
    *,
    device: torch.device,
    channels_and_groups: int,
    compiled: bool = False,
    profiled: bool = True,
) -> Figures:
    """All figures of a step that has run before. A figure that cannot be had is None, and never an error.

    Args:
        step: forward and backward.
        known: the input, the residual and the parameters.
        device: of the step.
        channels_and_groups: C times the number of groups that have statistics of their own.
        compiled: the step is a compiled one, whose operations a dispatch mode does not see.
        profiled: count the GPU's kernels too; its profiler takes a good part of a second.
    """
    found: dict[str, Any] = {}
    missing: list[str] = []

    def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found.update(measure())
        except Exception as error:  # an instrument of torch that is not in this build is no reason to stop
            missing.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])

    def saved() -> dict[str, Any]:
        amount = saved_bytes(step, known)
        return {"saved_bytes": amount, "saved_numbers": amount / NUMBER_BYTES / max(1, channels_and_groups)}

    def dispatched() -> dict[str, Any]:
        with OperationCounter() as counter:
            step()
        return {name: getattr(counter, name) for name in ("operations", "collectives", "wire_bytes")}

    attempt("saved", saved)
    attempt("peak memory", lambda: {"peak_bytes": peak_bytes(step, device)})
    if compiled:
        missing.append("operations, collectives: compiled code is not dispatched one by one")
    else:
        attempt("operations", dispatched)
    if device.type == "cuda":
        attempt("host synchronizations", lambda: {"host_synchronizations": host_synchronizations(step)})
        if profiled:
            attempt("kernels", lambda: dict(zip(("kernels", "kernel_seconds"), kernels(step), strict=True)))
    else:
        missing.append("kernels, host synchronizations: CUDA only")
    return Figures(**found, missing="; ".join(missing))
