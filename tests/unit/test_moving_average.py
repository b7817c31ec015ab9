"""Moving average batch normalization against a transcription of its equations, and its state within a run."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from syncbn.layers import SampleGroups
from syncbn.train import loop
from syncbn.train.config import NormConfig, RunConfig, config_from_dict
from syncbn.train.logical_gpus import Partition, Placement
from syncbn.train.loop import train
from syncbn.train.norms.moving_average import MovingAverageBatchNorm, centre
from syncbn.train.parity import Trained, compare_runs
from syncbn.train.state import Run

CHANNELS, WINDOW, WARMUP, EPS, MOMENTUM, R_MAX = 3, 4, 6, 1e-5, 0.1, 1.5


class Gpu:
    """One GPU, its layer's equations written out one channel at a time."""

    def __init__(self):
        self.squares = [deque(maxlen=WINDOW) for _ in range(CHANNELS)]
        self.phis = [deque(maxlen=WINDOW) for _ in range(CHANNELS)]
        self.running = [1.0] * CHANNELS
        self.seen = 0
        self.corrections = []

    def step(self, x, dy, weight, bias):
        """x, dy (N, C, H, W) -> y, grad_x, grad_weight, grad_bias."""
        y, grad_x = torch.empty_like(x), torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        self.seen += 1
        plain = self.seen <= max(WARMUP, WINDOW)
        for c in range(CHANNELS):
            u, v, w = x[:, c], dy[:, c], weight[c]
            self.squares[c].append(float((u * u).mean()))
            moment = self.squares[c][-1] if plain else sum(self.squares[c]) / WINDOW
            r = 1.0
            if not plain:
                exact = ((moment + EPS) ** 0.5) / ((self.running[c] + EPS) ** 0.5)
                r = min(max(exact, 1 / R_MAX), R_MAX)
                self.corrections.append((exact, r))
            self.running[c] = moment if self.seen == 1 else (1 - MOMENTUM) * self.running[c] + MOMENTUM * moment
            z = u / (moment + EPS) ** 0.5
            y[:, c] = w * r * z + bias[c]
            g = w * r * v
            self.phis[c].append(float((g * z).mean()))
            psi = self.phis[c][-1] if plain else sum(self.phis[c]) / WINDOW
            grad_x[:, c] = (g - z * psi) / (moment + EPS) ** 0.5
            grad_weight[c], grad_bias[c] = (v * r * z).sum(), v.sum()
        return y, grad_x, grad_weight, grad_bias


def make(gpus=2, **options):
    options = {"window": WINDOW, "warmup_steps": WARMUP, "momentum": MOMENTUM, "r_max": R_MAX, **options}
    layer = MovingAverageBatchNorm(CHANNELS, NormConfig(name="mabn", **options), gpus, range(gpus)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.rand(CHANNELS) + 0.5)
        layer.bias.copy_(torch.randn(CHANNELS))
    return layer


def tell(layer, sizes):
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    layer.sample_groups = SampleGroups(index=index, number=len(sizes))


def batch(samples, generator, scale=1.0):
    shape = (samples, CHANNELS, 2, 3)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (scale * x + 0.3).requires_grad_(), dy


def state(layer):
    return [buffer.clone() for buffer in layer.rows()]


