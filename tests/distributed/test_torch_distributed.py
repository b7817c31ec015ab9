"""torch's tests of SyncBatchNorm under DistributedDataParallel, with the layers of this package.

They are those of ``torch.testing._internal.distributed.distributed_test``, which need GPUs there, and two of
``test/distributed/test_c10d_nccl.py``, which torch's wheel does not have. Here two processes run them over gloo, on the
CPU: the options ``device_ids`` and ``output_device`` are GPUs', and so are left out. The model on one process has the
layers of torch and the whole batch. :data:`LEFT_OUT` names the tests that are left out, and why.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_suites
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

LEFT_OUT = {
    "test_sync_bn_logged": "DistributedDataParallel logs whether a model has torch's own class, which it then treats "
    "differently and refuses on CPUs",
}
HERE = {
    "test_DistributedDataParallel_SyncBatchNorm": "whole",
    "test_DistributedDataParallel_SyncBatchNorm_No_Affine": "no affine",
    "test_DistributedDataParallel_SyncBatchNorm_2D_Input": "2D input",
    "test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process": "single input",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient": "sizes differ",
    "test_DistributedDataParallel_SyncBatchNorm_Channels_Last": "channels_last",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value": "test_running_values",
    "test_DistributedDataParallel_SyncBatchNorm_half": "test_half",
    "test_SyncBatchNorm_process_group": "test_process_group",
    "test_ddp_sync_bn_training_vs_eval": "test_training_and_evaluation",
    "test_ddp_uneven_inputs_stop_iteration_sync_bn": "test_early_termination",
}
"""By torch's name, the case of :func:`test_training_equals_one_process` or the test that stands for it here."""

WORLD = 2
KINDS: dict[str, dict[str, Any]] = {"sync": {}, "renorm": {"sync": True}}
"""Options of ``convert``. Batch renormalization is in its warm-up here, where it is batch normalization."""
each_kind = pytest.mark.parametrize("kind", KINDS)


class BatchNormNet(nn.Module):
    """The shape of torch's test model: a normalization of 4 channels between two linear layers, and a softmax."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(2, 40, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=affine)
        self.second = nn.Linear(40, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x).view(-1, 4, 10))
        return self.second(y.flatten(1)).softmax(1)


CASES: dict[str, dict[str, Any]] = {
    "whole": {"make": BatchNormNet, "shape": (2,), "classes": (4,), "sizes": (2, 2)},
    "no affine": {"make": lambda: BatchNormNet(affine=False), "shape": (2,), "classes": (4,), "sizes": (2, 2)},
    "2D input": {"make": lambda: nn.BatchNorm1d(2), "shape": (2,), "sizes": (2, 2)},
    "single input": {"make": lambda: nn.BatchNorm1d(2), "shape": (2,), "sizes": (1, 1)},
    "sizes differ": {"make": BatchNormNet, "shape": (2,), "classes": (4,), "sizes": (2, 3)},
    "channels_last": {
        "make": lambda: nn.BatchNorm2d(2, momentum=0.99),
        "shape": (2, 4, 4),
        "sizes": (2, 2),
        "memory_format": torch.channels_last,
    },
    "channels_last, volumes": {
        "make": lambda: nn.BatchNorm3d(2, momentum=0.99),
        "shape": (2, 4, 4, 4),
        "sizes": (2, 2),
        "memory_format": torch.channels_last_3d,
    },
}


def test_the_suite_is_whole():
    names = torch_suites.distributed_tests("sync_?batch_?norm|sync_?bn")
    assert set(names) == set(HERE) | set(LEFT_OUT)
    assert not set(HERE) & set(LEFT_OUT)
    assert all(place in CASES or callable(globals()[place]) for place in HERE.values())


def wrapped(model, kind):
    return DistributedDataParallel(syncbn.convert(model, kind, **KINDS[kind]))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def close(found, expected, dtype):
    """torch's own tolerance in float32. In float64, five steps of small networks are off by some hundred roundings."""
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **tolerance)


def take_steps(kind, name, dtype, steps=5):
    """Steps of gradient descent with a rate of 1, as in torch's tests; the model is saved and loaded on the way."""
    case = CASES[name]
    torch.manual_seed(0)
    alone = case["make"]().to(dtype)
    together = saved_and_loaded(wrapped(copy.deepcopy(alone), kind))
    sizes, rank = case["sizes"], dist.get_rank()
    x, target = (torch.randn(sum(sizes), *case.get(key, case["shape"]), dtype=dtype) for key in ("shape", "classes"))
    if "memory_format" in case:
        x = x.to(memory_format=case["memory_format"])
    for step in range(steps):
        start = sum(sizes[:rank])
        own = slice(start, start + sizes[rank])
        y = together(x[own])
        # The mean over the ranks, which DistributedDataParallel takes, is then the gradient of the whole batch's mean.
        (nn.functional.mse_loss(y, target[own]) * (WORLD * sizes[rank] / sum(sizes))).backward()
        expected = alone(x)
        nn.functional.mse_loss(expected, target).backward()
        close(y, expected[own], dtype)
        if "memory_format" in case:
            assert y.is_contiguous(memory_format=case["memory_format"])
        for mine, truth in zip(together.module.parameters(), alone.parameters(), strict=True):
            close(mine.grad, truth.grad, dtype)
            for parameter in (mine, truth):
                parameter.data += parameter.grad
                parameter.grad = None
        for (key, mine), truth in zip(together.module.named_buffers(), alone.buffers(), strict=True):
            assert key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
            close(mine, truth, dtype)
        x, target = x[torch.randperm(len(x))], target[torch.randperm(len(x))]
        if step == 2:
            together = saved_and_loaded(together)


