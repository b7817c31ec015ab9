"""A layer with a mask normalizes the valid elements as if there were no others."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_truth import LAYERS, by_definition, draw, draw_mask, groups_of, made
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.functional.masked import fill
from syncbn.functional.statistics import Groups, group_sums
from syncbn.layers import SmallBatchNorm

# Sums of some hundred float64 terms in two orders, with |mean| / std of about 3. Filling adds and subtracts as many.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(8, 3), (6, 3, 7), (6, 3, 4, 5), (4, 3, 2, 3, 2)]
each_layer = pytest.mark.parametrize("name", LAYERS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def mask_for(shape: tuple[int, ...], seed: int = 5) -> Tensor:
    """(N, *), with a sample that has no valid element; no group of samples has only one."""
    mask = draw_mask(seed, shape[0], *shape[2:])
    if len(shape) > 2:
        mask[1] = False
        mask[0, 0] = mask[2, 0] = True
    else:
        mask[:] = torch.tensor([True, True, False, False, True, True, True, True])
    return mask


def spoiled(x: Tensor, mask: Tensor, value: float = math.nan) -> Tensor:
    return torch.where(mask.unsqueeze(1), x, value)


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def states(layer: SmallBatchNorm) -> list[Tensor]:
    return [buffer.clone() for buffer in layer.buffers()]


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", ["none", "relu", "residual, silu"])
@each_shape
@each_layer
def test_the_valid_rows_in_float64(name: str, shape: tuple[int, ...], epilogue: str) -> None:
    """Outputs, all gradients and the buffers of two steps, with NaN at the invalid places."""
    layer = made(name, activation={"none": None, "relu": "relu", "residual, silu": "silu"}[epilogue])
    truth, mask = copy.deepcopy(layer), mask_for(shape)
    for step in range(2):
        inputs = [spoiled(draw(step, *shape), mask).requires_grad_()]
        if epilogue == "residual, silu":
            inputs.append(spoiled(draw(step + 10, *shape), mask).requires_grad_())
        dy = draw(step + 20, *shape) - 3
        y = layer(*inputs, mask=mask)
        expected = by_definition(truth, inputs[0], mask, groups_of(name, shape[0]), *inputs[1:])
        check([y], [expected])
        found = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
        check(found, torch.autograd.grad(expected, [*inputs, *truth.parameters()], dy))
        check(states(layer), states(truth))


@pytest.mark.parametrize("update", ["mean", "total", "sequential"])
def test_a_group_counts_by_its_valid_elements(update: str) -> None:
    """The running statistics of ghost groups of different counts, one of which is empty."""
    layer = made("ghost", running_update=update)
    x, mask = draw(0, 6, 3, 7), draw_mask(0, 6, 7)
    mask[2:4] = False
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    layer(spoiled(x, mask), mask=mask)
    parts = [x[:2].movedim(1, -1)[mask[:2]], x[4:].movedim(1, -1)[mask[4:]]]
    if update == "sequential":
        for rows in parts:
            mean, var = mean.lerp(rows.mean(0), 0.1), var.lerp(rows.var(0), 0.1)
    elif update == "mean":
        mean = mean.lerp((parts[0].mean(0) + parts[1].mean(0)) / 2, 0.1)
        var = var.lerp((parts[0].var(0) + parts[1].var(0)) / 2, 0.1)
    else:
        mean, var = mean.lerp(torch.cat(parts).mean(0), 0.1), var.lerp(torch.cat(parts).var(0), 0.1)
    check([layer.running_mean, layer.running_var], [mean, var])
    assert int(layer.num_batches_tracked) == (2 if update == "sequential" else 1)


@pytest.mark.parametrize("options", [{}, {"save": "output"}, {"activation": "silu"}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_layer
def test_invalid_places_change_no_bit(name: str, dtype: torch.dtype, training: bool, options: dict[str, Any]) -> None:
    """Whatever the input, the residual and the output's gradient have there."""
    shape, kept = (6, 3, 4, 5), []
    mask = mask_for(shape)
    for value in (0.0, math.nan, math.inf, 1e30):
        layer = made(name, **options).to(torch.float32 if dtype == torch.bfloat16 else dtype).train(training)
        x, dy = (spoiled(draw(seed, *shape).to(dtype), mask, value) for seed in range(2))
        inputs = [x.requires_grad_()]
        if options.get("save") != "output":
            inputs.append(spoiled(draw(3, *shape).to(dtype), mask, value).requires_grad_())
        y = layer(*inputs, mask=mask)
        gradients = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
        for tensor in (y, *gradients[: len(inputs)]):
            assert not tensor.movedim(1, -1)[~mask].any()
        kept.append([y, *gradients, *layer.buffers()])
        assert all(tensor.isfinite().all() for tensor in kept[-1])
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, kept[0], strict=True))


