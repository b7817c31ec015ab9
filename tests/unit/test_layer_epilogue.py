"""Residual, activation and save="output" of the layers, against torch's operations one after the other in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.layers import MIN_WEIGHT

# Sums of some hundred float64 terms, in two orders.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

LAYERS = {
    "sync": lambda **o: SyncBatchNorm(3, **o),
    "no affine": lambda **o: SyncBatchNorm(3, affine=False, **o),
    "no bias": lambda **o: SyncBatchNorm(3, bias=False, **o),
    "ghost": lambda **o: GhostBatchNorm(3, 2, **o),
    "renorm": lambda **o: BatchRenorm(3, warmup_steps=0, r_ramp_end=0, d_ramp_end=0, **o),
    "renorm of ghosts": lambda **o: BatchRenorm(3, warmup_steps=0, r_ramp_end=0, d_ramp_end=0, ghost_batch_size=2, **o),
}
ACTIVATIONS = {
    "none": ({}, lambda z: z),
    "relu": ({"activation": "relu"}, F.relu),
    "leaky_relu": ({"activation": "leaky_relu", "negative_slope": 0.1}, lambda z: F.leaky_relu(z, 0.1)),
    "silu": ({"activation": "silu"}, F.silu),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_activation = pytest.mark.parametrize(("options", "function"), ACTIVATIONS.values(), ids=ACTIVATIONS)


def prepared(make, **options):
    layer = make(dtype=torch.float64, **options)
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor([0.3, 0.0, -0.7]))
    return layer


def sample(seed, shape=(6, 3, 4, 5), memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=memory_format)
    return x.requires_grad_()


def outcome(layer, run, inputs, dy):
    """Output, gradients of the inputs and the parameters, buffers."""
    y = run(*inputs)
    gradients = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
    return [y.detach(), *gradients, *layer.buffers()]


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_activation
@each_layer
def test_the_same_as_one_operation_after_the_other(make, options, function, training, with_residual, memory_format):
    fused = prepared(make, **options).train(training)
    plain = prepared(make).train(training)
    inputs = [sample(seed, memory_format=memory_format) for seed in range(1 + with_residual)]
    dy = sample(9).detach()
    found = outcome(fused, fused, inputs, dy)
    expected = outcome(plain, lambda x, r=None: function(plain(x) if r is None else plain(x) + r), inputs, dy)
    check(found, expected)
    assert found[0].stride() == inputs[0].stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_activation
@each_layer
def test_no_number_in_one_channel(make, options, function, dtype):
    fused, plain = prepared(make, **options).to(dtype), prepared(make).to(dtype)
    inputs = [sample(seed).detach().to(dtype).requires_grad_() for seed in range(2)]
    with torch.no_grad():
        inputs[0][:, 1] = float("nan")
    dy = sample(9).detach().to(dtype)
    found = torch.autograd.grad(fused(*inputs), inputs, dy)
    expected = torch.autograd.grad(function(plain(inputs[0]) + inputs[1]), inputs, dy)
    for ours, theirs in zip(found, expected, strict=True):  # ReLU passes dy on to the residual, as in torch
        torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=0, atol=0, equal_nan=True)


@each_activation
@each_layer
def test_second_derivative(make, options, function):
    layer = prepared(make, **options)
    # Renorm's corrections at their limits, where finite differences see them as the constants they are.
    layer.running_mean.copy_(torch.tensor([300.0, -300.0, 300.0]))
    layer.running_var.copy_(torch.tensor([400.0, 900.0, 400.0]))
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def run(x, residual):
        for name, buffer in layer.named_buffers():
            buffer.copy_(state[name])
        return layer(x, residual)

    inputs = [sample(seed, (4, 3, 2)) for seed in range(2)]
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4, nondet_tol=1e-12)


@pytest.mark.parametrize("options", [{}, {"activation": "leaky_relu", "negative_slope": 0.1}], ids=["none", "leaky"])
@each_layer
def test_keeping_the_output_alone(make, options):
    inverted, plain = prepared(make, save="output", **options), prepared(make, **options)
    inputs, dy = [sample(0)], sample(9).detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = inverted(*inputs)
    # What is as large as the input is the output, and the input is not among what is kept.
    large = [t for t in kept if t.numel() >= y.numel()]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]
    check(outcome(inverted, lambda x: y, inputs, dy), outcome(plain, plain, inputs, dy))


def test_keeping_the_output_in_float32_is_near():
    """What is had from the output has its roundings, times (1 + |bias|) / |weight|."""
    torch.manual_seed(0)
    options = {"activation": "leaky_relu", "negative_slope": 0.01}
    inverted, plain = SyncBatchNorm(3, save="output", **options), SyncBatchNorm(3, dtype=torch.float64, **options)
    with torch.no_grad():
        for layer in (inverted, plain):
            layer.weight.copy_(torch.tensor([0.1, -1.0, 2.0]))
            layer.bias.copy_(torch.tensor([1.0, -0.5, 0.0]))
    x, dy = torch.randn(8, 3, 9, 9), torch.randn(8, 3, 9, 9)
    results = []
    for layer, dtype in ((inverted, torch.float32), (plain, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        results.append(torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], dy.to(dtype)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


def test_what_cannot_be_inverted():
    for options in (
        {"activation": "relu"},
        {"activation": "silu"},
        {"activation": "leaky_relu", "negative_slope": 0.0},
        {"activation": "leaky_relu", "negative_slope": -0.1},
    ):
        with pytest.raises(ValueError, match=r"save='output'.*inverted.*leaky_relu"):
            SyncBatchNorm(3, save="output", **options)
    layer = prepared(LAYERS["sync"], save="output")
    x = sample(0)
    with pytest.raises(ValueError, match=r"residual.*save='input'"):
        layer(x, x)
    with pytest.raises(RuntimeError, match=r"second derivative.*save='output'"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    before = copy.deepcopy(layer.state_dict())
    for weight, bias in ((MIN_WEIGHT / 2, 0.0), (1.0, 2 / MIN_WEIGHT), (0.0, 0.0)):
        with torch.no_grad():
            layer.weight[1], layer.bias[1] = weight, bias
        with pytest.raises(ValueError, match=r"save='output' needs weights.*1/128.*save='input'"):
            layer(x)
    assert torch.equal(layer.running_mean, before["running_mean"])
    layer.eval()
    layer(x)  # nothing is inverted


def test_wrong_residuals_and_options():
    layer = SyncBatchNorm(3, dtype=torch.float64)
    x = sample(0)
    for residual in (x[:3], x.float(), x[:, :1], torch.ones(())):
        with pytest.raises(ValueError, match="the residual must have the input's shape, dtype and device"):
            layer(x, residual)
    with pytest.raises(ValueError, match=r"activation must be one of None, 'relu', 'leaky_relu', 'silu', got 'gelu'"):
        SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match=r"save must be one of 'input', 'output', got 'both'"):
        SyncBatchNorm(3, save="both")
    with pytest.raises(ValueError, match="negative_slope must be a finite number, got nan"):
        SyncBatchNorm(3, activation="leaky_relu", negative_slope=float("nan"))


def test_a_copy_and_a_pickle_keep_the_options():
    layer = GhostBatchNorm(3, 2, activation="leaky_relu", negative_slope=0.2, save="output")
    assert "activation='leaky_relu', negative_slope=0.2, save='output'" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.activation, twin.negative_slope, twin.save) == ("leaky_relu", 0.2, "output")


def test_a_block_of_a_residual_network():
    """The use that it is for: normalization, addition and activation as one layer."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    fused, plain = prepared(LAYERS["sync"], activation="relu"), prepared(LAYERS["sync"])
    x = sample(0)
    check(
        outcome(fused, lambda x: fused(convolution(x), x), [x], torch.ones(x.shape, dtype=torch.float64)),
        outcome(plain, lambda x: F.relu(plain(convolution(x)) + x), [x], torch.ones(x.shape, dtype=torch.float64)),
    )


def test_compiled_in_one_graph():
    layer = prepared(LAYERS["sync"], activation="silu")
    twin = copy.deepcopy(layer)
    inputs, dy = [sample(0), sample(1)], sample(9).detach()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check(outcome(layer, compiled, inputs, dy), outcome(twin, twin, inputs, dy))


@pytest.mark.parametrize("name", ["sync", "ghost", "renorm"])
def test_numbers_kept_for_the_backward_pass(name):
    """At most 8 float32 numbers a channel and group beyond the input, and the group of each sample."""
    makers = {
        "sync": (SyncBatchNorm(64), 1),
        "ghost": (GhostBatchNorm(64, 2), 4),
        "renorm": (BatchRenorm(64, warmup_steps=0, r_ramp_end=0, d_ramp_end=0), 1),
    }
    layer, groups = makers[name]
    for shape in ((8, 64, 7, 7), (8, 64, 120, 120)):
        x = torch.randn(shape, requires_grad=True)
        kept: dict[int, int] = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
        extra = sum(size for pointer, size in kept.items() if pointer not in known)
        assert extra <= 8 * 4 * 64 * groups
