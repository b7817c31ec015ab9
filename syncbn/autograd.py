"""Batch normalization as an operation: the forward pass, and the gradient through the statistics on all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from syncbn.collectives import all_reduce_sum, start_all_reduce_sum
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue, activation_grad, invert
from syncbn.functional.finish import Statistics
from syncbn.functional.normalize import Affine, normalize, scale_and_shift
from syncbn.functional.running import Running
from syncbn.functional.statistics import Groups, compute_dtype, group_counts, moments
from syncbn.kernels.dispatch import pick, whole
from syncbn.lockstep import Reduction
from syncbn.recompute import Kept, is_taped, keep, recall
from syncbn.torch_internals import has_transforms, in_forward_ad, is_differentiated_forward, is_transformed

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight, bias and residual."""


class Rule(NamedTuple):
    """How a batch is normalized, apart from the tensors."""

    eps: float
    groups: Groups
    group_name: str | None = None
    """The process group whose ranks share statistics; None is this process alone."""
    save_output: bool = False
    """Keep the output for the backward pass, and not the input; see :class:`syncbn.layers.SyncBatchNorm`."""
    check_count: Callable[[Tensor], None] | None = None
    """Called with the reduced counts (G,) before anything is updated; it raises if a group has too few values."""
    observer: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Called with the batch's count (G, 1), mean and biased variance (G, C)."""
    layer: str | None = None
    """The layer's name for :mod:`syncbn.lockstep`; None in a compiled graph."""
    filling: Tensor | None = None
    """Of a masked input, the sums of :func:`syncbn.functional.masked.fill`, which are no part of the statistics."""


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, epilogue: Epilogue, rule: Rule
) -> Tensor:
    """Normalize ``x`` (N, C, *) by the batch's statistics, update the running ones, then apply the epilogue.

    ``weight`` and ``bias`` are (C,) or None. The output has the shape, dtype and memory format of ``x``.
    """
    if is_differentiated_forward():
        return _composed(x, weight, bias, running, epilogue, rule)
    taped = is_taped()
    alone = rule.group_name is None and rule.check_count is None and rule.observer is None and rule.filling is None
    if alone and not taped:
        function = whole(x)
        if function is not None:
            done = function(x, weight, bias, running, epilogue, rule.groups, rule.eps, rule.save_output)
            if done is not None:
                return done
    # An exported program would have the forward pass alone of an autograd.Function, and so no gradient.
    if is_transformed() or (rule.group_name is None and torch.compiler.is_exporting()):
        return _composed(x, weight, bias, running, epilogue, rule)
    kept = recall(x.shape[1]) if taped else None
    if kept is None:
        asks = _asks(weight, bias, rule)
        with torch.no_grad():
            kept = _learn(x, running, rule, asks)
    if taped:
        keep(kept)
    if kept.joins_backward:
        x = x.detach().requires_grad_()
    residual = epilogue.residual
    activation = epilogue if residual is None else epilogue._replace(residual=None)
    y: Tensor = SyncedNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, residual, kept.statistics, activation, rule
    )
    return y


def _asks(weight: Tensor | None, bias: Tensor | None, rule: Rule) -> bool:
    """Whether the ranks have to tell each other whose input needs a gradient.

    A parameter that needs one makes all ranks run the backward pass. Without it, a rank whose batch is empty and has no
    history, as ``torch.empty(0, ...)``, would leave the others waiting there.
    """
    trained = any(parameter is not None and parameter.requires_grad for parameter in (weight, bias))
    return rule.group_name is not None and torch.is_grad_enabled() and not trained


def _valid_sums(x: Tensor, rule: Rule, *, differentiable: bool) -> Tensor:
    """The :func:`group_sums` of this process's elements that count."""
    sums = pick(x, differentiable=differentiable).group_sums(x, rule.groups)
    return sums if rule.filling is None else sums - rule.filling


def _learn(x: Tensor, running: Running | None, rule: Rule, asks: bool = False) -> Kept:
    """The statistics of each group over all processes, and the update of the running ones. One collective.

    With ``asks``, see :func:`_asks`, also whether this batch without history, which is empty or may have no valid
    element, has to take part in the others' backward pass.
    """
    sums = _valid_sums(x, rule, differentiable=False)
    shape = sums.shape
    if asks:
        sums = torch.cat((sums.flatten(), sums.new_full((1,), float(x.requires_grad))))
    reduction = None if rule.layer is None else Reduction(rule.layer, "forward")
    sums = all_reduce_sum(sums, rule.group_name, reduction)
    joins = False
    if asks:
        may_be_empty = x.numel() == 0 or rule.filling is not None
        if may_be_empty and not x.requires_grad and not torch.compiler.is_compiling():
            joins = bool(sums[-1] > 0)
        sums = sums[:-1].view(shape)
    if rule.check_count is not None:
        rule.check_count(sums[:, 0])
    statistics = pick(sums, differentiable=False).finish(sums, rule.eps, running)
    if rule.observer is not None:
        assert statistics.var is not None
        rule.observer(statistics.count, statistics.mean, statistics.var)
    return Kept(statistics, joins)


