"""Derivatives across ranks, first and second, and the collectives that they take."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layer_jobs import Case, batchnorm, set_affine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import lockstep
from syncbn.collectives import all_reduce_sum, start_all_reduce_sum

# As in test_sync: exact but for summation.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# -- every rank holds the whole input; the function of it is computed together -----------------------------------------
# Each operation's gradient is another of the four, so all of them can be differentiated any number of times.


def rows(sizes):
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def summed(tensor):
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


class Take(torch.autograd.Function):
    """The rows of this rank, of a tensor that all ranks hold."""

    @staticmethod
    def forward(ctx, whole, sizes):
        ctx.sizes = sizes
        return whole[rows(sizes)].clone()

    @staticmethod
    def backward(ctx, grad):
        return Join.apply(grad, ctx.sizes), None


class Join(torch.autograd.Function):
    """All ranks' rows, on every rank."""

    @staticmethod
    def forward(ctx, part, sizes):
        ctx.sizes = sizes
        whole = part.new_zeros(sum(sizes), *part.shape[1:])
        whole[rows(sizes)] = part
        return summed(whole)

    @staticmethod
    def backward(ctx, grad):
        return Take.apply(grad, ctx.sizes), None


class Share(torch.autograd.Function):
    """A tensor that all ranks hold, used by each for its own part: the gradients of the parts add up."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return Total.apply(grad)


class Total(torch.autograd.Function):
    """The sum over ranks, on every rank."""

    @staticmethod
    def forward(ctx, tensor):
        return summed(tensor)

    @staticmethod
    def backward(ctx, grad):
        return Share.apply(grad)


def check_gradients(name, sizes, options):
    torch.manual_seed(0)
    layer = getattr(syncbn, name)(2, **options, dtype=torch.float64)
    if name == "BatchRenorm":  # all corrections at a limit, where finite differences see them as the constants they are
        layer.running_mean.copy_(torch.tensor([300.0, -300.0]))
        layer.running_var.copy_(torch.tensor([400.0, 900.0]))
    fixed = {key: buffer.clone() for key, buffer in layer.named_buffers()}

    def function(x, weight, bias):
        state = {"weight": Share.apply(weight), "bias": Share.apply(bias), **{k: b.clone() for k, b in fixed.items()}}
        return Join.apply(torch.func.functional_call(layer, state, Take.apply(x, sizes)), sizes)

    x = torch.randn(sum(sizes), 2, 2, dtype=torch.float64) + 1
    arguments = [t.requires_grad_() for t in (x, torch.tensor([0.5, 2.0]).double(), torch.tensor([1.0, -1.0]).double())]
    assert torch.autograd.gradcheck(function, arguments)
    return torch.autograd.gradgradcheck(function, arguments, atol=1e-4)


GHOST = {"sync": True, "ghost_batch_size": 2, "remainder": "smaller", "max_ghost_groups": 2}
RENORM = {"sync": True, "warmup_steps": 0, "r_ramp_end": 0, "d_ramp_end": 0}


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("SyncBatchNorm", (3, 2), {}),
        ("SyncBatchNorm", (2, 0, 3), {}),
        ("GhostBatchNorm", (3, 2), GHOST),
        ("GhostBatchNorm", (3, 0, 2), GHOST),
        ("BatchRenorm", (2, 3), RENORM),
        ("BatchRenorm", (3, 0, 2), {**RENORM, **GHOST}),
    ],
    ids=str,
)
def test_first_and_second_derivative(pools, name, sizes, options):
    assert all(pools(len(sizes)).run(check_gradients, name, sizes, options))


# -- a use of them -----------------------------------------------------------------------------------------------------


def gradient_penalty(sizes, synchronized):
    """Gradients of a loss that contains the input's gradient, of a model with two normalizations."""
    torch.manual_seed(0)
    norm = syncbn.SyncBatchNorm if synchronized else nn.BatchNorm2d
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.Tanh(), nn.Conv2d(4, 3, 3), norm(3), nn.Tanh()).double()
    x = torch.randn(sum(sizes), 2, 7, 7, dtype=torch.float64)
    x = (x[rows(sizes)] if synchronized else x).requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (dx.square().sum() + y.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"dx": dx.detach(), "ddx": x.grad, "grad": gradients}


@pytest.mark.parametrize("sizes", [(3, 2), (2, 0, 3)], ids=str)
def test_gradient_penalty(pools, sizes):
    results = pools(len(sizes)).run(gradient_penalty, sizes, True)
    truth = gradient_penalty(sizes, False)
    for key in ("dx", "ddx"):
        torch.testing.assert_close(torch.cat([r[key] for r in results]), truth[key], **EXACT)
    for name, expected in truth["grad"].items():
        total = sum(r["grad"][name] for r in results)
        # Sums over some hundred positions, of terms that are much larger than the sum.
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# -- unlike ranks ------------------------------------------------------------------------------------------------------


def images_of_other_sizes():
    """Each rank has images of a size of its own."""
    shape = [(3, 3, 4, 5), (2, 3, 1, 7), (0, 3, 6, 6)][dist.get_rank()]
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    set_affine(layer, torch.float64)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    return tuple(t.detach() for t in (x, dy, y, x.grad, layer.running_var))


