"""The layers on CUDA: exact against float64 on the CPU, without a host synchronization, and capturable."""

from __future__ import annotations

import copy
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import syncbn

LAYERS = {
    "sync": lambda c: syncbn.SyncBatchNorm(c),
    "ghost": lambda c: syncbn.GhostBatchNorm(c, 2),
    "renorm": lambda c: syncbn.BatchRenorm(c, warmup_steps=0, r_ramp_end=4, d_ramp_end=4),
}
SHAPES = [(8, 6), (8, 6, 7), (8, 6, 5, 4), (8, 6, 3, 4, 2), (6, 33, 17, 13)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def prepared(kind, channels, device, wide):
    layer = LAYERS[kind](channels).to(device=device, dtype=wide)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2.0, channels))
        layer.bias.copy_(torch.linspace(-1.0, 1.0, channels))
    return layer


def steps(layer, shape, dtype, memory_format=torch.contiguous_format, number=3):
    """Outputs and gradients of a few training steps, as float64 on the CPU."""
    device = layer.weight.device
    found = []
    for step in range(number):
        generator = torch.Generator().manual_seed(step)
        x = (torch.randn(shape, generator=generator) + 3).to(dtype)
        dy = torch.randn(shape, generator=generator).to(dtype)
        wide = x.double() if layer.weight.dtype == torch.float64 else x
        x = wide.to(device).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        y.backward(dy.to(device, y.dtype))
        assert y.stride() == x.stride()
        found += [y.detach().double().cpu(), x.grad.double().cpu()]
    found += [p.grad.double().cpu() for p in layer.parameters()]
    return found, [b.double().cpu() for b in layer.buffers()]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64_on_the_cpu(kind, shape, dtype):
    truth, truth_buffers = steps(prepared(kind, shape[1], "cpu", torch.float64), shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found, buffers = steps(prepared(kind, shape[1], "cuda", wide), shape, dtype)
    # A few roundings of the arithmetic's dtype, one of the output's own; sums over the batch grow with its terms.
    eps = max(torch.finfo(dtype).eps, 16 * torch.finfo(wide).eps)
    for mine, true in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=4 * eps, atol=16 * eps)
    for mine, true in zip(buffers, truth_buffers, strict=True):
        torch.testing.assert_close(mine, true, rtol=64 * torch.finfo(wide).eps, atol=64 * torch.finfo(wide).eps)


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_last(kind):
    plain, _ = steps(prepared(kind, 6, "cuda", torch.float32), (8, 6, 5, 4), torch.float32)
    last, _ = steps(prepared(kind, 6, "cuda", torch.float32), (8, 6, 5, 4), torch.float32, torch.channels_last)
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_variance_far_from_zero():
    x = (torch.randn(16, 8, 32, 32, generator=torch.Generator().manual_seed(0)) + 1e4).cuda()
    layer = syncbn.SyncBatchNorm(8, momentum=1.0).cuda()
    layer(x)
    torch.testing.assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_host_synchronization(kind):
    layer = prepared(kind, 8, "cuda", torch.float32)
    x = torch.randn(8, 8, 4, 4, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # the allocator and the libraries make themselves ready, which may wait
    torch.cuda.synchronize()
    before = layer.num_batches_tracked.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.num_batches_tracked.item() == before.item() + 1


@pytest.mark.parametrize("kind", LAYERS)
def test_capture_in_a_graph(kind):
    layer = prepared(kind, 8, "cuda", torch.float32)
    eager = copy.deepcopy(layer)
    x = torch.randn(8, 8, 4, 4, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up on a side stream, as capture asks for
        for _ in range(2):
            torch.autograd.grad(layer(x).square().sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
    graph.replay()
    for _ in range(3):  # two of warm-up, one replay: a capture runs nothing
        expected = eager(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(layer.running_var, eager.running_var)
    assert layer.num_batches_tracked.item() == 3


def test_nonfinite_batch_never_reaches_the_buffers():
    layer = syncbn.SyncBatchNorm(4).cuda()
    layer(torch.full((2, 4, 3), float("inf"), device="cuda"))
    assert torch.isfinite(layer.running_var).all()
    assert (layer.num_batches_tracked.item(), layer.num_nonfinite_batches.item()) == (0, 1)


def _rank(rank, world, backend, folder, results):
    torch.cuda.set_device(0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        sizes = (3, 5)[:world]
        x = torch.randn(sum(sizes), 4, 6, 5, generator=torch.Generator().manual_seed(0))
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        layer = syncbn.SyncBatchNorm(4, process_group=list(range(world))).cuda()
        mine = x[rows].cuda().requires_grad_()
        y = layer(mine)
        y.square().sum().backward()
        torch.save([y.detach().cpu(), mine.grad.cpu(), layer.running_var.cpu()], f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "world"), [("nccl", 1), ("gloo", 2)])
def test_several_ranks_on_one_gpu(backend, world):
    """NCCL wants a GPU for each rank, so it is alone in its group here; gloo moves CUDA tensors for two."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, backend, folder, folder), nprocs=world)
        parts = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
    sizes = (3, 5)[:world]
    x = torch.randn(sum(sizes), 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    truth = torch.nn.BatchNorm2d(4).double()
    y = truth(x)
    y.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}  # float32 arithmetic, a few roundings
    torch.testing.assert_close(torch.cat([p[0] for p in parts]).double(), y.detach(), **close)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]).double(), x.grad, **close)
    for part in parts:
        torch.testing.assert_close(part[2].double(), truth.running_var, **close)
