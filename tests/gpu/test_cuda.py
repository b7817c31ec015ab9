"""The layers on a CUDA device: float64 on the CPU is the truth, and the host never waits for the device."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, REHEARSAL, no_synchronization, only_on_cuda, twins
from pool import Pool
from torch import nn

import syncbn
from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.bench.costs import kernels, peak_bytes, saved
from syncbn.collectives import all_reduce_sum
from syncbn.layers import SampleGroups


def grouped(c, **options):
    layer = SyncBatchNorm(c, **options)
    index = torch.tensor([0, 0, 1, 1, 0, 2, 2, 1], device=options.get("device", "cpu"))
    layer.sample_groups = SampleGroups(index, 4, divisor=3.5, smallest=2)
    return layer


def inverted(c, **options):
    return SyncBatchNorm(c, save="output", activation="leaky_relu", negative_slope=0.1, **options)


LAYERS = {
    "sync": SyncBatchNorm,
    "output": inverted,
    "cumulative": lambda c, **o: SyncBatchNorm(c, momentum=None, **o),
    "grouped": grouped,
    "ghost": lambda c, **o: GhostBatchNorm(c, 4, **o),
    "ghost, sequential": lambda c, **o: GhostBatchNorm(c, 3, remainder="smaller", running_update="sequential", **o),
    "ghost, total": lambda c, **o: GhostBatchNorm(c, 3, remainder="smaller", running_update="total", **o),
    "renorm": lambda c, **o: BatchRenorm(c, warmup_steps=0, r_ramp_end=4, d_ramp_end=4, **o),
    "renorm of ghosts": lambda c, **o: BatchRenorm(c, warmup_steps=0, d_ramp_end=4, ghost_batch_size=4, **o),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def sample(shape, seed, dtype=torch.float32, loc=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + loc).to(dtype)


def true_step(layer, x, dy, **more):
    with twins():
        return step(layer, x, dy, **more)


def make_pair(make, c, dtype=torch.float32):
    """A layer on the device, and the same one in float64 on the CPU."""
    layer, truth = make(c, device=DEVICE, dtype=dtype), make(c, dtype=torch.float64)
    with torch.no_grad():
        for module in (layer, truth):
            module.weight.copy_(torch.linspace(0.5, 2.0, c))
            module.bias.copy_(torch.linspace(-1.0, 1.0, c))
    return layer, truth


def step(layer, x, dy, **more):
    x = x.detach().requires_grad_()
    y = layer(x, **more)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)


def largest_spread(x):
    """The largest (mean / std)^2 of a channel over two samples: no ghost group here is smaller."""
    pairs = x.double().reshape(*x.shape[:2], -1)[torch.combinations(torch.arange(len(x)))]  # (pairs, 2, C, positions)
    return float((pairs.mean((1, 3)).square() / pairs.transpose(1, 2).flatten(2).var(2, correction=0)).max())


def check(found, expected, dtype, from_output=False, spread=25.0):
    """Output and input gradient, then the parameters' gradients; ``from_output`` is how these were computed."""
    # A few roundings in float32 and one to the result's own dtype. In float64 the statistics are not exact beside them:
    # what is reduced costs the variance ``spread`` = (mean / std)^2 roundings.
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = max(torch.finfo(dtype).eps, (4 * spread if dtype == torch.float64 else 8) * wide)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        # The parameters' gradients are sums over up to a thousand values of up to 10, and may be small themselves.
        atol = 4 * eps if index < 2 else 1000 * wide
        if index and from_output:
            # The input's error is up to (1 + |bias|) / |weight| = 4 roundings of the output, in each term of the sums.
            atol = (16 if index < 2 else 128) * eps
        torch.testing.assert_close(a.cpu().double(), b, rtol=2 * eps, atol=atol)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((8, 5), False), ((8, 6, 17), False), ((8, 7, 9, 11), False), ((8, 7, 9, 11), True), ((8, 3, 4, 5, 6), True)],
    ids=str,
)
@each_layer
def test_against_float64_on_the_cpu(make, shape, channels_last, dtype):
    layer, truth = make_pair(make, shape[1], torch.float64 if dtype == torch.float64 else torch.float32)
    for seed in range(3):
        x, dy = sample(shape, seed, dtype, loc=5.0), sample(shape, 10 + seed, dtype)
        given = x.to(DEVICE)
        if channels_last:
            memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            given = given.contiguous(memory_format=memory_format)
        found = step(layer, given, dy.to(DEVICE))
        check(found, true_step(truth, x.double(), dy.double()), dtype, make is inverted, largest_spread(x))
        assert found[0].dtype == found[1].dtype == dtype
        assert found[0].stride() == found[1].stride() == given.stride()
    for name, buffer in truth.named_buffers():
        # The statistics are exact, the buffers float32.
        torch.testing.assert_close(getattr(layer, name).cpu().to(buffer.dtype), buffer, rtol=1e-6, atol=1e-6)
    layer.eval(), truth.eval()
    check(step(layer, given, dy.to(DEVICE)), true_step(truth, x.double(), dy.double()), dtype)


