"""BatchRenorm against a transcription of the paper's Algorithm 1 (Ioffe 2017, arXiv 1702.03275), in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from syncbn import BatchRenorm

EXACT = {"rtol": 1e-12, "atol": 1e-12}

EPS, R_MAX, D_MAX, WARMUP, R_END, D_END, STEPS = 1e-3, 3.0, 5.0, 5, 40, 25, 50


def limits(step: int) -> tuple[float, float]:
    """Section 4.1: batch normalization at first, then r_max and d_max are relaxed, each linearly over its own steps."""
    if step <= WARMUP:
        return 1.0, 0.0
    r = R_MAX if step >= R_END else 1 + (R_MAX - 1) * (step - WARMUP) / (R_END - WARMUP)
    d = D_MAX if step >= D_END else D_MAX * (step - WARMUP) / (D_END - WARMUP)
    return r, d


@dataclasses.dataclass
class Algorithm1:
    """Line by line. The moving average is that of the unbiased variance, so that sigma = sqrt(variance + eps)."""

    gamma: Tensor
    beta: Tensor
    alpha: float | None
    mu: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3).double())
    variance: Tensor = dataclasses.field(default_factory=lambda: torch.ones(3).double())
    step: int = 0
    clipped: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """Each step, the fractions of r and of d at a limit."""

    def forward(self, batch: Tensor, ghost: int) -> Tensor:
        """Train on ``batch`` (m, C, *), each ``ghost`` consecutive samples being a minibatch of their own."""
        r_max, d_max = limits(self.step)
        outputs, means, variances, at_limit = [], [], [], []
        for x in batch.split(ghost):
            dims = [0, *range(2, x.dim())]
            shape = (1, 3, *(1,) * (x.dim() - 2))
            mu_b = x.sum(dims) / (x.numel() // 3)
            squares = (x - mu_b.view(shape)).square().sum(dims)
            sigma_b = torch.sqrt(EPS + squares / (x.numel() // 3))
            sigma = torch.sqrt(self.variance + EPS)
            r = (sigma_b.detach() / sigma).clip(1 / r_max, r_max)
            d = ((mu_b.detach() - self.mu) / sigma).clip(-d_max, d_max)
            x_hat = (x - mu_b.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
            outputs.append(self.gamma.view(shape) * x_hat + self.beta.view(shape))
            means.append(mu_b.detach())
            variances.append(squares.detach() / (x.numel() // 3 - 1))
            at_limit.append([((r == r_max) | (r == 1 / r_max)).double().mean(), (d.abs() == d_max).double().mean()])
        self.clipped.append(tuple(torch.tensor(at_limit).mean(0).tolist()))
        self.step += 1
        alpha = 1 / self.step if self.alpha is None else self.alpha
        self.mu = self.mu + alpha * (torch.stack(means).mean(0) - self.mu)
        self.variance = self.variance + alpha * (torch.stack(variances).mean(0) - self.variance)
        return torch.cat(outputs)


def batch(step: int, shape) -> tuple[Tensor, Tensor]:
    """A drifting input, and an output gradient: some steps are near the running statistics, some far from them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(3.0).double().view(1, 3, *(1,) * (len(shape) - 2))
    scale, offset = 1 + 4 * channel * (step % 4 == 1), 3 * channel * (step % 5) - 4
    return x * scale + offset, torch.randn(shape, generator=generator, dtype=torch.float64)


