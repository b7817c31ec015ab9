"""What a profiler shows of a layer: an event around its forward pass, and one around its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.profiler import record_function

_PYTHON_NODES = ("SyncedNormBackward", "LocalNormBackward")
_CPU_NODE = "syncbn::"  # in the name of the CPU operator's node, which C++ makes


def recorded(name: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(*args)`` in an event called ``name``. Its backward pass will be in one called ``name + ", backward"``.

    A backward pass of several operations has no event of its own: that of evaluation, and that under transforms of
    torch.func. Call this only while a profiler records, since events take time.
    """
    with record_function(name):
        y = function(*args)
    node = y.grad_fn
    if node is not None and (node.name() in _PYTHON_NODES or _CPU_NODE in node.name()):
        _record(node, f"{name}, backward")
    return y


def _record(node: Node, name: str) -> None:
    """Put each run of ``node`` into an event."""
    running: list[record_function] = []

    def start(grad_outputs: Any) -> None:
        event = record_function(name)
        event.__enter__()
        running.append(event)

    def stop(grad_inputs: Any, grad_outputs: Any) -> None:
        running.pop().__exit__(None, None, None)

    node.register_prehook(start)
    node.register_hook(stop)