@each_shape
@each_layer
def test_all_valid_is_no_mask(name: str, shape: tuple[int, ...]) -> None:
    results = []
    for mask in (None, torch.ones(shape[0], *shape[2:], dtype=torch.bool)):
        layer, x = made(name), draw(0, *shape).requires_grad_()
        y = layer(x, mask=mask)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], draw(1, *shape)), *states(layer)])
    # The fused operator of the CPU adds in another order than the steps one by one.
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_layer
def test_no_valid_element_is_an_empty_batch(name: str, training: bool) -> None:
    layer = made(name).train(training)
    before, x = states(layer), torch.full((4, 3, 5), math.nan, dtype=torch.float64, requires_grad=True)
    y = layer(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert all(not tensor.grad.any() for tensor in (x, *layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(states(layer), before, strict=True))
    empty = torch.empty(0, 3, 5, dtype=torch.float64)
    assert layer(empty, mask=torch.empty(0, 5, dtype=torch.bool)).shape == empty.shape


@each_layer
def test_evaluation_uses_the_running_statistics(name: str) -> None:
    layer, mask = made(name, activation="relu").eval(), mask_for((6, 3, 7))
    x, residual = (draw(seed, 6, 3, 7).requires_grad_() for seed in range(2))
    y = layer(x, residual, mask=mask)
    plain = F.relu(F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias) + residual)
    expected = plain * mask.unsqueeze(1)
    inputs, dy = [x, residual, *layer.parameters()], draw(2, 6, 3, 7)
    check([y, *torch.autograd.grad(y, inputs, dy)], [expected, *torch.autograd.grad(expected, inputs, dy)])


def test_evaluation_without_running_statistics_uses_the_valid_elements() -> None:
    layer, mask = syncbn.SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64).eval(), mask_for((6, 3, 7))
    y = layer(spoiled(draw(0, 6, 3, 7), mask), mask=mask).movedim(1, -1)[mask]
    check([y.mean(0), y.var(0, correction=0)], [torch.zeros(3).double(), 1 - 1e-5 / (_var(mask) + 1e-5)])


def _var(mask: Tensor) -> Tensor:
    return draw(0, 6, 3, 7).movedim(1, -1)[mask].var(0, correction=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_under_autocast(dtype: torch.dtype) -> None:
    shape = (6, 3, 4, 5)
    layer, mask, x = made("sync").float(), mask_for(shape), draw(0, *shape).to(dtype)
    truth = copy.deepcopy(layer).double()
    with torch.autocast("cpu", dtype):
        y = layer(spoiled(x, mask).requires_grad_(), mask=mask)
    assert y.dtype == dtype
    expected = by_definition(truth, x.double(), mask, groups_of("sync", 6))
    # Statistics are exact; the output has one rounding to its own dtype.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=eps)
    for ours, theirs in zip(layer.buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_variance_far_from_zero_with_few_valid_elements(dtype: torch.dtype) -> None:
    """Padding of 0 beside values of mean 1e4 and standard deviation 1, most of it padding."""
    x, mask = (draw(0, 8, 3, 400) + 1e4).to(dtype), draw_mask(1, 8, 400, share=0.1)
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, dtype=dtype)
    layer(spoiled(x, mask, 0.0), mask=mask)
    expected = x.double().movedim(1, -1)[mask].var(0)
    # float64 loses (mean / std)^2 = 1e8 roundings, times ten for nine places in ten are filled; float32 has its own.
    rtol = 2e-7 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("groups", [Groups(), Groups(torch.tensor([0, 2, 2, 0, 2]), 3)], ids=["one", "three"])
def test_the_sums_of_the_filling_leave_those_of_the_valid_elements(groups: Groups) -> None:
    x, mask = draw(0, 5, 3, 6), draw_mask(1, 5, 1, 6)
    filled, filling = fill(spoiled(x, mask[:, 0]), mask, groups)
    found = group_sums(filled, groups) - filling
    for group in range(groups.number):
        samples = torch.arange(5) if groups.index is None else (groups.index == group).nonzero()[:, 0]
        rows = x[samples].movedim(1, -1)[mask[samples, 0]]
        expected = torch.cat([torch.tensor([float(len(rows))]).double(), rows.sum(0), rows.square().sum(0)])
        torch.testing.assert_close(found[group], expected, rtol=1e-13, atol=1e-12)


# -- derivatives -------------------------------------------------------------------------------------------------------


@each_layer
def test_second_derivatives(name: str) -> None:
    results = []
    mask = mask_for((6, 3, 7))
    for which in ("layer", "definition"):
        layer, x, residual = made(name, activation="silu"), *(draw(seed, 6, 3, 7).requires_grad_() for seed in (0, 1))
        if which == "layer":
            y = layer(x, residual, mask=mask)
        else:
            y = by_definition(layer, x, mask, groups_of(name, 6), residual)
        inputs = [x, residual, *layer.parameters()]
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    check(*results)


def test_derivatives_by_finite_differences() -> None:
    # Of layers without r and d, which are constants for the gradient.
    layer, mask = made("ghost"), mask_for((4, 3, 4))
    inputs = [draw(0, 4, 3, 4).requires_grad_(), draw(1, 4, 3, 4).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, r: layer(x, r, mask=mask), inputs)
    assert torch.autograd.gradgradcheck(lambda x, r: layer(x, r, mask=mask), inputs)


@each_layer
def test_forward_mode_and_vmap(name: str) -> None:
    layer, mask, x = made(name), mask_for((6, 3, 7)), draw(0, 6, 3, 7)
    tangent, dy = draw(1, 6, 3, 7), draw(2, 6, 3, 7)
    leaf = spoiled(x, mask).requires_grad_()
    (backward,) = torch.autograd.grad(copy.deepcopy(layer)(leaf, mask=mask), leaf, dy)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(spoiled(x, mask), spoiled(tangent, mask)), mask=mask)
        forward = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close((forward * dy).sum(), (backward * tangent).sum(), **EXACT)
    layer.eval()
    each = torch.func.vmap(lambda z, m: layer(z[None], mask=m[None])[0])(x, mask)
    check([each], [layer(x, mask=mask)])


