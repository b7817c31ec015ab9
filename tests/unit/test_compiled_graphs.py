"""torch.compile of each layer: one graph for each pass, and no more graphs for other batches than torch's layer has."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm

RAMPS: dict[str, Any] = {"warmup_steps": 0, "r_ramp_end": 2, "d_ramp_end": 2}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "sync": lambda: SyncBatchNorm(4),
    "sync, relu": lambda: SyncBatchNorm(4, momentum=None, activation="relu"),
    "sync, output": lambda: SyncBatchNorm(4, activation="leaky_relu", save="output"),
    "no statistics": lambda: SyncBatchNorm(4, affine=False, track_running_stats=False),
    "ghost": lambda: GhostBatchNorm(4, 2),
    "ghost, smaller": lambda: GhostBatchNorm(4, 4, remainder="smaller"),
    "ghost, sequential": lambda: GhostBatchNorm(4, 2, running_update="sequential"),
    "ghost, total": lambda: GhostBatchNorm(4, 2, running_update="total"),
    "renorm": lambda: BatchRenorm(4, **RAMPS),
    "ghost and renorm": lambda: BatchRenorm(4, ghost_batch_size=2, **RAMPS),
    "ghost and renorm, smaller": lambda: BatchRenorm(4, ghost_batch_size=4, remainder="smaller", **RAMPS),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
BATCHES = (4, 8, 6, 12, 10)
TORCHS_GRAPHS = 2
"""Of ``nn.BatchNorm2d`` for these batches: one for the first, and one for all others."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(n: int, seed: int) -> Tensor:
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


def train_both(layer: nn.Module, compiled: Any, sizes: tuple[int, ...]) -> None:
    """The compiled layer and an eager twin have the same outputs, gradients and buffers in each step."""
    twin = copy.deepcopy(layer)
    for step, n in enumerate(sizes):
        results = []
        for run, own in ((compiled, layer), (twin, twin)):
            x = batch(n, step).requires_grad_()
            y = run(x)
            inputs = [x, *own.parameters()]
            results.append((y.detach(), *torch.autograd.grad(y, inputs, batch(n, 99)), *own.buffers()))
        for found, expected in zip(*results, strict=True):
            # float64; a compiled graph may sum in another order.
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


class Counted:
    """A backend that counts the graphs of the forward and of the backward pass and runs torch's operations."""

    def __init__(self) -> None:
        self.graphs, self.forward, self.backward = 0, 0, 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        self.graphs += 1
        return aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)(graph, inputs)

    def _forward(self, graph: Any, inputs: Any) -> Any:
        self.forward += 1
        return graph.forward

    def _backward(self, graph: Any, inputs: Any) -> Any:
        self.backward += 1
        return graph.forward


def test_torchs_own_graphs() -> None:
    counted = Counted()
    layer = nn.BatchNorm2d(4).double()
    train_both(layer, torch.compile(layer, fullgraph=True, backend=counted), BATCHES)
    assert counted.graphs == TORCHS_GRAPHS


@each_layer
def test_graphs_for_batches_of_several_sizes(name: str) -> None:
    counted = Counted()
    layer = LAYERS[name]().double()
    train_both(layer, torch.compile(layer, fullgraph=True, backend=counted), BATCHES)
    assert counted.graphs <= TORCHS_GRAPHS
    assert counted.forward == counted.backward == counted.graphs


@pytest.mark.slow  # the inductor compiles C++
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_the_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with layers that are our operator and layers that are composed of torch's operations."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    chosen = ("sync, relu", "ghost, sequential", "ghost, total", "ghost and renorm")
    model = nn.Sequential(*(LAYERS[name]() for name in chosen)).double()
    train_both(model, torch.compile(model, fullgraph=True, backend="inductor"), (8, 8))
