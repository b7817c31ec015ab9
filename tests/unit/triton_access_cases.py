"""In Triton's interpreter: planted faults are found, and launches and bytes are those that are predicted."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_accesses import recorded
from triton_traffic import KERNELS, Traffic, predicted

from syncbn import GhostBatchNorm
from syncbn.kernels.dispatch import cuda


@triton.jit
def copy_kernel(x, y, number, stride, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * stride, at < number), at < number)


@triton.jit
def turn_kernel(x, y, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + at, tl.load(y + (BLOCK - 1 - at)))


@triton.jit
def sum_kernel(x, total, READ: tl.constexpr):
    value = tl.load(x + tl.program_id(0))
    if READ:
        value += tl.load(total)
    tl.atomic_add(total, value)


def test_what_is_right():
    x, y = torch.arange(10.0), torch.empty(10)
    with recorded() as launches:
        copy_kernel[(3,)](x, y, 10, 1, 4, BLOCK=4)
        turn_kernel[(1,)](x, torch.empty(16), True, BLOCK=2)
        sum_kernel[(3,)](x, torch.zeros(1), False)
    assert torch.equal(y, torch.arange(10.0))
    assert [launch.kernel for launch in launches] == ["copy_kernel", "turn_kernel", "sum_kernel"]
    assert (launches[0].elements_of("load", x), launches[0].elements_of("store", y)) == (10, 10)
    assert (launches[0].bytes_of("load"), launches[0].bytes_of("store")) == (40, 40)


FAULTS = {
    "read past the end": ("a load .* outside", lambda x: copy_kernel[(3,)](x[:9], torch.empty(10), 10, 1, 4, BLOCK=4)),
    "written past the end": ("a store .* outside", lambda x: copy_kernel[(3,)](x, torch.empty(9), 10, 1, 4, BLOCK=4)),
    "read from a gap": ("a load .* outside", lambda x: copy_kernel[(1,)](x[::2], torch.empty(5), 5, 1, 4, BLOCK=8)),
    "written twice": ("a program stores", lambda x: copy_kernel[(3,)](x, torch.empty(10), 10, 1, 3, BLOCK=4)),
    "no barrier": ("without a barrier", lambda x: turn_kernel[(1,)](x, torch.empty(16), False, BLOCK=2)),
    "read sum": ("a sum is read", lambda x: sum_kernel[(3,)](x, torch.zeros(1), True)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    message, run = FAULTS[fault]
    with pytest.raises(AssertionError, match=message), recorded():
        run(torch.arange(10.0))


# -- launches and bytes ------------------------------------------------------------------------------------------------

INPUTS = {
    "images": ((6, 7, 9, 11), torch.float32, False),
    "images, channels_last": ((6, 7, 9, 11), torch.bfloat16, True),
    "few positions, channels_last": ((8, 20, 3, 3), torch.float32, True),
    "(N, C)": ((40, 9), torch.float64, False),
}


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "add, relu"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", INPUTS)
def test_launches_and_bytes_are_as_predicted(name, groups, fused, monkeypatch):
    shape, dtype, channels_last = INPUTS[name]
    monkeypatch.setattr("syncbn.kernels.dispatch._compiled", lambda x: cuda())
    options = {"activation": "relu"} if fused else {}
    layer = GhostBatchNorm(shape[1], shape[0] // groups, **options)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, dy = (torch.randn(shape).to(dtype, memory_format=memory_format) for _ in range(3))
    leaves = [t.requires_grad_() for t in ((x, residual) if fused else (x,))]
    with recorded() as launches:
        y = layer(*leaves)
        forward = len(launches)
        torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], dy)
    names = [launch.kernel for launch in launches]
    assert tuple(names[:forward]) == KERNELS["forward"]
    assert tuple(names[forward:]) == KERNELS["backward"]
    found = {each.kernel: Traffic(each.bytes_of("load"), each.bytes_of("store", "add")) for each in launches}
    assert found == predicted(shape, dtype, groups, fused, fused)
    # No element of x is read twice in a pass.
    reads = [each.elements_of("load", x) for each in launches if each.holds(x)]
    assert reads == [x.numel()] * 4