def test_images_of_other_sizes(pools):
    results = pools(3).run(images_of_other_sizes)
    # (N, C, H, W) as (1, C, N * H * W): all that batch normalization knows.
    x, dy, y, dx = (torch.cat([r[i].transpose(0, 1).flatten(1) for r in results], 1).unsqueeze(0) for i in range(4))
    truth = batchnorm(Case("", (), shape=(3, 1)))
    x.requires_grad_()
    expected = truth(x)
    expected.backward(dy)
    torch.testing.assert_close(y, expected.detach(), **EXACT)
    torch.testing.assert_close(dx, x.grad, **EXACT)
    for result in results:
        torch.testing.assert_close(result[4], truth.running_var, **EXACT)


def some_inputs_without_gradient():
    """Rank 1's input has no history; rank 0 needs its part in the reduction all the same."""
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[rows((3, 1))].requires_grad_(dist.get_rank() == 0)
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    layer(x).pow(3).sum().backward()
    return x.grad, layer.weight.grad


def test_some_inputs_without_gradient(pools):
    (dx, first), (nothing, second) = pools(2).run(some_inputs_without_gradient)
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    truth = nn.BatchNorm1d(3, dtype=torch.float64)
    truth(x).pow(3).sum().backward()
    assert nothing is None
    torch.testing.assert_close(dx, x.grad[:3], **EXACT)
    torch.testing.assert_close(first + second, truth.weight.grad, **EXACT)


# -- collectives -------------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Records each collective: its name, number of elements and dtype."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if "c10d" in namespace and "wait_tensor" not in name:
            self.seen.append((name.split(".")[0], args[0].numel(), args[0].dtype))
        return func(*args, **(kwargs or {}))


def sums_by_either_transport(monkeypatch_limit):
    """The same sums, of this rank's numbers and of none, with and without gathering."""
    found = []
    for limit in (syncbn.collectives._GATHER_LIMIT, monkeypatch_limit):
        before, syncbn.collectives._GATHER_LIMIT = syncbn.collectives._GATHER_LIMIT, limit
        try:
            with Collectives() as seen:
                pending = start_all_reduce_sum(torch.arange(6.0).double().view(3, 2) + dist.get_rank(), world_name())
                found.append((seen.seen[0][0], pending.wait()))
                found.append((seen.seen[0][0], all_reduce_sum(torch.empty(0, 3), world_name())))
        finally:
            syncbn.collectives._GATHER_LIMIT = before
    return found


def world_name():
    return dist.group.WORLD.group_name


def test_gathering_is_a_sum(pools):
    for results in pools(3).run(sums_by_either_transport, 2):
        names, sums = zip(*results, strict=True)
        assert names == ("all_gather_into_tensor",) * 2 + ("all_reduce",) * 2
        expected = 3 * torch.arange(6.0).double().view(3, 2) + 3
        assert torch.equal(sums[0], expected)
        assert torch.equal(sums[2], expected)
        assert sums[1].shape == sums[3].shape == (0, 3)


def count_collectives(name, options, size, check_every):
    layer = getattr(syncbn, name)(5, **options)
    all_reduce_sum(torch.zeros(1).double(), world_name())  # of number 0, which is always checked
    with mock.patch.object(lockstep, "CHECK_EVERY", check_every):
        return count_in_each_mode(layer, size)


def count_in_each_mode(layer, size):
    counts = {}
    for mode in ("agreement", "train", "no input gradient", "no_grad", "eval"):
        layer.train(mode != "eval")
        x = torch.randn(size, 5, 3, requires_grad=mode != "no input gradient")
        with torch.set_grad_enabled(mode != "no_grad"):
            with Collectives() as forward:
                y = layer(x)
            with Collectives() as backward:
                if y.requires_grad:
                    y.sum().backward()
        counts[mode] = (forward.seen, backward.seen)
    return counts


@pytest.mark.parametrize(
    ("name", "options", "groups"),
    [
        ("SyncBatchNorm", {}, 1),
        ("SyncBatchNorm", {"sync_group_size": 2}, 1),
        ("SyncBatchNorm", {"momentum": None, "affine": False}, 1),
        ("GhostBatchNorm", {"ghost_batch_size": 2, "sync": True}, 3),
        ("GhostBatchNorm", {"ghost_batch_size": 2, "sync": True, "max_ghost_groups": 4}, 4),
        ("BatchRenorm", {"sync": True}, 1),
        ("BatchRenorm", {"sync": True, "ghost_batch_size": 3}, 2),
        ("GhostBatchNorm", {"ghost_batch_size": 2}, 0),
        ("BatchRenorm", {}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("check_every", "tag"), [(1 << 40, 0), (1, 2)], ids=["", "tagged"])
def test_one_collective_forward_and_one_backward(pools, name, options, groups, check_every, tag):
    c = 5
    # In small worlds on the CPU the sum is a gathering and an addition.
    forward = [("all_gather_into_tensor", groups * (2 * c + 1) + tag, torch.float64)] if groups else []
    backward = [("all_gather_into_tensor", groups * 2 * c + tag, torch.float64)] if groups else []
    for counts in pools(2).run(count_collectives, name, options, 6, check_every):
        agreed = options.get("ghost_batch_size") and "max_ghost_groups" not in options and groups
        first = [("all_reduce", 1, torch.int64)] if agreed else []
        without = backward if options.get("affine", True) else []
        # Without a parameter that needs a gradient, the ranks tell each other whose input does.
        asking = [(what, size + (not options.get("affine", True)), dtype) for what, size, dtype in forward]
        assert counts == {
            "agreement": (first + asking, backward),
            "train": (asking, backward),
            "no input gradient": (asking, without),
            "no_grad": (forward, []),
            "eval": ([], []),
        }