def valid_places(shape):
    """A mask with a sample of padding alone."""
    mask = sample((shape[0], *shape[2:]), 20) < 0.3
    mask[5] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), [((8, 6, 17), False), ((8, 7, 9, 11), True)], ids=str)
@each_layer
def test_masked_input(make, shape, channels_last, dtype):
    layer, truth = make_pair(make, shape[1])
    x, dy, mask = sample(shape, 0, dtype, loc=5.0), sample(shape, 1, dtype), valid_places(shape)
    given = torch.where(mask[:, None], x, float("nan")).to(DEVICE)
    if channels_last:
        given = given.contiguous(memory_format=torch.channels_last)
    for mode in ("train", "eval"):
        getattr(layer, mode)(), getattr(truth, mode)()
        found = step(layer, given, dy.to(DEVICE), mask=mask.to(DEVICE))
        check(found, true_step(truth, x.double(), dy.double(), mask=mask), dtype, make is inverted)
        assert found[0].stride() == given.stride()
    for name, buffer in truth.named_buffers():
        # The statistics are exact, the buffers float32.
        torch.testing.assert_close(getattr(layer, name).cpu().to(buffer.dtype), buffer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 5), (8, 5, 40, 40)], ids=str)
def test_variance_far_from_zero(shape):
    x = sample(shape, 0, torch.float32, loc=1e4)
    layer = SyncBatchNorm(5, momentum=1.0, device=DEVICE)
    layer(x.to(DEVICE))
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(layer.running_var.cpu().double(), x.double().var(dims), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_layer
def test_autocast_changes_nothing_but_the_input(make, dtype):
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(3, 8, 3, device=DEVICE), make(8, device=DEVICE)
    twin = copy.deepcopy(layer)
    x = sample((8, 3, 9, 9), 0).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype):
        hidden = conv(x)
        y = layer(hidden)
        inside = torch.autograd.grad(y.float().square().sum(), [hidden, *layer.parameters()])
    assert hidden.dtype == y.dtype == dtype
    hidden = hidden.detach().requires_grad_()
    outside = twin(hidden)
    # Sums over groups are added in no fixed order on the device, in float64.
    close = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(outside, y, **close)
    gradients = torch.autograd.grad(outside.float().square().sum(), [hidden, *twin.parameters()])
    for a, b in zip(inside, gradients, strict=True):
        torch.testing.assert_close(a, b, **close)
    assert layer.running_var.dtype == torch.float32


