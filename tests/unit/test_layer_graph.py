"""What the graph of a layer keeps alive and notices, and transforms of layers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.layers import SampleGroups

# Parts of torch that the tests import use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def renorm(**options):
    layer = BatchRenorm(3, warmup_steps=0, r_ramp_end=0, d_ramp_end=0, dtype=torch.float64, **options)
    layer.running_mean += 0.3
    return layer


@pytest.mark.parametrize("make", [lambda: SyncBatchNorm(3, dtype=torch.float64), renorm], ids=["sync", "renorm"])
def test_forward_mode_agrees_with_reverse_mode(make):
    """Renorm's r and d are constants in both."""
    layer = make()
    layer.track_running_stats = False  # both modes see the same buffers
    x = sample(4, 3, 2)
    forward, reverse = torch.func.jacfwd(layer)(x), torch.func.jacrev(layer)(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-10)


@pytest.mark.works_with("torch", "`torch.jit.trace`, saved, then trained")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes, which the trace is for
def test_a_traced_layer_trains(tmp_path):
    layer, eager, x = renorm(), renorm(), sample(4, 3, 2).requires_grad_()
    traced = torch.jit.trace(layer, sample(4, 3, 2, seed=1), check_trace=False)
    traced.save(tmp_path / "layer.pt")
    traced.running_mean.copy_(eager.running_mean), traced.running_var.copy_(eager.running_var)
    traced.num_batches_tracked.zero_()
    for _ in range(2):
        results = [torch.autograd.grad((module(x) ** 3).sum(), x)[0] for module in (traced, eager)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert not traced.running_mean.requires_grad


@pytest.mark.parametrize("options", [{}, {"save": "output"}], ids=["input", "output"])
def test_the_graph_does_not_keep_the_layer_or_a_freed_input(options):
    """Where the shapes do not show that each group has a variance, the counts are read."""
    layer, leaf = SyncBatchNorm(3, dtype=torch.float64, **options), sample(4, 3, 2).requires_grad_()
    layer.sample_groups = SampleGroups(torch.arange(4) // 2, 2)
    x = leaf * 1
    y = layer(x)
    kept = weakref.ref(x), weakref.ref(layer)
    del x, layer
    gc.collect()
    assert kept[1]() is None
    assert (kept[0]() is None) == (options == {"save": "output"})
    y.sum().backward()
    assert leaf.grad.isfinite().all()


def test_checkpointing_under_another_dispatch_mode():
    """The forward pass is repeated by other operations; what is saved has one form."""
    for layer in (SyncBatchNorm(3), GhostBatchNorm(3, 2), SyncBatchNorm(3, activation="relu")):
        x = sample(4, 3, 2).float().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False)
        with FlopCounterMode(display=False):
            y.sum().backward()
        assert x.grad.isfinite().all()


def test_changes_in_place_are_noticed():
    layer, index = SyncBatchNorm(3), torch.tensor([0, 0, 1, 1])
    layer.sample_groups = SampleGroups(index, 2, smallest=2)
    y = layer(sample(4, 3).float().requires_grad_())
    index.copy_(torch.tensor([0, 1, 0, 1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_bias_that_no_gradient_needs_may_change():
    layer, x = SyncBatchNorm(3), sample(4, 3, 2).float().requires_grad_()
    y = layer(x)
    with torch.no_grad():
        layer.bias.add_(1)
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 8.0))


def test_no_groups_and_no_samples():
    layer = SyncBatchNorm(4)
    layer.sample_groups = SampleGroups(torch.zeros(0, dtype=torch.int64), 0, smallest=5)
    layer(torch.zeros(0, 4, requires_grad=True)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(4))
    layer.sample_groups = SampleGroups(None, 3, smallest=5)
    with pytest.raises(ValueError, match="index"):
        layer(torch.zeros(6, 4))


def test_a_layer_without_its_weight_is_refused():
    layer = SyncBatchNorm(3)
    del layer.weight
    with pytest.raises(AttributeError, match="weight"):
        layer(torch.randn(4, 3))


class Scaled(nn.BatchNorm1d):
    """A user's class whose attribute has the name of an option of some layers."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.sync = 3.0


def scale(layer, y):
    return y * layer.sync


def test_a_registered_class_keeps_attributes_with_the_names_of_options():
    syncbn.register_batchnorm(Scaled, scale)
    layer = syncbn.convert(Scaled(3), "sync")
    assert layer.sync == 3.0
    assert layer(torch.randn(4, 3)).isfinite().all()
