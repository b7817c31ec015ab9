"""One update of the running statistics for several forward passes, against one batch of as many ghost groups."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.layers import SmallBatchNorm

RENORM = {"warmup_steps": 1, "r_ramp_end": 3, "d_ramp_end": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("GhostBatchNorm", {"remainder": "smaller"}),
    "total": ("GhostBatchNorm", {"remainder": "smaller", "running_update": "total"}),
    "cumulative": ("GhostBatchNorm", {"remainder": "smaller", "momentum": None}),
    "renorm": ("BatchRenorm", {"remainder": "smaller", **RENORM}),
}


def layer(name: str, options: dict[str, Any], size: int) -> SmallBatchNorm:
    found: SmallBatchNorm = getattr(syncbn, name)(3, **options, ghost_batch_size=size, dtype=torch.float64)
    return found


def step(number: int) -> Tensor:
    """(14, 3, 5), with channels far from zero."""
    x = torch.randn(14, 3, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return (1 + number) * x + torch.tensor([[-20.0], [0.0], [40.0]], dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_ghost_groups_of_one_batch(case: str) -> None:
    """Passes of 8 and 6 samples, each of ghost groups of 4, the last of 2."""
    one, several = (layer(*CASES[case], size=4) for _ in range(2))
    for number in range(4):
        x = step(number)
        expected = one(x)
        with syncbn.accumulate_statistics(several):
            found = torch.cat([several(micro_batch) for micro_batch in x.split((8, 6))])
            assert int(several.num_batches_tracked) == number
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for name, buffer in one.named_buffers():
            torch.testing.assert_close(several.get_buffer(name), buffer, rtol=1e-13, atol=0, msg=f"{name}, {number}")


def test_a_step_without_samples_or_with_a_value_that_is_not_finite() -> None:
    norm = syncbn.SyncBatchNorm(3)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with syncbn.accumulate_statistics(norm):
        norm(torch.empty(0, 3, 5))
    with syncbn.accumulate_statistics(norm):
        pass
    with syncbn.accumulate_statistics(norm):
        norm(torch.randn(4, 3, 5))
        norm(torch.full((4, 3, 5), torch.inf))
    assert int(norm.num_nonfinite_batches) == 1
    assert all(torch.equal(norm.get_buffer(name), before[name]) for name in ("running_mean", "running_var"))
    assert int(norm.num_batches_tracked) == 0


def test_after_an_exception_nothing_has_changed() -> None:
    norm = syncbn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="at least 2 dimensions"), syncbn.accumulate_statistics(norm):
        norm(norm(torch.randn(4, 3))[0])
    assert int(norm.num_batches_tracked) == 0
    norm(torch.randn(4, 3))
    assert int(norm.num_batches_tracked) == 1, "outside of the context each pass is an update"


def test_evaluation_within_the_context_counts_nothing() -> None:
    norm, other = syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3)
    with syncbn.accumulate_statistics(norm):
        norm(x)
        norm.eval()
        norm(10 * x)
        norm.train()
    other(x)
    assert torch.equal(norm.running_var, other.running_var)


@pytest.mark.parametrize("context", [{"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("name", ["SyncBatchNorm", "BatchRenorm"])
def test_a_repeated_forward_pass_counts_once(name: str, context: dict[str, Any]) -> None:
    """Renorm needs no `checkpoint_contexts` here: its running statistics are still those of the first pass."""
    options = RENORM if name == "BatchRenorm" else {}
    plain, repeated = (getattr(syncbn, name)(3, **options) for _ in range(2))
    for number in range(3):
        gradients = []
        for norm in (plain, repeated):
            x = step(number).float().requires_grad_()
            with syncbn.accumulate_statistics(norm):
                for micro_batch in x.split(7):
                    y = norm(micro_batch) if norm is plain else checkpoint(norm, micro_batch, **context)
                    y.square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)
    for name, buffer in plain.named_buffers():
        assert torch.equal(repeated.get_buffer(name), buffer)


def test_a_compiled_graph_serves_every_pass() -> None:
    plain, norm = syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3)
    counter = CompileCounter()
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for number in range(3):
        for function, of in ((plain, plain), (compiled, norm)):
            with syncbn.accumulate_statistics(of):
                for micro_batch in step(number).float().split(2):
                    function(micro_batch)
    assert counter.frame_count == 1
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), syncbn.GhostBatchNorm(3, 2, running_update="sequential"))
    with (
        pytest.raises(ValueError, match="layer '1' has running_update='sequential'"),
        syncbn.accumulate_statistics(model),
    ):
        pass
    norm = syncbn.SyncBatchNorm(3)
    with syncbn.accumulate_statistics(norm):
        with pytest.raises(ValueError, match="in such a context already"), syncbn.accumulate_statistics(norm):
            pass
        norm(torch.randn(4, 3))
    assert int(norm.num_batches_tracked) == 1


def test_a_pass_that_does_not_count() -> None:
    """Some code turns `track_running_stats` off for a pass, as that of an adversarial example."""
    counted, plain = (layer("GhostBatchNorm", {"remainder": "smaller"}, size=4) for _ in range(2))
    plain(step(0))
    with syncbn.accumulate_statistics(counted):
        counted(step(0))
        counted.track_running_stats = False
        counted(step(1))
        counted.track_running_stats = True
    for ours, theirs in zip(counted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_in_no_context(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = layer("GhostBatchNorm", {"remainder": "smaller"}, size=4)
    with syncbn.accumulate_statistics(net):
        net(step(0))
        other = copied(net)
    other(step(0))
    assert int(other.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert int(net.num_batches_tracked) == 1