def _composed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, epilogue: Epilogue, rule: Rule
) -> Tensor:
    """:func:`batch_norm` from differentiable operations alone: torch.func, forward-mode derivatives, torch.jit.trace.

    It keeps more for the backward pass. A trace of it can be saved.
    """
    with torch.no_grad():
        # No tangent may come to the running statistics: no_grad is neither heeded by forward mode nor traced.
        constant = forward_ad.unpack_dual(x).primal if in_forward_ad() and not has_transforms() else x
        statistics, _ = _learn(constant.detach(), running, rule)
    _, mean, var = moments(all_reduce_sum(_valid_sums(x, rule, differentiable=True), rule.group_name))
    scale, shift = scale_and_shift(weight, bias, statistics.r, statistics.d, rule.groups.number)
    affine = Affine(mean, torch.rsqrt(var + rule.eps), scale, shift)
    return normalize(x, affine, rule.groups, epilogue)


class SyncedNorm(torch.autograd.Function):
    r"""``y = activation((x - mean) * invstd * scale + shift + residual)`` with given statistics, which depend on x.

    Each process has its own ``x`` (N, C, *); N may differ between processes and be 0. The statistics, (G, C) float64,
    are reduced already and the same on all processes. ``scale`` is ``weight * r`` and ``shift`` is
    ``weight * d + bias``, with ``weight`` and ``bias`` (C,) and renorm's constants ``r`` and ``d`` (G, C); any of them
    may be None. ``residual`` has the shape and dtype of x.

    Backward, with xhat = (x - mean) * invstd and dz = dy * activation'(...). Sums are over a group's elements on all
    processes, except where it says "local":

    * grad_x = invstd * (scale * dz - sum(scale * dz) / count - xhat * sum(scale * dz * xhat) / count)
    * grad_weight = sum over groups of r * local sum(dz * xhat) + d * local sum(dz)
    * grad_bias = sum over groups of local sum(dz)
    * grad_residual = dz

    There is one collective, of 2C numbers per group. Every rank joins it, even if its own x needs no gradient, because
    another rank's may. The products with ``scale`` are summed, so that the gradient is right even if the processes'
    scales differ. The gradients of weight and bias are computed while the collective runs.

    Saved: x (not a copy), the parameters, the statistics, and the residual if there is an activation. With
    ``rule.save_output`` the output is saved instead of x.

    ``mean`` and ``invstd`` are constants here; the second and third term of grad_x are their part of the gradient. A
    second derivative needs them as functions of x, so a backward pass that is itself recorded (``create_graph=True``)
    computes them again from x, with the reduction recorded too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Statistics,
        activation: Epilogue,
        rule: Rule,
    ) -> Tensor:
        scale, shift = scale_and_shift(weight, bias, statistics.r, statistics.d, rule.groups.number)
        affine = Affine(statistics.mean, statistics.invstd, scale, shift)
        epilogue = activation._replace(residual=residual)
        y = pick(x, differentiable=False).normalize(x, affine, rule.groups, epilogue)
        count, mean, invstd, r, d, _ = statistics
        corrections = None if r is None or d is None else torch.stack((r, d)).to(compute_dtype(x))
        known = rule.group_name is None and rule.filling is None
        kept = torch.stack((mean, invstd)), corrections, None if known else count, rule.filling
        ctx.bias_dtype = None if bias is None else bias.dtype
        if activation.activation is None:
            residual = None
            bias = bias if rule.save_output else None
        index = rule.groups.index
        if index is not None or rule.check_count is not None or rule.observer is not None:
            # The graph must not keep what the functions refer to: the layer and its input.
            groups = Groups(None, rule.groups.number)
            rule = rule._replace(groups=groups, check_count=None, observer=None, filling=None)
        ctx.activation, ctx.rule = activation, rule
        # The operator of the CPU saves the same without the count: activation checkpointing may repeat the forward pass
        # of one by the other.
        ctx.save_for_backward(y if rule.save_output else x, weight, bias, residual, index, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        grads = _gradients(ctx.rule, ctx.activation, ctx.bias_dtype, needs, grad_output, ctx.saved_tensors)
        return *grads, None, None, None


def _gradients(
    rule: Rule,
    activation: Epilogue,
    bias_dtype: torch.dtype | None,
    needs: Sequence[bool],
    grad_output: Tensor,
    saved: Sequence[Tensor | None],
) -> Gradients:
    """The backward pass of :class:`SyncedNorm`, from the tensors that its forward pass saved."""
    x_or_y, weight, bias, residual, index, kept, corrections, count, filling = saved
    assert x_or_y is not None, "always saved"
    assert kept is not None, "always saved"
    groups = Groups(index, rule.groups.number)
    mean, invstd = kept
    r, d = (None, None) if corrections is None else corrections
    if count is None:
        count = group_counts(x_or_y, groups)
    needs_x, needs_weight, needs_bias, needs_residual = needs
    # A compiled backward pass is not recorded again, whatever the grad mode while it is traced.
    recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if recorded:
        if rule.save_output:
            raise RuntimeError("a second derivative needs the layer's input, which save='output' does not keep")
        rule = rule._replace(groups=groups, filling=filling)
        _, mean, var = moments(all_reduce_sum(_valid_sums(x_or_y, rule, differentiable=True), rule.group_name))
        invstd = torch.rsqrt(var + rule.eps)
    scale, shift = scale_and_shift(weight, bias, r, d, groups.number)
    kernels = pick(x_or_y, differentiable=recorded)
    affine = Affine(mean, invstd, scale, shift)
    if rule.save_output:
        z, dz, affine_of_z = _from_output(x_or_y, grad_output, affine, activation)
        dz, rest, sums = kernels.backward_sums(dz, z, affine_of_z, groups, NO_EPILOGUE)
    else:
        epilogue = activation._replace(residual=residual)
        dz, rest, sums = kernels.backward_sums(grad_output, x_or_y, affine, groups, epilogue)
    pending = grad_x = grad_weight = grad_bias = None
    if needs_x or rule.group_name is not None:
        scaled = sums if scale is None else sums * scale.unsqueeze(1)
        reduction = None if rule.layer is None else Reduction(rule.layer, "backward")
        pending = start_all_reduce_sum(scaled, rule.group_name, reduction)
    if needs_weight:
        assert weight is not None
        per_group = sums[:, 1] if r is None or d is None else r * sums[:, 1] + d * sums[:, 0]
        grad_weight = per_group.sum(0).to(weight.dtype)
    if needs_bias:
        grad_bias = sums[:, 0].sum(0).to(bias_dtype)
    if pending is not None:
        means = pending.wait() / count.clamp(min=1).unsqueeze(1)
        if needs_x and rule.save_output:
            # The kernel's factor is 1/scale, the inverse standard deviation of z; the gradient's is invstd.
            slope = invstd if scale is None else invstd * scale
            factors = affine_of_z._replace(scale=slope if scale is None else slope * scale)
            grad_x = kernels.grad_input(dz, z, factors, means * slope.unsqueeze(1), groups, rest)
        elif needs_x:
            grad_x = kernels.grad_input(dz, x_or_y, affine, means, groups, rest)
    return grad_x, grad_weight, grad_bias, dz if needs_residual else None


def _from_output(y: Tensor, grad_output: Tensor, affine: Affine, activation: Epilogue) -> tuple[Tensor, Tensor, Affine]:
    """z, dz and z's own normalization from the output: xhat = (z - shift) / scale."""
    z = invert(y, activation)
    zero, one = torch.zeros_like(affine.mean), torch.ones_like(affine.mean)
    mean = zero if affine.shift is None else affine.shift.to(zero.dtype)
    invstd = one if affine.scale is None else affine.scale.to(one.dtype).reciprocal()
    return z, activation_grad(grad_output, z, activation), Affine(mean, invstd)


_library = torch.library.Library("syncbn", "FRAGMENT")
_library.define(
    "composed_backward(Tensor grad_output, Tensor x_or_y, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? index, Tensor moments, Tensor corrections, int groups, str? activation, float negative_slope, float eps, "
    "bool save_output, ScalarType bias_dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "composed_backward", "CompositeImplicitAutograd")
def _composed_backward(
    grad_output: Tensor,
    x_or_y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    index: Tensor | None,
    kept: Tensor,
    corrections: Tensor,
    *rest: Any,
) -> Gradients:
    """The backward pass of the CPU's operator where it is recorded (``create_graph=True``) or has the output alone."""
    number, activation, negative_slope, eps, save_output, bias_dtype, needs = rest
    rule = Rule(eps, Groups(None, number), save_output=save_output)
    saved = (x_or_y, weight, bias, residual, index, kept, corrections if corrections.numel() else None, None, None)
    return _gradients(rule, Epilogue(None, activation, negative_slope), bias_dtype, needs, grad_output, saved)
