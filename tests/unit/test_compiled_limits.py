"""Where the compiled CPU kernels, which see addresses alone, could be led astray."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cpu_cases import compiled, sample, tolerance
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.functional import finish as finish_twin
from syncbn.functional import statistics
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.normalize import Affine
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running
from syncbn.functional.statistics import ONE_GROUP, Groups
from syncbn.kernels.dispatch import REFERENCE, pick

cpu = compiled()


# -- what they cannot read ---------------------------------------------------------------------------------------------


def negated(t):
    """The same values with the bit that says that those in memory are their negatives."""
    lazy = torch.complex(t, -t).conj().imag
    assert lazy.is_neg()
    return lazy


def test_lazily_negated_tensors():
    x, dy, residual = (sample((4, 3, 5, 5), seed) for seed in range(3))
    weight, bias = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.2, -0.1])
    results = []
    for change in (torch.clone, negated):
        layer = SyncBatchNorm(3, activation="relu")
        layer.weight, layer.bias = (torch.nn.Parameter(change(t)) for t in (weight, bias))
        given, added = (change(t).requires_grad_() for t in (x, residual))
        y = layer(given, added)
        grads = torch.autograd.grad(y, (given, added, layer.weight, layer.bias), change(dy))
        results.append((y, *grads, layer.running_mean))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance(torch.float32, 16))


@pytest.mark.parametrize("short", ["running_mean", "running_var", "weight", "bias"])
def test_too_few_values(short):
    """Nothing is read or written past a tensor's end."""
    layer = SyncBatchNorm(4096)
    few = torch.ones(4)
    setattr(layer, short, torch.nn.Parameter(few) if short in ("weight", "bias") else few)
    with pytest.raises(RuntimeError, match="size"):
        layer(torch.randn(8, 4096))


def test_a_layer_on_another_device():
    """Only its shape is there."""
    for layer in (SyncBatchNorm(3, device="meta"), SyncBatchNorm(3, affine=False, device="meta")):
        with pytest.raises((RuntimeError, NotImplementedError)):
            layer(torch.randn(4, 3, 5))
    layer = SyncBatchNorm(3)
    layer.num_batches_tracked = layer.num_batches_tracked.float()
    layer(torch.randn(4, 3, 5))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual", "grad_output", "running_mean"])
@pytest.mark.parametrize("offset", [0, 3])
def test_freed_memory(name, offset):
    """A tensor whose memory is gone (a sharded parameter's, say) is neither read nor taken for one that is absent."""

    def make(*shape):
        return torch.ones(offset + math.prod(shape)).as_strided(shape, torch.empty(shape).stride(), offset)

    layer = SyncBatchNorm(3, activation="relu")
    layer.weight, layer.bias = (torch.nn.Parameter(make(3)) for _ in range(2))
    layer.running_mean = make(3)
    values = {key: make(4, 3, 5) for key in ("x", "residual", "grad_output")} | layer.state_dict(keep_vars=True)
    x, residual, grad_output = values["x"].requires_grad_(), values["residual"], values["grad_output"]
    if name == "grad_output":
        y = layer(x, residual)
        grad_output.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="freed"):
            y.backward(grad_output)
    else:
        values[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="freed"):
            layer(x, residual)


def test_gradients_that_are_all_zero():
    """torch has tensors of zeros without memory, in forward-mode differentiation."""
    x = sample((4, 3, 5), 0).requires_grad_()
    layer = SyncBatchNorm(3)
    (found,) = torch.autograd.grad(layer(x), x, torch._efficientzerotensor(4, 3, 5))
    assert torch.equal(found, torch.zeros_like(x))


def test_batched_gradients():
    """Of the older vmap, whose tensors have no memory and do not say so."""
    x = sample((4, 3, 5), 0, torch.float64).requires_grad_()
    for layer in (SyncBatchNorm(3), GhostBatchNorm(3, 2), SyncBatchNorm(3, activation="silu")):
        y = layer.double()(x)
        several = torch.stack([sample(y.shape, seed, torch.float64) for seed in (1, 2, 3)])
        inputs = (x, layer.weight, layer.bias)
        found = torch.autograd.grad(y, inputs, several, is_grads_batched=True, retain_graph=True)
        for i, one in enumerate(several):
            for batched, expected in zip(found, torch.autograd.grad(y, inputs, one, retain_graph=True), strict=True):
                torch.testing.assert_close(batched[i], expected)


