"""What a step costs besides time, and the machine's copy bandwidth, which gives the least time that a step can take."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncbn.bench.problem import Shape
from syncbn.bench.timing import Call, Spread, interleaved, spread

PASSES = 8
"""Forward reads x for the statistics, reads it again and writes y. Backward reads x and dy for the sums, reads both
again and writes dx."""
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # several times any cache


@dataclass(frozen=True)
class Costs:
    """Of one step, forward and backward. What could not be measured is None, and ``missing`` says why."""

    saved_bytes: int | None = None  # kept for backward, beyond the input, the residual, the parameters and the buffers
    saved_numbers: float | None = None  # the same in float32 numbers per channel and group
    peak_bytes: int | None = None  # most memory allocated at once during the step, beyond what was allocated before
    collectives: int | None = None
    wire_bytes: int | None = None  # bytes that this process hands to collectives
    operations: int | None = None  # operations dispatched: the closest figure to kernel launches on the CPU
    kernels: int | None = None  # kernels, copies and fills on the GPU
    kernel_seconds: float | None = None  # their time, without the gaps between them
    host_synchronizations: int | None = None  # waits of the host for the GPU
    missing: str = ""


def measure_costs(
    step: Call,
    known: Iterable[Tensor],
    *,
    device: torch.device,
    channels_and_groups: int,
    compiled: bool = False,
    profiled: bool = True,
) -> Costs:
    """All costs of a step that has run before. What cannot be measured never is an error.

    The ``known`` tensors do not count as saved. ``channels_and_groups`` is C times the number of groups with statistics
    of their own. The operations of a ``compiled`` step cannot be counted. Counting the GPU's kernels, which is done if
    ``profiled``, takes a good part of a second.
    """
    instruments: dict[str, Callable[[], dict[str, Any]]] = {
        "saved": lambda: saved(step, known, channels_and_groups),
        "peak memory": lambda: {"peak_bytes": peak_bytes(step, device)},
    }
    missing: list[str] = []
    if compiled:
        missing.append("operations, collectives: compiled code does not dispatch operations one by one")
    else:
        instruments["operations"] = lambda: operations(step)
    if device.type == "cuda":
        instruments["host synchronizations"] = lambda: {"host_synchronizations": host_synchronizations(step)}
        if profiled:
            instruments["kernels"] = lambda: kernels(step)
    else:
        missing.append("kernels, host synchronizations: CUDA only")
    found: dict[str, Any] = {}
    for name, measure in instruments.items():
        try:
            found |= measure()
        except Exception as error:  # the profiler and other instruments are not in every build of torch
            missing.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    return Costs(**found, missing="; ".join(missing))


def operations(step: Call) -> dict[str, Any]:
    with OperationCounter() as counter:
        step()
    return {name: getattr(counter, name) for name in ("operations", "collectives", "wire_bytes")}


class OperationCounter(TorchDispatchMode):
    """Counts dispatched operations without views, and apart from them collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.collectives = self.wire_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            if not name.startswith(("wait_tensor", "barrier", "monitored_barrier")):
                self.collectives += 1
                # The first argument of these holds the tensors to receive into.
                sent = args[1] if name.startswith(("allgather", "_allgather", "reduce_scatter_")) else args[0]
                self.wire_bytes += sum(t.nbytes for t in tree_leaves(sent) if isinstance(t, Tensor))
        elif not func.is_view:
            self.operations += 1
        return func(*args, **(kwargs or {}))


def saved(step: Call, known: Iterable[Tensor], channels_and_groups: int) -> dict[str, Any]:
    """What autograd keeps in a step. Each storage counts once.

    Those of ``known`` tensors do not count, nor do those that two steps share: they are kept once for all layers.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    first = _kept(step)
    second = _kept(step)  # while the first one's tensors are held, no address is used again
    amount = sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in second.items()
        if address not in ignored and address not in first
    )
    return {"saved_bytes": amount, "saved_numbers": amount / torch.float32.itemsize / channels_and_groups}


def _kept(step: Call) -> dict[int, Tensor]:
    """The tensors that autograd keeps in a step, by their storages' addresses."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return kept


def peak_bytes(step: Call, device: torch.device) -> int:
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
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((int(event.nbytes()) for event in events), initial=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the profiler's library writes to the stderr of the process, past ``sys.stderr``."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def host_synchronizations(step: Call) -> int:
    """How often the host waits for the GPU in a step, as counted by torch's ``set_sync_debug_mode``."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def kernels(step: Call) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with _quiet(), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events: Any = profile.events()
    times = [event.time_range.elapsed_us() for event in events if event.device_type.name == "CUDA"]
    return {"kernels": len(times), "kernel_seconds": sum(times) / 1e6}


@dataclass(frozen=True)
class Bandwidth:
    bytes_per_second: Spread  # bytes read plus bytes written of ``out.copy_(x)``
    tensor_bytes: int

    def seconds(self, shape: Shape, dtype: torch.dtype) -> float:
        """The memory limit of a step: its least time if all data is in main memory. Cached data can be faster."""
        return PASSES * shape.elements * dtype.itemsize / self.bytes_per_second.median


def measure_bandwidth(device: torch.device, *, rounds: int = 9, tensor_bytes: int | None = None) -> Bandwidth:
    """Time a copy between two tensors, each of ``tensor_bytes`` (default: :data:`COPY_BYTES`)."""
    size = tensor_bytes or COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds=rounds, device=device)["copy"]
    return Bandwidth(spread(2 * size / seconds for seconds in timing.samples), size)