def test_thirty_steps_are_those_of_the_equations():
    """Through warm-up and the filling of the windows; a GPU that has few samples, and once none."""
    generator = torch.Generator().manual_seed(0)
    layer, gpus = make(), [Gpu(), Gpu()]
    for step in range(30):
        sizes = (4, 0) if step == 9 else (4, 1) if step == 17 else (2, 3)
        tell(layer, sizes)
        # A scale that moves, slowly and by a jump, so that r is at either limit and in between.
        x, dy = batch(sum(sizes), generator, scale=(1 + 0.1 * step) * (4 if 12 <= step < 20 else 1))
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        parts = zip(gpus, x.detach().split(sizes), dy.split(sizes), strict=True)
        with torch.no_grad():
            found = [gpu.step(*part, layer.weight, layer.bias) for gpu, *part in parts if len(part[0])]
        outputs, grads_x, grads_weight, grads_bias = zip(*found, strict=True)
        torch.testing.assert_close(y, torch.cat(outputs), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, torch.cat(grads_x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.weight.grad, sum(grads_weight), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, sum(grads_bias), rtol=1e-12, atol=1e-12)
        running = torch.tensor([gpu.running for gpu in gpus], dtype=torch.float64)
        torch.testing.assert_close(layer.running_second_moment, running, rtol=1e-12, atol=0)
    assert layer.num_batches_tracked.tolist() == [30, 29]
    exact = [c for gpu in gpus for c in gpu.corrections]
    assert any(e > R_MAX for e, _ in exact), "the jump upwards was to be clipped"
    assert any(e < 1 / R_MAX for e, _ in exact), "the jump downwards was to be clipped"
    assert any(e == r for e, r in exact)


def test_warm_up_has_the_gradient_of_the_plain_formula():
    generator = torch.Generator().manual_seed(1)
    layer = make()
    for _ in range(WARMUP):
        tell(layer, (2, 3))
        x, dy = batch(5, generator)
        layer.zero_grad()
        layer(x).backward(dy)
        grads = [x.grad, layer.weight.grad, layer.bias.grad]
        halves = [half / half.square().mean((0, 2, 3), keepdim=True).add(EPS).sqrt() for half in x.split((2, 3))]
        y = torch.cat(halves) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        plain = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        torch.testing.assert_close(grads, list(plain), rtol=1e-12, atol=1e-12)


def test_a_scaled_loss_has_scaled_gradients_and_the_same_windows():
    """As under DDP and with a loss scale, which may change from one step to the next."""
    layers = [make(), make()]
    layers[1].load_state_dict(layers[0].state_dict())
    for step in range(WARMUP + 6):
        scale = 2.0 ** (step % 3)
        grads = []
        for layer, factor in zip(layers, (1.0, scale), strict=True):
            generator = torch.Generator().manual_seed(step)
            layer.gradient_scale = factor
            tell(layer, (2, 2))
            x, dy = batch(4, generator)
            layer(x).backward(factor * dy)
            grads.append(x.grad / factor)
        assert torch.equal(*grads)
        assert all(map(torch.equal, state(layers[0]), state(layers[1])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_out(value):
    generator = torch.Generator().manual_seed(2)
    layer = make()
    for _ in range(WARMUP + 2):
        tell(layer, (2, 2))
        x, dy = batch(4, generator)
        layer(x).backward(dy)
    before = state(layer)
    bad = x.detach().clone()
    bad[3, 1, 0, 0] = value
    layer(bad.requires_grad_()).backward(dy)
    rows = list(zip(before, layer.rows(), strict=True))
    assert all(torch.equal(old[1], new[1]) for old, new in rows), "the row of the GPU that met it"
    assert not any(torch.equal(old[0], new[0]) for old, new in rows), "the other GPU's goes on"
    assert layer.num_nonfinite_batches == 1
    bad = dy.clone()
    bad[0, 2, 1, 1] = value
    before = state(layer)
    layer(x.detach().requires_grad_()).backward(bad)
    assert torch.equal(before[1][0], layer.window_gradient[0])
    assert not torch.equal(before[1][1], layer.window_gradient[1])
    assert not torch.equal(before[0][0], layer.window_second_moment[0])
    assert all(buffer.isfinite().all() for buffer in layer.rows())


def test_what_single_precision_cannot_hold_stays_out():
    layer = MovingAverageBatchNorm(1, NormConfig(name="mabn"))
    layer(torch.full((2, 1), 1e30))
    assert layer.num_nonfinite_batches == 1
    assert layer.num_batches_tracked.tolist() == [0]
    assert layer.running_second_moment.item() == 1


@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_uses_the_mean_over_the_gpus_that_have_seen_a_batch(affine):
    generator = torch.Generator().manual_seed(3)
    layer = MovingAverageBatchNorm(CHANNELS, NormConfig(name="mabn", affine=affine), 3, range(3)).double()
    x, _ = batch(4, generator)
    untrained = layer.eval()(x)
    torch.testing.assert_close(untrained, x / (1 + EPS) ** 0.5)
    layer.train()
    tell(layer, (2, 2, 0))
    layer(x)
    before = state(layer)
    layer.eval()
    moment = torch.stack([half.detach().square().mean((0, 2, 3)) for half in x.split(2)]).mean(0)
    expected = x / (moment + EPS).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:1]), expected[:1])
    layer(x).sum().backward()
    assert all(map(torch.equal, before, layer.rows())), "evaluation changes nothing"