# -- what users do with it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_forms_of_a_mask(memory_format: torch.memory_format) -> None:
    """All mean the same, and the output has the strides of the input."""
    rows = torch.arange(4)[:, None] < torch.tensor([4, 1, 3, 2, 4, 0])  # (4, 6): a transposed mask
    full = rows.T[:, :, None].expand(6, 4, 5)
    x = draw(0, 6, 3, 4, 5).to(memory_format=memory_format)
    outputs = []
    for mask in (full, full.unsqueeze(1), full[..., :1], full[:, None, :, :1], full.transpose(1, 2).contiguous().mT):
        for training in (True, False):
            y = made("sync").train(training)(x, mask=mask)
            assert y.stride() == x.stride()
            outputs.append(y)
    assert all(torch.equal(y, outputs[i % 2]) for i, y in enumerate(outputs))
    layer, valid = made("sync"), torch.tensor([True, False, True, True])
    rows_alone = draw(0, 4, 3)
    assert torch.equal(layer(rows_alone, mask=valid), made("sync")(rows_alone, mask=valid[:, None]))


def test_wrong_masks() -> None:
    layer, x = syncbn.SyncBatchNorm(3, dtype=torch.float64), draw(0, 6, 3, 4, 5)
    before = states(layer)
    for mask, words in (
        (torch.ones(6, 4, 5), r"be a tensor of torch.bool on cpu, True where x is valid, got torch.float32 on cpu"),
        (torch.ones(6, 4, 5, dtype=torch.int64), "got torch.int64"),
        (torch.ones(6, 4, 5, dtype=torch.bool, device="meta"), "got torch.bool on meta"),
        ([True], r"got \[True\]"),
        (torch.ones(6, 3, 4, 5).bool(), r"shape \(6, 4, 5\) or \(6, 1, 4, 5\), or 1 in .* got \(6, 3, 4, 5\)"),
        (torch.ones(6, 5, 4).bool(), r"got \(6, 5, 4\)"),
        (torch.ones(1, 4, 5).bool(), r"got \(1, 4, 5\)"),
        (torch.ones(6).bool(), r"got \(6,\)"),
        (torch.tensor(True), r"got \(\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"num_features=3\), input of shape \(6, 3, 4, 5\): the mask must.*{words}"
        ):
            layer(x, mask=mask)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(states(layer), before, strict=True))


@pytest.mark.parametrize("name", ["sync", "ghost"])
def test_a_single_valid_element_has_no_variance(name: str) -> None:
    layer, mask = made(name), torch.ones(4, 5, dtype=torch.bool)
    layer.qualified_name = "encoder.norm"
    mask[0 if name == "sync" else 2 :] = False
    mask[3, 2] = True
    before = states(layer)
    with pytest.raises(
        ValueError, match=r"'encoder.norm'.*one valid value per channel over all processes.*a mask with more"
    ):
        layer(draw(0, 4, 3, 5), mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(states(layer), before, strict=True))


def test_a_valid_nan_is_kept_out_of_the_running_statistics() -> None:
    layer, x, mask = made("sync"), draw(0, 4, 3, 5), torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    x[0, 1, 2] = math.nan
    before = states(layer)
    y = layer(x, mask=mask)
    assert y[0, 1].isnan().all()
    assert not y[1].any()
    assert int(layer.num_nonfinite_batches) == 1
    assert all(torch.equal(a, b) for a, b in zip(states(layer), before, strict=True))