def make_layer(alpha: float | None, **options) -> BatchRenorm:
    return BatchRenorm(
        3, EPS, alpha, r_max=R_MAX, d_max=D_MAX, warmup_steps=WARMUP, r_ramp_end=R_END, d_ramp_end=D_END,
        dtype=torch.float64, **options,
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.01, 0.2, None])
@pytest.mark.parametrize(
    ("shape", "ghost"), [((16, 3), 16), ((4, 3, 3, 5), 4), ((12, 3, 2), 4), ((10, 3, 2, 2), 4)], ids=str
)
def test_fifty_steps_through_the_ramps_resumed_half_way(shape, ghost, alpha):
    options = {} if ghost == shape[0] else {"ghost_batch_size": ghost, "remainder": "smaller"}
    layer = make_layer(alpha, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    truth = Algorithm1(layer.weight.detach().clone(), layer.bias.detach().clone(), alpha)
    for step in range(STEPS):
        if step == STEPS // 2:
            state = layer.state_dict()
            layer = make_layer(alpha, **options)
            layer.load_state_dict(state)
        x, dy = batch(step, shape)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        truth.gamma.requires_grad_(), truth.beta.requires_grad_()
        y, y_expected = layer(found), truth.forward(expected, ghost)
        gradients = torch.autograd.grad(y, [found, layer.weight, layer.bias], dy)
        truths = torch.autograd.grad(y_expected, [expected, truth.gamma, truth.beta], dy)
        for a, b in zip((y, *gradients), (y_expected, *truths), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        with torch.no_grad():  # a step of gradient descent on each
            for parameter, gradient in zip((layer.weight, layer.bias), gradients[1:], strict=True):
                parameter -= 1e-3 * gradient
            truth.gamma = truth.gamma - 1e-3 * truths[1]
            truth.beta = truth.beta - 1e-3 * truths[2]
        torch.testing.assert_close(layer.running_mean, truth.mu, **EXACT)
        torch.testing.assert_close(layer.running_var, truth.variance, **EXACT)
        assert layer.num_batches_tracked == truth.step
    # The run must have been one in which the corrections mattered, at a limit and off it.
    r, d = zip(*truth.clipped[WARMUP + 1 :], strict=True)
    assert 0 < sum(r) / len(r) < 1
    assert 0 < sum(d) / len(d) < 1


def test_warm_up_is_batch_normalization():
    layer, reference = make_layer(0.1), nn.BatchNorm1d(3, EPS, 0.1, dtype=torch.float64)
    for step in range(WARMUP + 1):
        x, _ = batch(step, (16, 3))
        torch.testing.assert_close(layer(x), reference(x), **EXACT)
    x, _ = batch(step + 1, (16, 3))
    assert (layer(x) - reference(x)).abs().max() > 0.1


def test_evaluation_is_plain_and_counts_no_step():
    layer = make_layer(0.1)
    for step in range(20):
        layer(batch(step, (16, 3))[0])
    layer.eval()
    reference = nn.BatchNorm1d(3, EPS, dtype=torch.float64).eval()
    reference.load_state_dict(layer.state_dict())
    x, _ = batch(20, (16, 3))
    torch.testing.assert_close(layer(x), reference(x), **EXACT)
    assert layer.num_batches_tracked == 20


def test_open_limits_normalize_by_the_running_statistics():
    """Without a clip, r and d turn batch into running statistics: the output is evaluation's."""
    layer = BatchRenorm(3, EPS, r_max=1e6, d_max=1e6, warmup_steps=0, r_ramp_end=0, d_ramp_end=0, dtype=torch.float64)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([0.5, 2.0, 9.0]))
    x, dy = batch(1, (16, 3))
    expected = (x - layer.running_mean) / torch.sqrt(layer.running_var + EPS)
    sigma = torch.sqrt(layer.running_var + EPS)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, expected, **EXACT)
    # d sigma_B / d mu_B are gone into r and d: what is left of the gradient is orthogonal to 1 and to x.
    (dx,) = torch.autograd.grad(y, x, dy)
    xc = x.detach() - x.detach().mean(0)
    slope = (dy * xc).mean(0) / (xc.square().mean(0) + EPS)
    torch.testing.assert_close(dx, (dy - dy.mean(0) - slope * xc) / sigma, **EXACT)


@pytest.mark.parametrize("bad", [float("nan"), None], ids=["not finite", "empty"])
def test_steps_that_do_not_count(bad):
    layer = make_layer(0.1)
    layer(torch.empty(0, 3) if bad is None else torch.full((4, 3), bad))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))