def test_half_module_keeps_its_statistics_wide():
    layer = SyncBatchNorm(4).half().to(DEVICE)
    for training in (True, False):
        layer.train(training)
        assert layer(sample((8, 4, 3, 3), 0, torch.float16).to(DEVICE)).dtype == torch.float16
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_second_derivative():
    layer = GhostBatchNorm(2, 2, dtype=torch.float64, device=DEVICE)
    x = sample((4, 2, 2), 0, torch.float64).to(DEVICE).requires_grad_()
    # Sums over groups are added in no fixed order.
    assert torch.autograd.gradgradcheck(layer, x, nondet_tol=1e-9, atol=1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each_layer
def test_nonfinite_batch_never_reaches_the_buffers(make, bad):
    layer = make(3, device=DEVICE)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.full((8, 3, 4), bad, device=DEVICE))
    assert layer.num_nonfinite_batches == 1
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_messages_and_empty_batches():
    layer = SyncBatchNorm(3, device=DEVICE)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.ones(1, 3, device=DEVICE))
    x = torch.empty(0, 3, 4, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.num_batches_tracked == 0


@each_layer
def test_deterministic_algorithms(make):
    """The same bits each time. No operation of torch refuses to run."""
    x, dy = (sample((8, 6, 5, 5), seed).to(DEVICE) for seed in range(2))
    plain, *others = (make(6, device=DEVICE) for _ in range(3))
    expected = [*step(plain, x, dy), *plain.buffers()]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = ([*step(layer, x, dy), *layer.buffers()] for layer in others)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


# -- memory and launches -----------------------------------------------------------------------------------------------


MEMORY = {
    "alone": ({}, False, 2),  # the output and the input's gradient
    "relu": ({"activation": "relu"}, False, 2),
    "add": ({}, True, 2),  # the residual's gradient is the output's
    "add, relu": ({"activation": "relu"}, True, 3),  # it is a tensor of its own
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MEMORY)
def test_peak_memory(name, memory_format, dtype):
    """A step allocates tensors of the input's size only for results, and keeps none but the output for backward."""
    options, has_residual, tensors = MEMORY[name]
    layer = SyncBatchNorm(16, device=DEVICE, **options)
    given = (sample((4, 16, 32, 32), seed, dtype).to(DEVICE, memory_format=memory_format) for seed in range(3))
    x, residual, dy = (t.requires_grad_() for t in given)
    leaves = [x, *([residual] if has_residual else []), layer.weight, layer.bias]

    def run():
        return torch.autograd.grad(layer(*leaves[:-2]), leaves, dy)

    for _ in range(2):
        run()
    assert peak_bytes(run, DEVICE) <= tensors * x.nbytes + 2**14  # small tensors of 512 bytes or more
    kept = saved(run, [*leaves, *layer.buffers()], 16)
    # The moments, and the output if the residual adds no gradient of its own: x and the residual are known.
    assert kept["saved_bytes"] <= 2**10


def test_output_alone_is_kept():
    """With ``save="output"`` the input is free after the forward pass."""
    layer = inverted(16, device=DEVICE)
    x = sample((4, 16, 32, 32), 0).to(DEVICE).requires_grad_()
    kept = saved(lambda: layer(x), [*layer.parameters(), *layer.buffers()], 16)
    assert x.nbytes <= kept["saved_bytes"] <= x.nbytes + 2**10


@only_on_cuda
@pytest.mark.parametrize(("name", "most"), {"sync": 8, "ghost": 15, "renorm": 13}.items())
def test_launches(name, most):
    """Six kernels, and two fills of sums with zeros. Ghost groups have an index and counts, renorm scale and shift."""
    layer = LAYERS[name](6, device=DEVICE)
    x, dy = (sample((8, 6, 5, 5), seed).to(DEVICE) for seed in range(2))
    for _ in range(2):
        step(layer, x, dy)
    assert 6 < kernels(lambda: step(layer, x, dy))["kernels"] <= most


# -- the host does not wait --------------------------------------------------------------------------------------------


@only_on_cuda
def test_the_check_for_synchronization_works():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization():
        x.sum().item()


@only_on_cuda
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_layer
def test_no_host_synchronization(make, dtype, training):
    layer = make(6, device=DEVICE).train(training)
    x, dy = (sample((8, 6, 5, 5), seed, dtype).to(DEVICE) for seed in range(2))
    x.requires_grad_()
    layer(x).backward(dy)  # what is loaded or allocated once may wait
    with no_synchronization():
        for _ in range(2):
            layer(x).backward(dy)
    assert layer.num_batches_tracked > 0 or not training


@only_on_cuda
@each_layer
def test_no_host_synchronization_with_a_mask(make):
    layer, mask = make(6, device=DEVICE), valid_places((8, 6, 5, 5)).to(DEVICE)
    x, dy = (sample((8, 6, 5, 5), seed).to(DEVICE) for seed in range(2))
    x.requires_grad_()
    layer(x, mask=mask).backward(dy)  # what is loaded or allocated once may wait
    with no_synchronization():
        layer(x, mask=mask).backward(dy)
    assert layer.num_batches_tracked > 0


@only_on_cuda
@each_layer
def test_capture_in_a_cuda_graph(make):
    layer = make(6, device=DEVICE)
    x, dy = (sample((8, 6, 5, 5), seed).to(DEVICE) for seed in range(2))
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    twin = copy.deepcopy(layer)
    twin.zero_grad(set_to_none=True)
    for seed in range(2, 5):
        other = sample((8, 6, 5, 5), seed).to(DEVICE)
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        other.requires_grad_()
        expected = twin(other)
        gradients = torch.autograd.grad(expected, [other, twin.weight, twin.bias], dy)
        # The same kernels on the same numbers; sums over groups are added in no fixed order, in float64.
        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(y, expected, **close)
        for tensor, gradient in zip((x, layer.weight, layer.bias), gradients, strict=True):
            torch.testing.assert_close(tensor.grad, gradient, **close)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(getattr(layer, name), buffer, **close)


@only_on_cuda
@pytest.mark.parametrize("name", ["sync", "ghost", "renorm"])
def test_compiled_in_one_graph(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LAYERS[name](8), nn.ReLU(inplace=True)).to(DEVICE).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(2):
        x = sample((8, 3, 9, 9), seed, torch.float64).to(DEVICE)
        results = []
        for module, run in ((model, compiled), (twin, twin)):
            module.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in module.parameters()), *module.buffers()])
        for found, expected in zip(*results, strict=True):
            # float64, summed in another order; relative to the largest element.
            bound = 1e-10 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(found, expected, rtol=0, atol=bound)


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def nccl(tmp_path):
    if not (REHEARSAL or dist.is_nccl_available()):
        pytest.skip("torch was built without NCCL")
    backend, device = ("gloo", None) if REHEARSAL else ("nccl", DEVICE)
    dist.init_process_group(backend, f"file://{tmp_path}/rendezvous", rank=0, world_size=1, device_id=device)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.mark.parametrize("n", [8, 0])