def test_only_the_rows_of_hosted_gpus_are_touched():
    whole, part = make(gpus=4), make(gpus=4)
    part.load_state_dict(whole.state_dict())
    part.hosted = range(2, 4)
    generator = torch.Generator().manual_seed(4)
    for _ in range(WARMUP + 3):
        x, dy = batch(8, generator)
        tell(whole, (2, 2, 2, 2))
        whole(x).backward(dy)
        tell(part, (2, 2))
        theirs = x.detach()[4:].requires_grad_()
        part(theirs).backward(dy[4:])
        assert torch.equal(theirs.grad, x.grad[4:])
    for own, all_rows, fresh in zip(part.rows(), whole.rows(), make(gpus=4).rows(), strict=True):
        assert torch.equal(own[2:], all_rows[2:])
        assert torch.equal(own[:2], fresh[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes_formats_and_dimensions(dtype, memory_format):
    layer = MovingAverageBatchNorm(CHANNELS, NormConfig(name="mabn", window=2, warmup_steps=0))
    for _ in range(4):
        x = torch.randn(4, CHANNELS, 5, 5, dtype=dtype).to(memory_format=memory_format).requires_grad_()
        y = layer(x)
        y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert layer.window_second_moment.dtype == torch.float32
    assert layer(torch.randn(4, CHANNELS)).shape == (4, CHANNELS)
    with pytest.raises(ValueError, match=r"got an input of shape \(4, 2\).*3 channels"):
        layer(torch.randn(4, 2))


def test_centred_convolutions():
    conv = nn.Conv2d(4, 8, 3, bias=False)
    drawn = conv.weight.detach().clone()
    centre(conv)
    torch.testing.assert_close(conv.weight.sum((1, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(conv.weight, drawn - drawn.mean((1, 2, 3), keepdim=True))
    image = torch.full((1, 4, 5, 5), 0.7)
    torch.testing.assert_close(conv(image), torch.zeros(1, 8, 3, 3), rtol=0, atol=1e-5)
    single = nn.Conv2d(4, 4, 1, groups=4)
    centre(single)
    assert isinstance(single.weight, nn.Parameter), "with its only weight centred, nothing would come out"


# ---- within a run


@pytest.mark.parametrize(("loss_scale", "expected"), [(None, 2.0), (8.0, 16.0)])
def test_layers_are_told_what_the_loss_is_multiplied_by(loss_scale, expected):
    """The loop multiplies by the processes, as DDP divides by them; half precision has a loss scale besides."""
    scaler = None if loss_scale is None else torch.amp.GradScaler("cpu", init_scale=loss_scale)
    partition = Partition.of(RunConfig(gpus=4, norm=NormConfig(name="mabn")), Placement(rank=1, processes=2))
    run = SimpleNamespace(partition=partition, accelerator=SimpleNamespace(scaler=scaler), device=torch.device("cpu"))
    assert Run.gradient_scale.fget(run) == expected
    assert partition.row_range == range(2, 4)


SMALL = {
    "gpus": 4,
    "per_gpu_batch_size": 4,
    "precision": "fp64",
    "device": "cpu",
    "data": {"name": "digits", "train_samples": 150, "augment": "crop", "class_skew": 2},
    "model": {"width": 4},
    "norm": {"name": "mabn", "warmup_steps": 4, "window": 3},
    "budget": {"epochs": 3},
}


def test_interrupted_and_resumed_is_the_same_run(tmp_path, monkeypatch):
    config = config_from_dict(SMALL)
    whole = train(config, tmp_path / "whole")
    assert [e["statistics"] for e in whole.evaluations] == ["running"]
    assert whole.layers == []
    evaluate, calls = loop.evaluate, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken")
    monkeypatch.setattr(loop, "evaluate", evaluate)
    broken = train(config, tmp_path / "broken", resume=True)
    assert broken.losses == whole.losses
    ends = [Trained.read(tmp_path / name) for name in ("whole", "broken")]
    assert compare_runs(*ends).largest == 0
    tracked = ends[0].tensors["layer1.norm.num_batches_tracked"]
    assert tracked.tolist() == [30, 30, 27, 27], "10 batches an epoch, the last of 6 images on two of the GPUs"


def test_it_learns():
    config = {**SMALL, "data": {"name": "digits"}, "precision": "fp32", "model": {"width": 8}}
    result = train(config_from_dict({**config, "gpus": 8, "per_gpu_batch_size": 2, "budget": {"epochs": 4}}))
    assert result.score < 0.1
