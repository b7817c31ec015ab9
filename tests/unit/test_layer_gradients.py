"""First and second derivatives in one process, and what else torch does with a graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.layers import SampleGroups

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def scattered(layer):
    """Groups by index, in no order, one of them empty."""
    layer.sample_groups = SampleGroups(torch.tensor([2, 0, 0, 2, 0]), 4)
    return layer


def renorm(**options):
    """With running statistics so far off that all corrections are clipped, r at either end: they are constants for the
    gradient, and finite differences see constants only there."""
    layer = BatchRenorm(3, warmup_steps=0, r_ramp_end=4, d_ramp_end=4, dtype=torch.float64, **options)
    layer.num_batches_tracked.fill_(2)
    layer.running_mean.copy_(torch.tensor([30.0, -90.0, -60.0]))
    layer.running_var.copy_(torch.tensor([0.01, 400.0, 0.01]))
    return layer


LAYERS = {
    "sync": lambda: SyncBatchNorm(3, dtype=torch.float64),
    "sync, grouped": lambda: scattered(SyncBatchNorm(3, dtype=torch.float64)),
    "ghost": lambda: GhostBatchNorm(3, 2, remainder="smaller", dtype=torch.float64),
    "ghost, grouped": lambda: scattered(GhostBatchNorm(3, 2, dtype=torch.float64)),
    "renorm": renorm,
    "renorm of ghosts": lambda: renorm(ghost_batch_size=3, remainder="smaller"),
    "renorm, grouped": lambda: scattered(renorm()),
    "no affine": lambda: SyncBatchNorm(3, affine=False, dtype=torch.float64),
    "evaluation": lambda: SyncBatchNorm(3, dtype=torch.float64).eval(),
    "evaluation on the batch": lambda: SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64).eval(),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def inputs(layer, shape=(5, 3, 4)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    parameters = [torch.linspace(0.5, 2.0, 3, dtype=torch.float64) for _ in layer.parameters()]
    return [t.requires_grad_() for t in (x, *parameters)]


def as_function(layer):
    """The layer as a function of its input and parameters alone: each call starts from the same buffers."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        fresh = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return torch.func.functional_call(layer, {**fresh, **dict(zip(names, parameters, strict=True))}, x)

    return function


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3), (5, 3, 2, 2)], ids=str)
@each_layer
def test_first_and_second_derivative(make, shape):
    layer = make()
    if shape == (5, 3) and layer.training and layer.ghost_batch_size == 2 and layer.sample_groups is None:
        shape = (6, 3)  # the smaller last group would hold a single value
    function, arguments = as_function(layer), inputs(layer, shape)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments, atol=1e-4)


@each_layer
def test_some_inputs_need_no_gradient(make):
    layer = make()
    function = as_function(layer)
    complete = inputs(layer)
    expected = torch.autograd.grad(function(*complete).pow(3).sum(), complete)
    for index, gradient in enumerate(expected):
        arguments = [t.detach().requires_grad_(i == index) for i, t in enumerate(complete)]
        (alone,) = torch.autograd.grad(function(*arguments).pow(3).sum(), [arguments[index]])
        # The sums may come from another pass over memory, in another order.
        torch.testing.assert_close(alone, gradient, rtol=1e-13, atol=1e-13)


@each_layer
def test_transforms_of_torch_func(make):
    layer = make()
    function, (x, *parameters) = as_function(layer), inputs(layer)
    expected = torch.autograd.grad(function(x, *parameters).pow(3).sum(), x)[0]
    found = torch.func.grad(lambda x: function(x, *parameters).pow(3).sum())(x)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.works_with("torch", "`stack_module_state` and `vmap`: an ensemble, with running statistics")
@pytest.mark.parametrize("name", ["sync", "ghost", "renorm", "no affine", "evaluation"])
def test_ensemble_by_vmap(name):
    """Stacked models, as torch.func.stack_module_state makes them: parameters and buffers have the mapped dimension."""
    layers = [LAYERS[name](), LAYERS[name]()]
    for parameter in layers[1].parameters():
        nn.init.constant_(parameter, 3.0)
    state = torch.func.stack_module_state(layers)
    (x, *_) = inputs(layers[0])
    y = torch.vmap(lambda *s: torch.func.functional_call(layers[0], s, x))(*state)
    for index, layer in enumerate(layers):
        torch.testing.assert_close(y[index], layer(x), **EXACT)
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(state[1][name][index], buffer, **EXACT)


@pytest.mark.works_with("torch", "`torch.utils.checkpoint`, reentrant and not")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_as_with_batchnorm(reentrant):
    """The forward pass runs twice, but only the first updates the running statistics; torch's layer does it twice."""
    results = []
    for layer in (SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)):
        (x, *_) = inputs(layer)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.pow(3).sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
        if isinstance(layer, SyncBatchNorm):
            once = nn.BatchNorm1d(3, dtype=torch.float64)
            once(x)
            for name, buffer in once.named_buffers():
                torch.testing.assert_close(getattr(layer, name), buffer, **EXACT)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_output_may_be_changed_in_place_and_the_input_not():
    layer = SyncBatchNorm(3, dtype=torch.float64)
    (x, *_) = inputs(layer)
    (expected,) = torch.autograd.grad(torch.relu(layer(x)).sum(), x)
    (found,) = torch.autograd.grad(torch.relu_(layer(x)).sum(), x)
    assert torch.equal(found, expected)
    x = x.detach() * 1
    y = layer(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_buffers_may_change_between_forward_and_backward():
    """Two forward passes before the backward ones, as in a siamese network."""
    layer, reference = SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    gradients = []
    for module in (layer, reference):
        (x, *_) = inputs(layer)
        (module(x).pow(3).sum() + module(2 * x + 1).pow(3).sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, **EXACT)
    first, second = renorm(), renorm()
    (x, *_) = inputs(first)
    loss = first(x).pow(3).sum()
    first.running_mean.add_(5)  # r and d are those of the forward pass
    expected = torch.autograd.grad(second(x).pow(3).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_backward_twice():
    layer = SyncBatchNorm(3, dtype=torch.float64)
    (x, *_) = inputs(layer)
    y = layer(x).pow(3).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, x)[0])


@pytest.mark.parametrize("ghost", [None, 2])
def test_autocast_changes_nothing_but_the_input(ghost):
    layer = SyncBatchNorm(3) if ghost is None else GhostBatchNorm(3, ghost)
    linear = nn.Linear(3, 3)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(x)
        y = layer(hidden)
        assert hidden.dtype == y.dtype == torch.bfloat16
        inside = torch.autograd.grad(y.float().pow(3).sum(), [*layer.parameters(), *linear.parameters()])
    hidden = hidden.detach().requires_grad_()
    assert torch.equal(twin(hidden), y)
    outside = torch.autograd.grad(twin(hidden).float().pow(3).sum(), [*twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=False))
    assert layer.running_var.dtype == torch.float32