@each_layer
def test_layer_over_nccl(make, n, nccl, monkeypatch):
    """A world of one communicates only when told to: then the collectives are real, and change nothing."""
    if make is grouped and not n:
        pytest.skip("its groups are of 8 samples")
    plain = make(6, device=DEVICE)
    layer = copy.deepcopy(plain)
    layer.scope = SyncBatchNorm(6).scope
    x, dy = (sample((n, 6, 5), seed).to(DEVICE) for seed in range(2))
    before = copy.deepcopy(plain.state_dict())
    assert all_reduce_sum(x, nccl) is not x
    expected = step(plain, x, dy)
    monkeypatch.setattr("syncbn.layers.resolve_name", lambda scope: nccl)
    step(layer, x, dy)  # what is loaded or agreed on once may wait
    layer.load_state_dict(before)
    # Without a sample, the host checks that no group has a single value.
    with no_synchronization() if n else contextlib.nullcontext():
        found = step(layer, x, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def train_on_device(sizes, backend):
    """This rank's rows of one step, float64: over the gloo world on one device, or over NCCL with a device each."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if backend == "nccl" else DEVICE
    if not REHEARSAL:
        torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl") if backend == "nccl" else None
    layer = SyncBatchNorm(3, process_group=group, device=device, dtype=torch.float64)
    start = sum(sizes[:rank])
    x, dy = (sample((sum(sizes), 3, 4), s, torch.float64)[start : start + sizes[rank]].to(device) for s in range(2))
    return [t.cpu() for t in (*step(layer, x, dy), layer.running_var)]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("sizes", [(4, 3), (5, 0)], ids=str)
def test_two_processes(sizes, backend):
    if backend == "nccl" and (not dist.is_nccl_available() or torch.cuda.device_count() < 2):
        pytest.skip("NCCL needs a device for each rank")
    pool = Pool(2)
    try:
        first, second = pool.run(train_on_device, sizes, backend)
    finally:
        pool.stop()
    truth = nn.BatchNorm1d(3, dtype=torch.float64)
    expected = step(truth, *(sample((sum(sizes), 3, 4), s, torch.float64) for s in range(2)))
    exact = {"rtol": 1e-12, "atol": 1e-12}
    for index in (0, 1):
        torch.testing.assert_close(torch.cat([first[index], second[index]]), expected[index], **exact)
    for index in (2, 3):
        torch.testing.assert_close(first[index] + second[index], expected[index], **exact)
    for result in (first, second):
        torch.testing.assert_close(result[4], truth.running_var, **exact)


def test_converted_model_trains():
    """Under autocast, channels_last, with gradient scaling: as it is used."""
    from syncbn.compat import import_torchvision

    torch.manual_seed(0)
    model = syncbn.convert(import_torchvision("models").resnet18(num_classes=4), "ghost", ghost_batch_size=4)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler(DEVICE.type, 2.0**10)
    # The interpreter takes a second or more for each kernel.
    steps, pixels = (12, 64) if DEVICE.type == "cuda" else (2, 32)
    x, target = sample((8, 3, pixels, pixels), 0).to(DEVICE), torch.arange(8, device=DEVICE) % 4
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
