"""The CPU's operator: in compiled graphs and exported programs, and how its library comes about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import compiled, sample
from torch.utils.checkpoint import checkpoint

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.kernels.cpu import build, library

LAYERS = {
    "sync": lambda: SyncBatchNorm(3, activation="relu"),
    "ghost": lambda: GhostBatchNorm(3, 2, activation="silu"),
    "renorm": lambda: BatchRenorm(3, warmup_steps=0, r_ramp_end=2, d_ramp_end=2),
    "output": lambda: SyncBatchNorm(3, activation="leaky_relu", save="output"),
    "no parameters": lambda: SyncBatchNorm(3, affine=False, track_running_stats=False),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    return compiled()


@pytest.fixture
def graphs():
    """A list that receives the operations of the graphs which torch.compile makes."""
    torch.compiler.reset()
    return []


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@each_layer
def test_a_compiled_graph_has_one_operator(kind, graphs):
    """The results are those of eager mode, to the bit where it is the same operator, for every size of the batch."""

    def backend(graph, inputs):
        graphs.append(targets(graph))
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    eager, layer = LAYERS[kind](), LAYERS[kind]()
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 6, 8):
        before, results = len(graphs), []
        for module, own in ((eager, eager), (graph, layer)):
            x = sample((n, 3, 5, 5), n).requires_grad_()
            residual = None if kind in ("output", "renorm") else sample(x.shape, 1).requires_grad_()
            y = module(x) if residual is None else module(x, residual)
            inputs = [t for t in (x, residual, *own.parameters()) if t is not None]
            results.append((y.detach(), *torch.autograd.grad(y, inputs, sample(x.shape, 2)), *own.buffers()))
        assert torch.equal(results[0][0], results[1][0])
        for a, b in zip(*results, strict=True):
            # Where the backward pass is composed of torch's operations (`save="output"`), they are those of the twins.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert len(graphs) == before or n == 4
    assert graphs[-1].count("syncbn.batch_norm.default") == 1


def test_compiled_in_half_precision_with_an_epilogue(graphs):
    layer = SyncBatchNorm(4, activation="silu")
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.bfloat16, torch.float16):
        x, dy = sample((3, 4, 5), 0, dtype).requires_grad_(), sample((3, 4, 5), 1, dtype)
        found, expected = (torch.autograd.grad(module(x, x), x, dy)[0] for module in (graph, layer))
        assert torch.equal(found, expected)


@pytest.mark.works_with("torch", "`torch.export` of layers in training: no operator of this package")
def test_an_exported_program_needs_no_operator_of_ours():
    """It can be loaded where this package is not installed."""
    for layer in (SyncBatchNorm(3), GhostBatchNorm(3, 2)):
        program = torch.export.export(layer, (sample((4, 3, 5), 0),))
        assert not [target for target in targets(program.graph_module) if "syncbn" in target]
        x = sample((4, 3, 5), 1)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_activation_checkpointing(kind, reentrant):
    """The forward pass is repeated by the same operator."""
    if kind == "renorm":
        pytest.skip("the repeated pass would have other corrections, as the docstring says")
    results = []
    for save_memory in (False, True):
        layer, x = LAYERS[kind](), sample((4, 3, 5), 0).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if save_memory else layer(x)
        y.backward(sample(y.shape, 1))
        results.append((y.detach(), x.grad, *(p.grad for p in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ghost_groups_made_in_inference_mode_do_not_serve_training():
    """The groups of a size of batch are made once. Those of inference mode cannot be saved for a backward pass."""
    layer, x = GhostBatchNorm(3, 5), sample((10, 3), 0)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


# -- its library -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    """The library for another torch is kept in the user's cache."""
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.operators().parent == build.FOLDER
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert build.operators().parent == tmp_path / "syncbn"
    assert build.operators().name.endswith("-torch2.99.0.so")


@pytest.mark.parametrize("error", [RuntimeError("no home"), NotImplementedError("no flock"), OSError("full")], ids=repr)
def test_a_library_that_cannot_be_kept_leaves_the_slower_code(monkeypatch, error):
    def raises():
        raise error

    monkeypatch.setattr(build, "operators", raises)
    with pytest.raises(ImportError, match=str(error)):
        library.load.__wrapped__()


USE = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s")
import torch
import syncbn.kernels.cpu.build as build
from pathlib import Path
build.operators = lambda: Path(sys.argv[1]) / "operators.so"
import syncbn
print(type(syncbn.SyncBatchNorm(3)(torch.ones(4, 3, requires_grad=True)).grad_fn).__name__)
"""


def use(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", USE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env={**os.environ, **environment})


@pytest.mark.slow  # it compiles the operators
def test_the_operators_are_compiled_when_they_are_first_used(tmp_path):
    """By one of two processes that start together; the other waits for it."""
    command = [sys.executable, "-c", USE, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=250) for process in both]
    assert [out.strip() for out, _ in outputs] == ["CppFunction"] * 2, outputs
    assert sum("compiling the CPU operators" in errors for _, errors in outputs) >= 1
    assert [path.name for path in tmp_path.glob("*.so")] == ["operators.so"]
    assert "compiling" not in use(tmp_path).stderr


def test_without_a_compiler_the_twins_serve(tmp_path):
    done = use(tmp_path, CXX="false")
    assert done.stdout.strip() == "SyncedNormBackward", done.stderr
    assert done.stderr.count("slower torch operations are used") == 1
    assert not list(tmp_path.glob("*.so"))
