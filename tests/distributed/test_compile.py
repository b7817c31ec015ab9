"""torch.compile(fullgraph=True) of synchronized models, forward and backward, against the same models run eagerly."""

from __future__ import annotations

import copy
import datetime
import importlib
import os
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.compat import import_torchvision


def check_close(found, expected, name):
    """float64, twenty layers: a compiled graph sums in another order, no more. Relative to the largest element."""
    bound = 1e-11 * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound, msg=lambda m: f"{name}: {m}")


def train_compiled(model, shape, backend, steps=2):
    """Both models take the same steps of gradient descent; every tensor is compared after each."""
    twin = copy.deepcopy(model)
    # Compiled afresh, whatever ran before: what torch cached would hide a failure to compile.
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(10 + dist.get_rank())
    for _ in range(steps):
        x = torch.randn(shape, dtype=torch.float64)
        results = []
        for module, run in ((model, compiled), (twin, twin)):
            inputs = x.clone().requires_grad_()
            y = run(inputs)
            y.square().sum().backward()
            results.append((y.detach(), inputs.grad, dict(module.named_parameters()), dict(module.named_buffers())))
        (y, dx, parameters, buffers), (expected, expected_dx, twins, twin_buffers) = results
        check_close(y, expected, "output")
        check_close(dx, expected_dx, "input gradient")
        for name, buffer in twin_buffers.items():
            check_close(buffers[name], buffer, name)
        for name, parameter in twins.items():
            check_close(parameters[name].grad, parameter.grad, name)
            with torch.no_grad():
                for tensor in (parameters[name], parameter):
                    tensor -= 1e-3 * tensor.grad
                    tensor.grad = None
    torch.compiler.reset()
    return {name: buffer.item() for name, buffer in model.named_buffers() if "num_batches_tracked" in name}


def make_layer(name, options):
    layer = getattr(syncbn, name)(4, **options, dtype=torch.float64)
    if name == "BatchRenorm":
        layer.num_batches_tracked.fill_(3)
    return layer


def train_small_model(name, options, sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make_layer(name, options), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    return train_compiled(model.double(), (sizes[dist.get_rank()], 3, 6, 6), "aot_eager")


@pytest.mark.works_with("torch", "`torch.compile(fullgraph=True)` on 2 processes: each layer, forward and backward")
@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("SyncBatchNorm", {}, (4, 3)),
        ("SyncBatchNorm", {"momentum": None, "sync_group_size": 2}, (3, 0)),
        ("GhostBatchNorm", {"ghost_batch_size": 2}, (4, 4)),
        ("GhostBatchNorm", {"ghost_batch_size": 2, "sync": True, "running_update": "sequential"}, (4, 4)),
        (
            "GhostBatchNorm",
            {"ghost_batch_size": 2, "sync": True, "remainder": "smaller", "max_ghost_groups": 3},
            (5, 2),
        ),
        ("BatchRenorm", {"sync": True, "warmup_steps": 2, "r_ramp_end": 5, "d_ramp_end": 5}, (4, 3)),
        (
            "BatchRenorm",
            {"sync": True, "ghost_batch_size": 2, "warmup_steps": 2, "r_ramp_end": 5, "d_ramp_end": 5},
            (4, 4),
        ),
    ],
    ids=str,
)
def test_each_layer_in_one_graph(pools, name, options, sizes):
    steps = 4 if options.get("running_update") == "sequential" else 2
    first = 3 if name == "BatchRenorm" else 0
    assert pools(2).run(train_small_model, name, options, sizes) == [{"1.num_batches_tracked": first + steps}] * 2


def count_graphs(name, options):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    run = torch.compile(make_layer(name, options), fullgraph=True, backend=backend)
    for n in (4, 8, 6, 12, 10):
        run(torch.randn(n, 4, 3, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    torch.compiler.reset()
    return len(graphs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SyncBatchNorm", {}),
        ("GhostBatchNorm", {"ghost_batch_size": 2, "sync": True}),
        ("GhostBatchNorm", {"ghost_batch_size": 2, "sync": True, "max_ghost_groups": 8}),
        ("BatchRenorm", {"ghost_batch_size": 2, "sync": True}),
    ],
    ids=str,
)
def test_batches_of_several_sizes_need_no_more_graphs_than_torchs_layer(pools, name, options):
    """One for the first batch, and one for all others: as tests/unit/test_compiled_graphs.py has it for torch's."""
    found = pools(2).run(count_graphs, name, options)
    assert found[0] == found[1] <= 2


def single_value():
    layer = torch.compile(syncbn.SyncBatchNorm(3), fullgraph=True, backend="aot_eager")
    try:
        layer(torch.ones(1 if dist.get_rank() == 0 else 0, 3))
    except RuntimeError as error:
        return str(error)
    finally:
        torch.compiler.reset()


def test_single_value_raises_on_every_rank(pools):
    """As eagerly, but a compiled graph raises what torch's own assertions do."""
    for message in pools(2).run(single_value):
        assert "SyncBatchNorm" in message
        assert "one value per channel over all processes" in message


def train_resnet(cache):
    torch.manual_seed(0)
    # Ranks do not finish compiling at the same time, and a collective waits for the last.
    group = dist.new_group(timeout=datetime.timedelta(minutes=5))
    model = syncbn.convert(import_torchvision("models").resnet18(num_classes=4), "sync", process_group=group)
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()) == 20
    # One cache for both ranks: the second to come to a kernel finds it compiled.
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}):
        steps = train_compiled(model.double(), (3, 3, 32, 32), "inductor")
    # Or the worker would wait for the compiler's own processes when it ends.
    importlib.import_module("torch._inductor.async_compile").shutdown_compile_workers()
    return steps


@pytest.mark.works_with("torch", "`torch.compile` by inductor: ResNet-18 in one graph on 2 processes")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_resnet18_in_one_graph(pools, tmp_path):
    results = pools(2).run(train_resnet, str(tmp_path), timeout=540)
    assert all(set(steps.values()) == {2} for steps in results)