def test_parameters_are_asked_for_once():
    """A parametrization that draws anew gives the backward pass what the forward pass had."""

    class Draw(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = 0

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            self.drawn += 1
            return weight * self.drawn

    for options in ({}, {"save": "output"}, {"activation": "relu"}):
        layer, draw = SyncBatchNorm(3, **options), Draw()
        parametrize.register_parametrization(layer, "weight", draw, unsafe=True)
        before = draw.drawn
        x = torch.randn(4, 3, 5, requires_grad=True)
        layer(x).sum().backward()
        assert draw.drawn == before + 1


def test_running_statistics_that_are_no_buffers():
    x, expected = torch.randn(4, 3, 5), SyncBatchNorm(3)
    expected(x)
    layers = [SyncBatchNorm(3) for _ in range(3)]
    layers[0].running_mean = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    parametrize.register_parametrization(layers[1], "running_mean", torch.nn.Identity())
    del layers[2].running_mean
    layers[2].running_mean = torch.zeros(3)
    for layer in layers:
        layer(x)
        assert torch.equal(layer.running_mean, expected.running_mean)


def test_tensors_of_another_shape():
    """Nothing is broadcast: the kernels would read past the end."""
    x, row = sample((4, 3, 5), 0), sample((1, 3, 5), 1)
    affine = Affine(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="size"):
        cpu.normalize(x, affine, ONE_GROUP, Epilogue(row, "relu", 0.0))
    with pytest.raises(RuntimeError, match="size"):
        cpu.backward_sums(row, x, affine, ONE_GROUP, NO_EPILOGUE)
    with pytest.raises(RuntimeError, match="size"):
        cpu.normalize(x, affine._replace(mean=affine.mean[:, :2]), ONE_GROUP, NO_EPILOGUE)
    with pytest.raises(RuntimeError, match="size"):
        cpu.finish(torch.zeros(2, 4).double(), 1e-5, None)


def test_statistics_in_float32():
    x, dy = sample((4, 3, 5), 0), sample((4, 3, 5), 1)
    affine = Affine(torch.full((1, 3), 0.5), torch.full((1, 3), 2.0))
    close = tolerance(torch.float32)
    torch.testing.assert_close(cpu.normalize(x, affine, ONE_GROUP, NO_EPILOGUE), (x - 0.5) * 2, **close)
    _, _, sums = cpu.backward_sums(dy, x, affine, ONE_GROUP, NO_EPILOGUE)
    expected = (dy.double() * (x - 0.5) * 2).sum((0, 2))
    torch.testing.assert_close(sums[0, 1].double(), expected, rtol=1e-6, atol=1e-6)
    means = torch.zeros(1, 2, 3)
    torch.testing.assert_close(cpu.grad_input(dy, x, affine, means, ONE_GROUP, NO_EPILOGUE), dy * 2, **close)


# -- what others have to see -------------------------------------------------------------------------------------------


def test_the_update_is_seen_by_autograd():
    layer, factor = SyncBatchNorm(3), torch.ones(3, requires_grad=True)
    product = (layer.running_mean * factor).sum()
    layer(torch.randn(4, 3, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    before = layer.running_mean._version
    layer.track_running_stats = False
    layer(torch.randn(4, 3, 5))
    assert layer.running_mean._version == before


def test_buffers_from_inference_mode():
    with torch.inference_mode():
        layer = SyncBatchNorm(3)
        layer(torch.randn(4, 3, 5))
        assert layer.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes, which the trace is for
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")  # it is in use all the same
def test_a_traced_layer_is_no_constant():
    layer = SyncBatchNorm(3, track_running_stats=False)
    traced = torch.jit.trace(copy.deepcopy(layer), torch.randn(4, 3, 5), check_trace=False)
    x = 5 + 3 * torch.randn(4, 3, 5)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)


def test_the_twins_serve_what_is_watched():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 3)
    with torch.no_grad():
        assert pick(x, differentiable=False).name == "cpu"
        with Watch():
            assert pick(x, differentiable=False) is REFERENCE
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert pick(x, differentiable=False) is REFERENCE


# -- extreme values ----------------------------------------------------------------------------------------------------

FAR_OUT = [0.0, -0.0, 1e-30, -1.0, 20.0, -20.0, 87.0, -86.0, 89.0, -89.0, -104.0, 710.0, -708.5, -1e4, 1e30, -1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silu_far_out(dtype):
    z = torch.tensor([*FAR_OUT, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    z = z.view(-1, 1, 1).expand(-1, 1, 33).contiguous().requires_grad_()
    expected = F.silu(z)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    epilogue, means = Epilogue(None, "silu", 0.0), torch.zeros(1, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        found = cpu.normalize(z, Affine(zero, one), ONE_GROUP, epilogue)
        grad = cpu.grad_input(torch.ones_like(z), z, Affine(zero, one), means, ONE_GROUP, epilogue)
    # Subnormal results are 0 here; what is relative to them is not compared.
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).smallest_normal, "equal_nan": True}
    finite = len(FAR_OUT)
    torch.testing.assert_close(found[:finite], expected[:finite].detach(), **close)
    torch.testing.assert_close(grad[:finite], expected_grad[:finite], **close)
    assert (found[finite] == float("inf")).all()
    assert torch.isnan(torch.cat((found[-1], grad[-1]))).all()


def test_float16_without_subnormal_floats():
    """float16's own smallest numbers are read though the process flushes those of float32 to 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        x = torch.full((1, 2, 64), 2.0**-24, dtype=torch.float16)
        sums = cpu.group_sums(x, ONE_GROUP)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(sums[0, 1:3], torch.full((2,), 64 * 2.0**-24, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 19), (64, 19, 1, 1), (200, 8)])
def test_one_value_a_sample_is_summed_in_double(dtype, shape):
    """As in the twin: neither the square of 1e20 nor a mean of 1e4 costs anything."""
    for scale, loc in ((1e20, 0.0), (1.0, 1e4)):
        x = (sample(shape, 0, torch.float64, loc) * scale).to(dtype)
        for groups in (ONE_GROUP, Groups(torch.arange(len(x)) % 3, 3)):
            found, expected = cpu.group_sums(x, groups), statistics.group_sums(x.double(), groups)
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14 * scale * len(x))


def test_limits_need_not_be_integers():
    sums, results = statistics.group_sums(sample((6, 3, 4), 0, torch.float64, 2.0)), []
    for finish in (cpu.finish, finish_twin.finish):
        limits = Limits(3.0, 5.0, 2.5, 20.5, 10.0)
        running = Running(torch.ones(3), torch.ones(3), torch.tensor(7), torch.tensor(0), 0.1, limits=limits)
        results.append(finish(sums, 1e-5, running))
    torch.testing.assert_close(results[0].r, results[1].r)
    torch.testing.assert_close(results[0].d, results[1].d)
    layer = BatchRenorm(3, warmup_steps=1e3, r_ramp_end=1e4, d_ramp_end=1e4)
    layer(torch.randn(4, 3, 5))
    assert layer.num_batches_tracked == 1