@each_kind
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_training_equals_one_process(pools, kind, name, dtype):
    pools(WORLD).run(take_steps, kind, name, dtype)


def running_values(kind):
    """Each rank's input is ten times as long and a tenth as large as that of the rank before."""
    model = wrapped(nn.BatchNorm1d(2, momentum=0.99), kind)
    inputs = []
    for rank in range(WORLD):
        ones = torch.ones(2, 1, 10 ** (rank + 1))
        inputs.append(torch.cat([ones * 0.1 ** (rank - 1), ones * 0.3 ** (rank - 1)], dim=1))
    whole = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)
    for _ in range(100):
        model(inputs[dist.get_rank()]).mean().backward()
    torch.testing.assert_close(model.module.running_mean, whole.mean(1))
    torch.testing.assert_close(model.module.running_var, whole.var(1))


@each_kind
def test_running_values(pools, kind):
    pools(WORLD).run(running_values, kind)


def train_half(kind):
    torch.manual_seed(0)
    model = wrapped(BatchNormNet().half(), kind)
    y = model(torch.randn(2, 2, dtype=torch.float16))
    assert y.dtype == torch.float16
    y.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float16, name
        assert parameter.grad.isfinite().all(), name
    return model.module.norm.running_mean.tolist()


@each_kind
def test_half(pools, kind):
    first, second = pools(WORLD).run(train_half, kind)
    assert first == second


def groups_of_nested_layers():
    group = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
    model = nn.Sequential(nn.Sequential(BatchNormNet()), nn.BatchNorm1d(4))
    syncbn.convert(model, "sync", process_group=group)
    return [m.scope.ranks for m in model.modules() if isinstance(m, syncbn.SyncBatchNorm)]


def test_process_group(pools):
    """A group reaches layers that are nested in others."""
    assert pools(WORLD).run(groups_of_nested_layers) == [[(0,)] * 2, [(1,)] * 2]


def gathers(model, x):
    with torch.profiler.profile() as profile:
        model(x).sum().backward()
    return [event.name for event in profile.events() if "gather" in event.name]


def train_and_evaluate(kind):
    """In evaluation one rank goes alone: a collective would hang."""
    torch.manual_seed(dist.get_rank())
    norm = nn.BatchNorm2d(2, momentum=0.99, track_running_stats=kind == "renorm")
    model, x = wrapped(norm, kind), torch.randn(10, 2, 4, 4)
    assert gathers(model, x)
    if dist.get_rank() == 0:
        evaluated = model.module.eval()
        assert not gathers(evaluated, x)
        with torch.no_grad():
            alone = copy.deepcopy(evaluated)
            for _ in range(6):
                assert torch.equal(model.eval()(x) if kind == "sync" else evaluated(x), alone(x))
    dist.barrier()


@each_kind
def test_training_and_evaluation(pools, kind):
    """It is torch's ``test_ddp_inference`` too. With buffers, DistributedDataParallel itself would broadcast them."""
    pools(WORLD).run(train_and_evaluate, kind)


def take_joined_steps(model, number, taken):
    with model.join(throw_on_early_termination=True):
        for step in range(number):
            model(torch.randn(10, 2)).sum().backward()
            for parameter in model.parameters():
                parameter.data += parameter.grad
                parameter.grad = None
            taken.append(step)


def end_early(kind):
    """Rank 1 has half of the inputs of rank 0."""
    torch.manual_seed(0)
    rank, least, taken = dist.get_rank(), 3, []
    model = wrapped(BatchNormNet(), kind)
    expected = "Detected at least one rank that exhausted inputs" if rank == 0 else "Rank 1 exhausted all inputs"
    with pytest.raises(RuntimeError, match=expected):
        take_joined_steps(model, 2 * least if rank == 0 else least, taken)
    assert taken == list(range(least))
    return [parameter.tolist() for parameter in model.parameters()]


@each_kind
def test_early_termination(pools, kind):
    first, second = pools(WORLD).run(end_early, kind)
    assert first == second


def empty_inputs(kind):
    model = wrapped(nn.Sequential(nn.BatchNorm2d(2)), kind)
    empty, full = torch.zeros(0, 2, 11, 13), torch.ones(2, 2, 11, 13)
    for x in (empty if dist.get_rank() == 0 else full, empty):
        for needs_gradient in (True, False):
            y = model(x.clone().requires_grad_(needs_gradient))
            assert not y.isnan().any()
            y.sum().backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@each_kind
def test_empty_inputs(pools, kind):
    """``test_sync_batch_norm_empty_input`` and ``_only_empty_input`` of ``test_c10d_nccl.py``."""
    pools(WORLD).run(empty_inputs, kind)