def test_micro_batches_count_as_ghost_groups() -> None:
    layer, truth = made("sync"), made("ghost")
    x, mask = draw(0, 6, 3, 7), mask_for((6, 3, 7))
    with syncbn.accumulate_statistics(layer):
        outputs = [layer(*pair[:1], mask=pair[1]) for pair in zip(x.split(2), mask.split(2), strict=True)]
    check([torch.cat(outputs)], [by_definition(truth, x, mask, groups_of("ghost", 6))])
    check(states(layer), states(truth))


@each_layer
def test_activation_checkpointing_repeats_the_first_pass(name: str) -> None:
    results, mask = [], mask_for((6, 3, 7))
    for kept in (False, True):
        layer, x = made(name), draw(0, 6, 3, 7).requires_grad_()
        if kept:
            options: dict[str, Any] = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
            y = checkpoint(layer, x, mask=mask, **options)
        else:
            y = layer(x, mask=mask)
        y.pow(3).sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_population_statistics_of_the_valid_elements() -> None:
    layer = made("sync")
    batches = [(draw(seed, 4, 3, 7), draw_mask(seed, 4, 7)) for seed in range(3)]
    spoiled_batches = [(spoiled(x, mask), mask) for x, mask in batches]
    found = syncbn.update_population_statistics(layer, spoiled_batches, forward=lambda net, b: net(b[0], mask=b[1]))
    rows = torch.cat([x.movedim(1, -1)[mask] for x, mask in batches])
    assert int(found[""].count) == len(rows)
    check([layer.running_mean, layer.running_var], [rows.mean(0), rows.var(0)])


class Masked(torch.nn.Module):
    """A padded sequence through two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = made("ghost", activation="relu"), made("renorm")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.norm(x, mask=mask), x, mask=mask)


def test_compiled_in_one_graph_for_any_mask() -> None:
    model, x = Masked(), draw(0, 6, 3, 7)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed, stance in ((0, "default"), (1, "fail_on_recompile"), (2, "fail_on_recompile")):
        mask, results = mask_for((6, 3, 7), seed), []
        for run, owner in ((compiled, model), (twin, twin)):
            leaf = spoiled(x, mask).requires_grad_()
            with torch.compiler.set_stance(stance if run is compiled else "force_eager"):
                y = run(leaf, mask)
                results.append([y, *torch.autograd.grad(y.pow(3).sum(), [leaf, *owner.parameters()])])
            results[-1] += [buffer.clone() for buffer in owner.buffers()]
        check(*results)


def test_in_a_graph_of_torch_fx() -> None:
    model, x, mask = Masked(), draw(0, 6, 3, 7), mask_for((6, 3, 7))
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.kwargs.keys() for node in traced.graph.nodes if node.op == "call_module"] == [{"mask"}, {"mask"}]
    check([traced(x, mask)], [model(x, mask)])


def test_a_subclass_of_tensor() -> None:
    class Scan(Tensor):
        pass

    x, mask = draw(0, 6, 3, 7), mask_for((6, 3, 7))
    y = made("sync")(x.as_subclass(Scan), mask=mask.as_subclass(Scan))
    assert isinstance(y, Scan)
    check([y.as_subclass(Tensor)], [made("sync")(x, mask=mask)])


def test_rows_of_a_nested_tensor() -> None:
    """Sequences of different lengths without padding are rows, (total, C)."""
    layer, truth = made("sync"), made("sync")
    x, lengths = draw(0, 3, 5, 3), torch.tensor([5, 2, 4])
    nested = torch.nested.nested_tensor([each[:n] for each, n in zip(x, lengths, strict=True)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"a nested tensor has no channels in dimension 1.*x.values\(\)"):
        layer(nested)
    y = torch.nested.nested_tensor_from_jagged(layer(nested.values()), nested.offsets())
    mask = torch.arange(5) < lengths[:, None]
    check([y.values()], [truth(x.mT, mask=mask).mT[mask]])
    check(states(layer), states(truth))


@pytest.mark.parametrize("batched", [False, True], ids=["one mask", "a mask each"])
def test_vmap(batched: bool) -> None:
    layer = syncbn.SyncBatchNorm(3, affine=False, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    if batched:
        found = torch.func.vmap(lambda a, m: layer(a, mask=m))(x, masks)
    else:
        found = torch.func.vmap(lambda a: layer(a, mask=masks[0]))(x)
    expected = torch.stack([layer(x[i], mask=masks[i * batched]) for i in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_profiler_shows_both_passes() -> None:
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(6, 3, 5, requires_grad=True)
    with torch.profiler.profile() as profile:
        layer(x, mask=torch.ones(6, 1, 5, dtype=torch.bool)).sum().backward()
    found = {event.key for event in profile.key_averages() if event.key.startswith("syncbn.")}
    assert found == {"syncbn.SyncBatchNorm", "syncbn.SyncBatchNorm, backward"}
