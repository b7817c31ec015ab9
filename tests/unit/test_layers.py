"""The layers in one process: torch's BatchNorm where there is one group, and a loop of it where there are more."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.layers import SampleGroups

# float64 with |mean|/std up to 10: the statistics lose (mean/std)^2 * 1e-16, so two digits are left for summation.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

# All of them are plain batch normalization here: no process group, one ghost group, and renorm in its warm-up.
PLAIN = {
    "sync": SyncBatchNorm,
    "ghost": lambda c, **options: GhostBatchNorm(c, 6, **options),
    "renorm": lambda c, **options: BatchRenorm(c, **{"momentum": 0.1, **options}),
}
SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 5), (6, 3, 2, 3, 4), (6, 3, 2, 1, 3, 2)]


def sample(shape, seed=0, loc=5.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + loc).to(dtype)


def gradient(shape, seed=1):
    return sample(shape, 100 + seed, loc=0.0)


def randomize(layer, seed=3):
    """Affine parameters and running statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def train_step(layer, x, dy):
    """Output, gradients of the input and of weight and bias (or None), of one step."""
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)


def check_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, **EXACT)


def check_buffers(layer, reference):
    for name, expected in reference.named_buffers():
        torch.testing.assert_close(getattr(layer, name), expected, **EXACT)


# -- as nn.BatchNorm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_is_batchnorm(kind, shape, options):
    layer = randomize(PLAIN[kind](3, **options, dtype=torch.float64))
    # BatchNorm1d of the flattened input is the same arithmetic for any number of dimensions.
    reference = randomize(nn.BatchNorm1d(3, **options, dtype=torch.float64))
    for seed in range(3):
        x, dy = sample(shape, seed), gradient(shape, 10 + seed)
        flat = [t if t.dim() == 2 else t.flatten(2) for t in (x, dy)]
        check_same(train_step(layer, x, dy), train_step(reference, *flat))
        check_buffers(layer, reference)
    layer.eval(), reference.eval()
    check_same(train_step(layer, x, dy), train_step(reference, *flat))
    check_buffers(layer, reference)


@pytest.mark.parametrize("kind", PLAIN)
def test_without_a_bias(kind):
    layer = randomize(PLAIN[kind](3, bias=False, dtype=torch.float64))
    assert layer.bias is None
    assert set(layer.state_dict()) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
    reference = nn.BatchNorm1d(3, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight", "running_mean", "running_var"):
            getattr(reference, name).copy_(getattr(layer, name))
    for _ in range(2):
        y, dx, dweight = train_step(layer, sample((6, 3)), gradient((6, 3)))
        expected = train_step(reference, sample((6, 3)), gradient((6, 3)))[:3]
        check_same((y, dx, dweight), expected)
        layer.eval(), reference.eval()


@pytest.mark.parametrize("kind", ["sync", "ghost"])
def test_without_running_statistics(kind):
    layer = PLAIN[kind](3, track_running_stats=False, dtype=torch.float64)
    reference = nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)
    assert set(layer.state_dict()) == {"weight", "bias"}
    for _ in ("train", "eval"):
        check_same(
            train_step(layer, sample((6, 3)), gradient((6, 3))),
            train_step(reference, sample((6, 3)), gradient((6, 3))),
        )
        layer.eval(), reference.eval()


def test_evaluation_on_batch_statistics_ignores_groups():
    layer = GhostBatchNorm(3, 2, track_running_stats=False, dtype=torch.float64).eval()
    layer.sample_groups = SampleGroups(torch.tensor([0, 1]), 2)  # the last training step's, of another batch
    x = sample((5, 3))
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3, dtype=torch.float64)(x), **EXACT)


