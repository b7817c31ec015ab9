"""What the short ways of the CPU must not change: each layer and size takes another of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm

LAYERS = {
    "sync": SyncBatchNorm,
    "ghost": lambda c, **o: GhostBatchNorm(c, 4, **o),
    "renorm": lambda c, **o: BatchRenorm(c, warmup_steps=0, r_ramp_end=0, d_ramp_end=0, **o),
    "relu": lambda c, **o: SyncBatchNorm(c, activation="relu", **o),
}
SHAPES = {"mlp": (8, 6), "small": (8, 6, 5, 5), "large": (8, 6, 120, 120), "sequence": (8, 6, 50)}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_format = pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])


def sample(shape, seed=0, dtype=torch.float32, loc=0.0, last=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).add(loc).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def truth(layer):
    """The layer in float64, whose parts the other tests compare with torch's."""
    return copy.deepcopy(layer).double()


@each_format
@each_shape
@each_layer
def test_float32_is_near_float64(make, shape, last):
    layer = make(shape[1])
    exact = truth(layer)
    x, dy = sample(shape, last=last), sample(shape, 1) + 1
    results = []
    for module, leaf in ((layer, x.clone().requires_grad_()), (exact, x.double().requires_grad_())):
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy.to(leaf.dtype)), *module.buffers()])
    assert results[0][0].stride() == results[0][1].stride() == x.stride()
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        # Some roundings of values of up to 10; the parameters' gradients are sums of as many of them as there are rows.
        bound = 2e-6 * max(1.0, expected.abs().max().item()) * (4 if index < 2 else x[:, 0].numel() ** 0.5)
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
@each_format
@each_shape
@pytest.mark.parametrize("name", ["sync", "ghost"])
def test_half_precision_is_rounded_once(name, shape, last, options, dtype):
    layer = LAYERS[name](shape[1], **options)
    x = sample(shape, dtype=dtype, loc=3.0, last=last)
    expected = truth(layer)(x.double())
    y = layer(x)
    assert y.dtype == dtype
    # Half a unit in the last place, and the float32 arithmetic before it.
    assert ((y.double() - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs().clamp(min=0.5)).all()


@each_shape
@each_layer
def test_hooks_run_once_in_a_second_derivative(make, shape):
    results = []
    for create_graph in (False, True):
        layer = make(shape[1], dtype=torch.float64)
        x = sample(shape, dtype=torch.float64).requires_grad_()
        for tensor in (x, layer.weight):
            tensor.register_hook(lambda g: 2 * g)
        results.append(torch.autograd.grad(layer(x).pow(3).sum(), [x, layer.weight], create_graph=create_graph))
    for once, recorded in zip(*results, strict=True):
        torch.testing.assert_close(recorded, once, rtol=1e-9, atol=1e-9)


@each_format
@each_shape
@each_layer
def test_another_default_device(make, shape, last):
    """Tensors that the kernels make are where the input is."""
    layer, x = make(shape[1]), sample(shape, last=last).requires_grad_()
    with torch.device("meta"):
        y = layer(x)
        y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20, 3e38])
@each_format
@each_shape
@each_layer
def test_nothing_but_finite_values_reaches_the_buffers(make, shape, last, bad):
    layer, x = make(shape[1]), sample(shape, last=last)
    x[1, 2] = bad
    layer(x)
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()
    assert (layer.num_batches_tracked == 0) == (layer.num_nonfinite_batches == 1)


@each_shape
def test_tracing_with_real_tensors(shape):
    layer, x = SyncBatchNorm(shape[1]), sample(shape)
    traced = make_fx(copy.deepcopy(layer))(x)
    torch.testing.assert_close(traced(x), layer(x))


def test_one_layer_for_inputs_of_several_sizes():
    """A head that is shared by the levels of a pyramid: small and large inputs before any backward pass."""
    ours, theirs = SyncBatchNorm(6, dtype=torch.float64), nn.BatchNorm2d(6, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        inputs = [sample((8, 6, s, s), s, torch.float64).requires_grad_() for s in (4, 150, 5, 120)]
        loss = sum(layer(x).pow(3).mean() for x in inputs)
        results.append([*torch.autograd.grad(loss, [*inputs, *layer.parameters()]), layer.running_var])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_running_statistics_without_a_count():
    layer = SyncBatchNorm(3)
    layer.num_batches_tracked = None
    with pytest.raises(ValueError, match="running statistics and no num_batches_tracked"):
        layer(sample((4, 3, 2)))
