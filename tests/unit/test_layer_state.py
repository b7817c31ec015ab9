"""What a layer keeps and says: checkpoints, copies, dtypes, its repr, and the errors of wrong use."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.layers import BatchError, RowsError, SampleGroups

LAYERS = {
    "sync": lambda c=3, **options: SyncBatchNorm(c, **options),
    "sync of two": lambda c=3, **options: SyncBatchNorm(c, sync_group_size=2, **options),
    "ghost": lambda c=3, **options: GhostBatchNorm(c, 2, remainder="smaller", **options),
    "renorm": lambda c=3, **options: BatchRenorm(c, warmup_steps=0, r_ramp_end=10, d_ramp_end=10, **options),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def sample(shape=(6, 3, 4, 5), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def trained(layer, steps=3):
    for seed in range(steps):
        layer(sample((6, layer.num_features, 4, 5), seed))
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.add_(torch.arange(1, parameter.numel() + 1) / (index + 2))
    return layer


def check_equal(a, b):
    """Same class, same tensors, same outputs in training (so same settings) and evaluation."""
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    for training in (True, False):
        a.train(training), b.train(training)
        assert torch.equal(a(sample(seed=9)), b(sample(seed=9)))


# -- checkpoints and copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torchs", [nn.BatchNorm2d, nn.SyncBatchNorm])
@each_layer
def test_checkpoints_are_torchs_in_both_directions(make, torchs):
    ours, theirs = trained(make()), torchs(3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(theirs(sample()), ours(sample()))
    fresh = make()
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in fresh.state_dict().items())


@each_layer
def test_old_checkpoints_without_a_step_count_load(make):
    state = trained(make()).state_dict()
    del state["num_batches_tracked"]
    del state._metadata
    layer = make()
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, state["running_mean"])


@each_layer
def test_checkpoint_of_narrower_dtype_leaves_the_buffers_wide(make):
    state = {k: v.half() if v.is_floating_point() else v for k, v in trained(make()).state_dict().items()}
    layer = make()
    layer.load_state_dict(state)
    assert layer.running_var.dtype == torch.float32


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
@each_layer
def test_copies(make, duplicate):
    layer = trained(make())
    twin = duplicate(layer)
    check_equal(layer, twin)
    assert {t.data_ptr() for t in layer.state_dict().values()}.isdisjoint(
        t.data_ptr() for t in twin.state_dict().values()
    )


def test_a_copy_forgets_what_the_ranks_agreed_on():
    layer = GhostBatchNorm(3, 2)
    layer._agreed_groups = 4
    assert copy.deepcopy(layer)._agreed_groups is None
    assert pickle.loads(pickle.dumps(layer))._agreed_groups is None
    assert layer._agreed_groups == 4


@each_layer
def test_functional_call_uses_the_tensors_given(make):
    layer, other = make(), trained(make())
    state = {**dict(other.named_parameters()), **{k: v.clone() for k, v in other.named_buffers()}}
    y = torch.func.functional_call(layer, state, sample(seed=5))
    assert torch.equal(y, other(sample(seed=5)))
    for name, buffer in other.named_buffers():
        assert torch.equal(state[name], buffer), name
    assert layer.num_batches_tracked == 0


# -- dtypes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_layer
def test_running_statistics_stay_wide(make, dtype):
    for layer in (make().to(dtype), nn.Sequential(make()).to(dtype)[0], make(dtype=dtype)):
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        x = torch.tensor([0.0, 2.0] * 3, dtype=dtype).reshape(6, 1, 1, 1).expand(6, 3, 4, 5)
        for _ in range(300):  # a moving average in bf16 stops some 1e-2 short of the mean
            layer(x)
        torch.testing.assert_close(
            layer.running_mean, torch.ones(3), rtol=1e-6 if layer.momentum == 0.1 else 0.1, atol=0
        )
        layer.eval()
        assert layer(sample().to(dtype)).dtype == dtype
    assert make().double().running_mean.dtype == torch.float64
    assert make().double().half().running_mean.dtype.itemsize >= 4
    assert make().half().float().running_mean.dtype == torch.float32


@each_layer
def test_meta_device_and_to_empty(make):
    layer = make(device="meta")
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.num_nonfinite_batches.fill_(7)
    layer.reset_parameters()
    assert all(torch.equal(value, make().state_dict()[name]) for name, value in layer.state_dict().items())
    assert layer.num_nonfinite_batches == 0


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@each_layer
def test_reset_parameters(make, options):
    layer = trained(make(**options))
    layer.reset_parameters()
    assert all(torch.equal(value, make(**options).state_dict()[name]) for name, value in layer.state_dict().items())
    assert (layer.weight is None) == (options == {"affine": False})
    assert (layer.bias is None) == bool(options)


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (SyncBatchNorm(3, eps=0.5), ["3, eps=0.5", "momentum=0.1", "sync=world"]),
        (SyncBatchNorm(3, sync_group_size=2), ["sync=2"]),
        (SyncBatchNorm(3, process_group=[0, 3]), ["sync=(0, 3)"]),
        (GhostBatchNorm(3, 4), ["ghost_batch_size=4", "remainder='error'"]),
        (GhostBatchNorm(3, 4, running_update="total", sync=True), ["running_update='total'", "sync=world"]),
        (BatchRenorm(3, r_max=2, warmup_steps=7), ["r_max=2", "d_max=5.0", "warmup_steps=7", "r_ramp_end=40000"]),
        (BatchRenorm(3, ghost_batch_size=4, sync_group_size=2), ["ghost_batch_size=4", "sync=2", "d_ramp_end=25000"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_repr(layer, parts):
    assert all(part in repr(layer) for part in parts), repr(layer)


@pytest.mark.parametrize(
    ("shape", "dtype", "named"),
    [
        ((6,), torch.float32, ["(6,)", "(N, C) or (N, C, *)", "at least 2 dimensions"]),
        ((), torch.float32, ["()", "at least 2 dimensions"]),
        ((6, 4), torch.float32, ["(6, 4)", "expected 3 channels in dimension 1, got 4"]),
        ((3, 6, 6), torch.float32, ["(3, 6, 6)", "got 6"]),
        ((6, 3), torch.int64, ["(6, 3)", "floating-point", "torch.int64", "convert"]),
        ((6, 3), torch.complex64, ["floating-point", "torch.complex64"]),
        ((1, 3), torch.float32, ["(1, 3)", "one value per channel", "larger batch", "eval mode"]),
        ((1, 3, 1, 1), torch.float32, ["(1, 3, 1, 1)", "one value per channel"]),
    ],
    ids=str,
)
@each_layer
def test_wrong_input(make, shape, dtype, named):
    layer = make()
    layer.qualified_name = "features.1"
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=type(layer).__name__) as caught:
        layer(torch.ones(shape, dtype=dtype))
    # A batch that another one could replace is told from an input that the layer never takes.
    assert isinstance(caught.value, BatchError) == ("one value per channel" in named)
    for part in ["'features.1'", "num_features=3", *named]:
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_ghost_remainder():
    with pytest.raises(BatchError, match="no multiple of ghost_batch_size=4") as caught:
        GhostBatchNorm(3, 4)(sample((6, 3)))
    for part in ["GhostBatchNorm", "(6, 3)", "drop the last", "remainder='smaller'"]:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"BatchRenorm.*no multiple of ghost_batch_size=4"):
        BatchRenorm(3, ghost_batch_size=4)(sample((6, 3)))


def test_single_value_in_one_of_the_groups():
    layer = GhostBatchNorm(3, 4, remainder="smaller")
    with pytest.raises(BatchError, match="one value per channel"):
        layer(sample((5, 3)))
    layer(sample((5, 3, 2)))  # one sample of two values has a variance
    layer.sample_groups = SampleGroups(torch.tensor([0, 0, 1]), 2)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(sample((3, 3)))


def test_single_value_in_evaluation_on_batch_statistics():
    layer = SyncBatchNorm(3, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="one value per channel"):
        layer(sample((1, 3)))
    assert layer(sample((1, 3, 4))).shape == (1, 3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyncBatchNorm(3, sync_group_size=0), "sync_group_size must be a positive integer or None, got 0"),
        (lambda: SyncBatchNorm(3, sync_group_size=2.0), "sync_group_size must be .* got 2.0"),
        (
            lambda: SyncBatchNorm(3, process_group=[0, 1], sync_group_size=2),
            "process_group or sync_group_size, not both",
        ),
        (lambda: SyncBatchNorm(3, process_group=-100), "process_group must be a process group that .* got -100"),
        (lambda: GhostBatchNorm(3, 0), "ghost_batch_size must be a positive integer or None, got 0"),
        (lambda: GhostBatchNorm(3, True), "ghost_batch_size must be .* got True"),
        (lambda: GhostBatchNorm(3, 2.5), "ghost_batch_size must be .* got 2.5"),
        (lambda: GhostBatchNorm(3, 2, max_ghost_groups=-1), "max_ghost_groups must be .* got -1"),
        (lambda: GhostBatchNorm(3, 2, remainder="drop"), "remainder must be one of 'error', 'smaller', got 'drop'"),
        (lambda: GhostBatchNorm(3, 2, running_update="ema"), "running_update must be one of .* got 'ema'"),
        (lambda: BatchRenorm(3, track_running_stats=False), "needs track_running_stats=True"),
        (lambda: BatchRenorm(3, r_max=0.5), "r_max must be a finite number of at least 1, got 0.5"),
        (lambda: BatchRenorm(3, r_max=float("inf")), "r_max must be .* got inf"),
        (lambda: BatchRenorm(3, d_max=float("nan")), "d_max must be a finite number of at least 0, got nan"),
        (lambda: BatchRenorm(3, warmup_steps=-1), "0 <= warmup_steps <= r_ramp_end, got -1 and 40000"),
        (lambda: BatchRenorm(3, d_ramp_end=4_999), "0 <= warmup_steps <= d_ramp_end, got 5000 and 4999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_arguments():
    # Sequential updates count a step for each group, and the ramps count steps.
    with pytest.raises(TypeError, match="running_update"):
        BatchRenorm(3, ghost_batch_size=2, running_update="sequential")


@each_layer
def test_rows_that_are_not_the_samples_of_the_groups(make):
    layer = make()
    layer.sample_groups = SampleGroups(index=torch.tensor([0, 0, 1, 1]), number=2)
    with pytest.raises(RowsError, match="its groups are those of 4 samples: the rows of this layer are not samples"):
        layer(sample((12, 3)))