@pytest.mark.parametrize("kind", PLAIN)
def test_tracking_switched_off_later(kind):
    layer, reference = PLAIN[kind](3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    layer(sample((6, 3))), reference(sample((6, 3)))
    layer.track_running_stats = reference.track_running_stats = False
    check_same((layer(sample((6, 3), 1)),), (reference(sample((6, 3), 1)),))
    check_buffers(layer, reference)
    layer.eval(), reference.eval()  # torch: statistics that are there are used
    check_same((layer(sample((6, 3), 1)),), (reference(sample((6, 3), 1)),))


@pytest.mark.parametrize("kind", PLAIN)
def test_buffers_removed_later(kind):
    layer, reference = PLAIN[kind](3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    for module in (layer, reference):
        module.running_mean = module.running_var = None
        module.track_running_stats = False
        module.eval()
    check_same((layer(sample((6, 3))),), (reference(sample((6, 3))),))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", PLAIN)
def test_training_forward_without_gradients_updates_the_statistics(kind, context):
    layer, reference = PLAIN[kind](3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    with context():
        check_same((layer(sample((6, 3))),), (reference(sample((6, 3))),))
    check_buffers(layer, reference)


def test_positional_parameters_are_torchs():
    def positional(cls):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(SyncBatchNorm) == positional(nn.SyncBatchNorm)
    # After num_features, ghost has one more; renorm's momentum is its paper's alpha.
    assert positional(GhostBatchNorm)[:1] + positional(GhostBatchNorm)[2:] == positional(nn.BatchNorm2d)
    assert [p for p in positional(BatchRenorm) if p[0] != "momentum"] == [
        p for p in positional(nn.BatchNorm2d) if p[0] != "momentum"
    ]
    assert [name for name, _ in positional(BatchRenorm)] == [name for name, _ in positional(nn.BatchNorm2d)]


@pytest.mark.parametrize("kind", PLAIN)
def test_class(kind):
    layer = PLAIN[kind](3)
    assert isinstance(layer, _BatchNorm)
    # DistributedDataParallel on CPU refuses these.
    assert not isinstance(layer, nn.SyncBatchNorm)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(6, 3, 4, 5), (6, 1, 4, 5), (6, 3, 1, 5), (6, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("ghost", [6, 2])
def test_memory_format_is_kept(size, ghost, training):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for shape in (size, (*size, 2)):
        layer = GhostBatchNorm(size[1], ghost).train(training)
        for memory_format in (torch.contiguous_format, formats[len(shape)]):
            x = sample(shape, dtype=torch.float32).contiguous(memory_format=memory_format).requires_grad_()
            y = layer(x)
            # The output's gradient may come in any layout: here expanded, and as the other format.
            (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
            (other,) = torch.autograd.grad(y, x, torch.ones(shape))
            for tensor in (y, dx, other):
                assert tensor.is_contiguous(memory_format=memory_format), (shape, memory_format)


@pytest.mark.parametrize("ghost", [4, 2])
def test_input_of_any_layout(ghost):
    layer = GhostBatchNorm(3, ghost, dtype=torch.float64)
    for x in (
        sample((4, 5, 3)).transpose(1, 2),
        sample((5, 3, 4)).permute(2, 1, 0),
        sample((4, 6, 5))[:, ::2],
        sample((4, 1, 5)).expand(4, 3, 5),
        torch.as_strided(sample((40,)), (4, 3, 5), (5, 2, 1)),  # elements shared by several places
    ):
        dy = gradient(x.shape)
        check_same(train_step(layer, x, dy), train_step(layer, x.contiguous(), dy))


def test_saved_for_backward_is_the_input_and_numbers_per_channel():
    saved = []
    for layer in (SyncBatchNorm(8), GhostBatchNorm(8, 4), BatchRenorm(8)):
        for dtype in (torch.float32, torch.bfloat16):
            saved.clear()
            x = sample((16, 8, 12, 12), dtype=dtype).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                y = layer(x)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
            assert x.untyped_storage().data_ptr() in storages
            assert y.untyped_storage().data_ptr() not in storages
            del storages[x.untyped_storage().data_ptr()]
            # mean, invstd, scale and, for renorm, r and d (G, C) in float64; count (G, 1); groups (N,) int64.
            groups = 4 if isinstance(layer, GhostBatchNorm) else 1
            assert sum(storages.values()) <= 6 * groups * 8 * 8 + groups * 8 + 16 * 8


# -- ghost batches -----------------------------------------------------------------------------------------------------


def loop_of_batchnorm(chunks, dys, momentum, steps, prototype):
    """nn.BatchNorm over the chunks of each step; outputs, input gradients, summed parameter gradients, the layer."""
    layer = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    layer.load_state_dict(prototype.state_dict())
    results = []
    for step in range(steps):
        pieces = [train_step(layer, x, dy) for x, dy in zip(chunks[step], dys[step], strict=True)]
        y, dx, dweight, dbias = zip(*pieces, strict=True)
        results.append((torch.cat(y), torch.cat(dx), sum(dweight), sum(dbias)))
    return results, layer


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("size", "ghost", "remainder"),
    [(12, 4, "error"), (12, 12, "error"), (4, 1, "error"), (10, 4, "smaller"), (9, 4, "smaller"), (3, 8, "smaller")],
    ids=str,
)
def test_ghost_is_a_loop_over_chunks(size, ghost, remainder, momentum):
    layer = GhostBatchNorm(
        3, ghost, momentum=momentum, remainder=remainder, running_update="sequential", dtype=torch.float64
    )
    randomize(layer)
    xs, dys = ([make((size, 3, 4, 5), seed) for seed in range(3)] for make in (sample, gradient))
    chunked = [[t.split(ghost) for t in ts] for ts in (xs, dys)]
    expected, reference = loop_of_batchnorm(*chunked, momentum, 3, layer)
    for x, dy, truth in zip(xs, dys, expected, strict=True):
        check_same(train_step(layer, x, dy), truth)
    check_buffers(layer, reference)
    layer.eval(), reference.eval()  # evaluation knows no groups, and no remainder
    check_same((layer(sample((size + 1, 3, 4, 5))),), (reference(sample((size + 1, 3, 4, 5))),))


def test_groups_of_samples_set_from_outside():
    """Any assignment, in any order; ghost_batch_size is then not asked."""
    layer = GhostBatchNorm(3, 5, dtype=torch.float64)
    index = torch.tensor([2, 0, 0, 2, 1, 2, 0, 1])
    layer.sample_groups = SampleGroups(index, 4)
    x = sample((8, 3, 4))
    y = layer(x)
    for group in range(3):
        reference = nn.BatchNorm1d(3, dtype=torch.float64)
        torch.testing.assert_close(y[index == group], reference(x[index == group]), **EXACT)


# -- dtypes and empty batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layer_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_mix_of_dtypes(layer_dtype, input_dtype, training):
    layer = randomize(SyncBatchNorm(3)).to(layer_dtype).train(training)
    reference = nn.BatchNorm1d(3, dtype=torch.float64).train(training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(reference, name).copy_(getattr(layer, name))
    x, dy = sample((6, 3, 20), dtype=input_dtype), gradient((6, 3, 20)).to(input_dtype)
    y, dx, dweight, dbias = train_step(layer, x, dy)
    assert y.dtype == dx.dtype == input_dtype
    assert dweight.dtype == dbias.dtype == layer_dtype
    expected = train_step(reference, x.double(), dy.double())
    for found, truth in zip((y, dx, dweight, dbias), expected, strict=True):
        # float32 arithmetic or better, on sums of 120 terms of up to 20, and one rounding to the result's dtype.
        float32 = torch.finfo(torch.float32).eps
        eps = max(torch.finfo(found.dtype).eps, float32)
        torch.testing.assert_close(found.double(), truth, rtol=2 * eps, atol=100 * float32 + eps)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.fault(
    "data",
    "an empty batch in `{kind}`",
    moment="in training or evaluation",
    outcome="an empty output; the statistics stay as they are",
    lost="nothing",
)
def test_empty_batch(kind, training, shape):
    if kind == "ghost":
        layer = GhostBatchNorm(3, 2)
    else:
        layer = PLAIN[kind](3)
    layer.train(training)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    # Zeros, not None: a rank without samples still takes part in the reduction of gradients.
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_features(training):
    layer = SyncBatchNorm(0).train(training)
    assert layer(torch.empty(4, 0, 2)).shape == (4, 0, 2)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.fault(
    "data",
    "a batch with {bad} in it",
    moment="in training",
    outcome="the running statistics stay as they are, and it is counted",
    lost="nothing",
)
def test_nonfinite_batch_never_reaches_the_buffers(kind, bad):
    layer = PLAIN[kind](3)
    layer(sample((6, 3), dtype=torch.float32))
    before = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    x = sample((6, 3), dtype=torch.float32)
    x[1, 2] = bad
    layer(x)
    assert layer.num_nonfinite_batches == 1
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer(sample((6, 3), dtype=torch.float32))
    assert layer.num_batches_tracked == 2
    assert layer.num_nonfinite_batches == 1
