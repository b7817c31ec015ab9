"""The kernels on a CUDA device: the same tests as in Triton's interpreter, and what only a device shows."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton", reason="a CPU build of torch does not bring Triton")

from device import DEVICE, no_synchronization, only_on_cuda
from triton_cases import *  # noqa: F403
from triton_cases import close, kernels, sample
from triton_finish_cases import *  # noqa: F403

from syncbn import GhostBatchNorm, SyncBatchNorm
from syncbn.functional import statistics
from syncbn.functional.normalize import Affine
from syncbn.functional.statistics import moments
from syncbn.kernels.dispatch import pick


@pytest.fixture
def device():
    return DEVICE


def make_layers():
    options = {"activation": "silu", "device": DEVICE}
    return SyncBatchNorm(6, **options), GhostBatchNorm(6, 4, **options)


def batch(seed, memory_format=torch.channels_last):
    tensors = (sample((8, 6, 5, 5), 3 * seed + i).to(DEVICE, memory_format=memory_format) for i in range(3))
    x, residual, dy = tensors
    return x.requires_grad_(), residual.requires_grad_(), dy


@only_on_cuda
def test_they_are_what_is_picked():
    assert pick(torch.ones(1, device=DEVICE), differentiable=False).name == "triton"


@only_on_cuda
@pytest.mark.parametrize("index", [0, 1], ids=["sync", "ghost"])
def test_the_host_never_waits(index):
    layer = make_layers()[index]
    x, residual, dy = batch(0)
    layer(x, residual).backward(dy)  # what is compiled or loaded once may wait
    with no_synchronization():
        for _ in range(2):
            layer(x, residual).backward(dy)
    assert layer.num_batches_tracked == 3


@only_on_cuda
@pytest.mark.parametrize("index", [0, 1], ids=["sync", "ghost"])
def test_capture_in_a_cuda_graph(index, monkeypatch):
    monkeypatch.undo()  # the graph allocates as it does without tests
    layer = make_layers()[index]
    x, residual, dy = batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x, residual).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    x.grad = residual.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, residual)
        y.backward(dy)
    reference = copy.deepcopy(layer)
    reference.zero_grad(set_to_none=True)
    for seed in range(1, 4):
        other, other_residual, _ = batch(seed)
        with torch.no_grad():
            x.copy_(other), residual.copy_(other_residual)
        graph.replay()
        expected = reference(other, other_residual)
        leaves = [other, other_residual, reference.weight, reference.bias]
        gradients = torch.autograd.grad(expected, leaves, dy)
        # The same kernels on the same numbers; sums over programs are added in no fixed order, in float64.
        equal = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(y, expected, **equal)
        for tensor, gradient in zip((x, residual, layer.weight, layer.bias), gradients, strict=True):
            torch.testing.assert_close(tensor.grad, gradient, **equal)
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(getattr(layer, name), buffer, **equal)


@only_on_cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "one plane", "few rows"])
def test_more_elements_than_an_int32_counts(layout, monkeypatch):
    monkeypatch.undo()
    shapes = {"one plane": (1, 2, 2**30 + 2**20), "few rows": (2**25 + 2**15, 65)}
    shape = shapes.get(layout, (8, 4, 2**13 + 2**8, 2**13))
    elements = torch.Size(shape).numel()
    assert elements > 2**31
    need = 3 * 2 * elements + 2**30
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free device memory")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=memory_format)
    x[-1, -1] = 3.0
    c = shape[1]
    each = elements // c
    marked = each // shape[0]
    sums = kernels.group_sums(x)
    expected = torch.tensor([each, *[each] * (c - 1), each + 2 * marked, *[each] * (c - 1), each + 8 * marked])
    torch.testing.assert_close(sums[0].cpu(), expected.double(), rtol=1e-9, atol=0)
    _, mean, var = moments(sums)
    affine = Affine(mean, torch.rsqrt(var + 1.0))
    y = kernels.normalize(x, affine)
    last = (3.0 - mean[0, -1]) * affine.invstd[0, -1]
    close(y[-1, -1].flatten()[-1], last.cpu(), torch.bfloat16, "y")
    close(y[0, 0].flatten()[:1], torch.zeros(1), torch.bfloat16, "y")
    del y
    dz, rest, sums = kernels.backward_sums(x, x, affine)
    torch.testing.assert_close(sums[0, 0, -1].item(), float(each + 2 * marked), rtol=1e-6, atol=0)
    means = torch.zeros(1, 2, c, dtype=torch.float64, device=DEVICE)
    dx = kernels.grad_input(dz, x, affine, means, epilogue=rest)
    close(dx[-1, -1].flatten()[-1], 3 * affine.invstd[0, -1].cpu(), torch.bfloat16, "dx")


@only_on_cuda
def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    x = sample((4, 3, 5, 5), 0)
    found = kernels.group_sums(x.to("cuda:1"))
    torch.testing.assert_close(found.cpu(), statistics.group_sums(x.double()), rtol=1e-6, atol=1e-6)
    assert torch.cuda.current_device() == 0
