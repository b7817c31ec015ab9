"""What a layer has to compute, in float64 by autograd on one process, and how far rounding may take it from there.

The formulas are those of the definitions: of batch normalization (Ioffe and Szegedy 2015), ghost batches (Hoffer et al.
2017) and batch renormalization (Ioffe 2017). Each value comes with a bound of its error, to first order. In it u is the
resolution of the arithmetic (float32 for half precision), w that of float64, in which sums travel between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from layer_cases import Case, Tensors, arranged
from torch import Tensor
from torch.nn import functional as F

W = torch.finfo(torch.float64).eps
ROUNDINGS = 4
"""Of one element, in the few operations that lead to it."""
LONGEST_SUM = 64
"""Additions in a row in the arithmetic's precision: longer sums are made of parts."""


class Bounded(NamedTuple):
    """A value, and a bound of the error of what is compared with it."""

    value: Tensor
    error: Tensor


@dataclass
class Group:
    """The statistics of the samples that share them, (C,) each."""

    count: int
    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor
    xhat_error: Tensor
    """Relative error of 1 / sqrt(var + eps), and of its inverse."""
    r: Tensor
    d: Tensor
    r_error: Tensor
    d_error: Tensor


def eps_of(dtype: torch.dtype) -> float:
    """The resolution of the arithmetic on tensors of this dtype."""
    return W if dtype == torch.float64 else torch.finfo(torch.float32).eps


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of a value that is rounded to ``dtype``; numbers below float32's smallest may become 0."""
    info = torch.finfo(dtype)
    return info.eps * value.abs() + info.smallest_normal * info.eps + torch.finfo(torch.float32).smallest_normal


def expected(case: Case, held: Tensors) -> tuple[Tensors, list[dict[str, Any]]]:
    """What each rank has to find. Where rounding decides on which side of an activation's kink a value lies, dy is 0.

    Returns:
        the tensors with these zeros, and by rank a dictionary of the names of :func:`layer_cases.take_step`.
    """
    ranks = range(len(case.sizes))
    sharing = case.shares and case.training
    scopes = [list(ranks)] if sharing else [[rank] for rank in ranks]
    dy, found = list(held.dy), [dict[str, Any]()] * len(ranks)
    for scope in scopes:
        truth = Truth(case, held, scope)
        for rank, result in zip(scope, truth.results(), strict=True):
            found[rank], dy[rank] = result, truth.dy[scope.index(rank)]
    return replace(held, dy=dy), found


class Truth:
    """The truth for ranks that share statistics (or for one that does not)."""

    def __init__(self, case: Case, held: Tensors, scope: list[int]) -> None:
        self.case, self.held, self.scope = case, held, scope
        self.dtype = held.x[0].dtype
        self.u, self.eps = eps_of(self.dtype), case.options["eps"]
        self.tracks = case.options.get("track_running_stats", True)
        self.x = [held.x[rank].double().contiguous().requires_grad_() for rank in scope]
        self.index = [self._groups_of(len(x)) for x in self.x]
        number = 1 + max((int(index.max()) for index in self.index if len(index)), default=0)
        self.old = [held.running_mean.double(), held.running_var.double()]
        self.by_running = not case.training and self.tracks
        self.groups = [self._running_group() if self.by_running else self._group(g) for g in range(number)]
        self.fails = not self.by_running and any(group.count == 1 for group in self.groups)
        self.dy = [held.dy[rank] for rank in scope]

    def _groups_of(self, n: int) -> Tensor:
        size = self.case.options.get("ghost_batch_size") if self.case.training else None
        return torch.zeros(n, dtype=torch.int64) if size is None else torch.arange(n) // size

    def _per_channel(self, values: Tensor) -> Tensor:
        """(N, C, *) as (C, n)."""
        return values.transpose(0, 1).reshape(self.case.shape[0], -1)

    def _group(self, g: int) -> Group:
        parts = [self._per_channel(x[index == g]) for x, index in zip(self.x, self.index, strict=True)]
        values = torch.cat(parts, 1)
        n = values.shape[1]
        mean = values.sum(1) / max(n, 1)
        var = (values - mean[:, None]).square().sum(1) / max(n, 1)
        most = values.detach().abs().amax(1) if n else torch.zeros_like(mean)
        # A sum of n numbers has an error of at most n roundings. Squares are taken about a value near the mean, such as
        # that of four elements: they are a few times those about the mean. Means and squares about 0 are float64.
        length = ROUNDINGS + min(n, LONGEST_SUM)
        mean_error = length * (self.u * (2 * var.sqrt() + self.u * most) + W * most)
        var_error = length * (4 * self.u * (var + (self.u * most).square()) + W * most.square())
        return self._corrected(n, mean, var, mean_error.detach(), var_error.detach())

    def _running_group(self) -> Group:
        mean, var = self.old
        # torch's own operation: x * slope + (bias - mean * slope), so that the error is one of x and mean.
        most = max((float(x.detach().abs().nan_to_num(0, 0, 0).max()) for x in self.x if x.numel()), default=0.0)
        errors = ROUNDINGS * self.u * (mean.abs() + most), ROUNDINGS * self.u * var
        return self._corrected(0, mean, var, *errors)

    def _corrected(self, n: int, mean: Tensor, var: Tensor, mean_error: Tensor, var_error: Tensor) -> Group:
        v, eps = var.detach(), self.eps
        least = (v - var_error).clamp(min=0)
        relative = torch.sqrt((v + eps) / (least + eps)).maximum(torch.sqrt((v + var_error + eps) / (v + eps))) - 1
        relative = relative + 2 * self.u
        one, zero = torch.ones_like(v), torch.zeros_like(v)
        if not (self.case.layer == "renorm" and self.case.training):
            return Group(n, mean, var, mean_error, var_error, relative, one, zero, zero, zero)
        sigma = torch.sqrt(self.old[1] + eps)
        r_max, d_max = self._limits()
        r, d = torch.sqrt(v + eps) / sigma, (mean.detach() - self.old[0]) / sigma
        r_error, d_error = r * relative + self.u * r, mean_error / sigma + ROUNDINGS * self.u * d.abs()
        r_error = r_error.minimum(torch.full_like(r, r_max - 1 / r_max + self.u * r_max))
        d_error = d_error.minimum(torch.full_like(d, 2 * d_max))
        r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        return Group(n, mean, var, mean_error, var_error, relative, r, d, r_error, d_error)

    def _limits(self) -> tuple[float, float]:
        """(1, 0) during the warm-up, then linear up to the options' limits."""
        options, steps, found = self.case.options, self.case.tracked, []
        for name in ("r_ramp_end", "d_ramp_end"):
            start, end = options["warmup_steps"], options[name]
            found.append(1.0 if steps >= end else 0.0 if steps <= start else (steps - start) / (end - start))
        return 1 + (options["r_max"] - 1) * found[0], options["d_max"] * found[1]

    # -- from the statistics to what a rank finds ----------------------------------------------------------------------

    def results(self) -> list[dict[str, Any]]:
        if self.fails:
            held = self.held
            kept = {"running_mean": held.running_mean, "running_var": held.running_var}
            exact = {name: Bounded(t.double(), torch.zeros_like(t).double()) for name, t in kept.items()}
            counts = {"num_batches_tracked": self.case.tracked, "num_nonfinite_batches": 0}
            return [{"error": True, **(exact | counts if self.tracks else {})} for _ in self.scope]
        forward = [self._forward(k) for k in range(len(self.scope))]
        sums = self._group_sums(forward)
        return [{"error": False, **self._found(k, forward, sums), **self._buffers()} for k in range(len(self.scope))]

    def _at(self, k: int, name: str) -> Tensor:
        """A statistic of each element of rank k's batch."""
        stacked = torch.stack([getattr(group, name) for group in self.groups])
        return stacked[self.index[k]].reshape(-1, self.case.shape[0], *(1,) * (self.x[k].dim() - 2))

    def _forward(self, k: int) -> dict[str, Tensor]:
        """Rank k's output with the values on the way to it, their errors, and its parameters."""
        case, u, rank, x = self.case, self.u, self.scope[k], self.x[k]
        shape = (-1, *(1,) * (x.dim() - 2))
        weight, bias = (
            torch.full((case.shape[0],), default, dtype=torch.float64) if t is None else t.detach().double().clone()
            for t, default in ((self.held.weight, 1.0), (self.held.bias, 0.0))
        )
        weight, bias = weight.requires_grad_(), bias.requires_grad_()  # each rank's own, as are their gradients
        residual = self.held.residual[rank]
        residual = torch.zeros_like(x) if residual is None else residual.double().contiguous()
        residual = residual.requires_grad_()
        mean, var, r, d = (self._at(k, name) for name in ("mean", "var", "r", "d"))
        invstd = torch.rsqrt(var + self.eps)
        xhat = (x - mean) * invstd
        w, b = weight.view(shape), bias.view(shape)
        z = w * (xhat * r + d) + b + residual
        y = activation(z, case.options["activation"])
        with torch.no_grad():
            away = u * ((x - mean).abs() + u * mean.abs()) + self._at(k, "mean_error")
            xhat_error = invstd * away + xhat.abs() * self._at(k, "xhat_error")
            z_error = w.abs() * (r * xhat_error + self._at(k, "r_error") * xhat.abs() + self._at(k, "d_error"))
            parts = (w * xhat * r).abs() + (w * d).abs() + b.abs() + residual.abs()
            z_error = z_error + ROUNDINGS * u * parts
            if self.by_running:  # operations of torch, each with a result in the input's dtype
                z_error = z_error + rounding(parts, self.dtype)
            self._without_kinks(k, z, z_error)
            y_error = 1.1 * z_error + 8 * u * y.abs() + rounding(y, self.dtype)
            slope_scale = w * r, w.abs() * self._at(k, "r_error")
        names = ("x", "weight", "bias", "residual", "xhat", "invstd", "z", "y")
        values = dict(zip(names, (x, weight, bias, residual, xhat, invstd, z, y), strict=True))
        errors = {"xhat_error": xhat_error, "z_error": z_error, "y_error": y_error}
        return values | errors | {"scale": slope_scale[0].detach(), "scale_error": slope_scale[1]}

    def _without_kinks(self, k: int, z: Tensor, z_error: Tensor) -> None:
        kink = z.abs() <= z_error
        if self.case.options["activation"] in ("relu", "leaky_relu") and bool(kink.any()):
            layout = self.case.layouts[1]
            dy = self.dy[k].masked_fill(kink, 0.0)
            self.dy[k] = arranged(dy, "contiguous" if layout == "expanded" else layout)

    def _dz(self, k: int, at: dict[str, Tensor]) -> Bounded:
        """The gradient of z."""
        dy, u, name = self.dy[k].double(), self.u, self.case.options["activation"]
        (dz,) = torch.autograd.grad(at["y"], at["z"], dy, retain_graph=True)
        z, error = at["z"].detach(), torch.zeros_like(dy)
        if name == "silu":  # whose second derivative is at most 1/2
            error = dy.abs() * (0.5 * at["z_error"] + 8 * u * (1 + z.abs()))
        if name is not None:  # dz may be kept in the input's dtype
            error = error + rounding(dz, self.dtype)
        return Bounded(dz, error)

    def _group_sums(self, forward: list[dict[str, Tensor]]) -> list[list[Bounded]]:
        """By rank: sum(dz) and sum(dz * xhat) of each group, (G, C)."""
        found = []
        for k, at in enumerate(forward):
            dz = self._dz(k, at)
            at["dz"], at["dz_error"] = dz
            product, size = dz.value * at["xhat"].detach(), dz.value.abs()
            # sum(dz * xhat) is a sum of dz * (x - m) with a rounded mean m, less the difference times sum(dz).
            away = at["invstd"].detach() * self.u * self._at(k, "mean").detach().abs()
            length = self.u * (ROUNDINGS + min(self._longest(k), LONGEST_SUM))
            errors = (
                dz.error + length * size,
                dz.error * at["xhat"].detach().abs()
                + size * (at["xhat_error"] + length * away)
                + length * product.abs(),
            )
            pairs = [(dz.value, errors[0]), (product, errors[1])]
            found.append([Bounded(*(self._summed(k, t) for t in pair)) for pair in pairs])
        return found

    def _longest(self, k: int) -> int:
        return self.x[k].numel() // self.case.shape[0]

    def _summed(self, k: int, values: Tensor) -> Tensor:
        per_sample = values.detach().sum(tuple(range(2, values.dim()))) if values.dim() > 2 else values.detach()
        return torch.stack([per_sample[self.index[k] == g].sum(0) for g in range(len(self.groups))])

    def _found(self, k: int, forward: list[dict[str, Tensor]], sums: list[list[Bounded]]) -> dict[str, Any]:
        at, own = forward[k], self.held
        loss = sum((each["y"] * dy.double()).sum() for each, dy in zip(forward, self.dy, strict=True))
        inputs = [at[name] for name in ("x", "weight", "bias", "residual")]
        dx, dweight, dbias, dresidual = torch.autograd.grad(loss, inputs, retain_graph=True)
        (of_dz, of_product) = sums[k]
        r, r_error, d, d_error = (
            torch.stack([getattr(group, name) for group in self.groups]) for name in ("r", "r_error", "d", "d_error")
        )
        r_error = r_error + self.u * r
        weight_error = r * of_product.error + r_error * of_product.value.abs()
        weight_error = weight_error + d.abs() * of_dz.error + (d_error + self.u * d.abs()) * of_dz.value.abs()
        found: dict[str, Any] = {"y": Bounded(at["y"].detach(), at["y_error"])}
        if self.case.needs_input(self.scope[k]):
            found["dx"] = Bounded(dx, self._dx_error(k, forward, sums) + rounding(dx, self.dtype))
        if self.case.residual and self.case.needs[0]:
            found["dresidual"] = Bounded(dresidual, at["dz_error"] + rounding(dresidual, self.dtype))
        errors = {"weight": (dweight, weight_error.sum(0)), "bias": (dbias, of_dz.error.sum(0))}
        if self.by_running:  # torch's own operation, which may add up in the dtype of the input
            unit = (self._longest(k) + 1) * torch.finfo(self.dtype).eps
            sizes = (dz := at["dz"].detach().abs()) * at["xhat"].detach().abs(), dz
            added = [unit * size.transpose(0, 1).flatten(1).sum(1) for size in sizes]
            errors = {key: (pair[0], pair[1] + more) for (key, pair), more in zip(errors.items(), added, strict=True)}
        for (name, (value, error)), needs in zip(errors.items(), self.case.needs[1:], strict=True):
            if getattr(own, name) is not None and needs:
                found[f"d{name}"] = Bounded(value, error + rounding(value, getattr(own, name).dtype))
        return found

    def _dx_error(self, k: int, forward: list[dict[str, Tensor]], sums: list[list[Bounded]]) -> Tensor:
        """Of invstd * (scale * dz - m1 - xhat * m2), with the group's means of scale * dz and scale * dz * xhat."""
        at, u = forward[k], self.u
        scaled = (at["scale"] * at["dz"]).abs()
        error = (
            at["scale"].abs() * at["dz_error"]
            + (at["scale_error"] + ROUNDINGS * u * at["scale"].abs()) * at["dz"].abs()
        )
        xhat, size = at["xhat"].detach().abs(), scaled
        if not self.by_running:
            (m1, e1), (m2, e2) = (self._mean_of(k, forward, [each[i] for each in sums]) for i in (0, 1))
            size = scaled + m1 + xhat * m2
            error = error + e1 + e2 * (xhat + at["xhat_error"]) + at["xhat_error"] * m2
        return at["invstd"].detach() * (error + (self._at(k, "xhat_error") + ROUNDINGS * u) * size)

    def _mean_of(self, k: int, forward: list[dict[str, Tensor]], sums: list[Bounded]) -> Bounded:
        """The size of a group's mean over all ranks, for each element of rank k's batch."""
        weight = forward[k]["weight"].detach()
        total, error = torch.zeros_like(sums[0].value), torch.zeros_like(sums[0].value)
        for g, group in enumerate(self.groups):
            scale, scale_error = weight * group.r, weight.abs() * (group.r_error + self.u * group.r)
            for each in sums:
                total[g] += scale * each.value[g] / max(group.count, 1)
                error[g] += (scale.abs() * each.error[g] + scale_error * each.value[g].abs()) / max(group.count, 1)
        shape = (-1, self.case.shape[0], *(1,) * (self.x[k].dim() - 2))
        return Bounded(*(t[self.index[k]].reshape(shape) for t in (total.abs(), error + self.u * total.abs())))

    # -- running statistics --------------------------------------------------------------------------------------------

    def _buffers(self) -> dict[str, Any]:
        if not self.tracks:
            return {}
        case, held = self.case, self.held
        filled = [group for group in self.groups if group.count > 0] if case.training else []
        new, errors, updates = self._updated(filled) if filled else (self.old, [torch.zeros(1)] * 2, 0)
        finite = all(bool(torch.isfinite(t).all()) for t in new)
        if not (finite and filled):
            new, errors, updates = self.old, [torch.zeros(1)] * 2, 0
        buffers = {"running_mean": (held.running_mean, 0), "running_var": (held.running_var, 1)}
        found: dict[str, Any] = {}
        for name, (buffer, i) in buffers.items():
            error = errors[i] + (
                rounding(new[i], buffer.dtype) + rounding(self.old[i], buffer.dtype) if updates else 0.0
            )
            found[name] = Bounded(new[i].detach(), error.expand_as(new[i]))
        counts = {"num_batches_tracked": case.tracked + updates, "num_nonfinite_batches": int(not finite)}
        return found | counts

    def _updated(self, filled: list[Group]) -> tuple[list[Tensor], list[Tensor], int]:
        """New running statistics, their errors, and how many updates they are."""
        mode, momentum = self.case.options.get("running_update", "mean"), self.case.options["momentum"]
        tracked = self.case.tracked
        with torch.no_grad():
            steps = [self._step_of([group]) for group in filled] if mode == "sequential" else [self._step_of(filled)]
            new, errors = list(self.old), [torch.zeros_like(t) for t in self.old]
            for number, step in enumerate(steps, start=1):
                factor = 1 / (tracked + number) if momentum is None else momentum
                for i, (value, error) in enumerate(step):
                    errors[i] = (1 - factor) * errors[i] + factor * error + ROUNDINGS * W * (new[i].abs() + value.abs())
                    new[i] = (1 - factor) * new[i] + factor * value
        return new, errors, len(steps)

    def _step_of(self, groups: list[Group]) -> list[Bounded]:
        """The mean and the unbiased variance by which one update is made."""
        if self.case.options.get("running_update", "mean") != "total":
            mean = sum(group.mean for group in groups) / len(groups)
            var = sum(group.var * group.count / (group.count - 1) for group in groups) / len(groups)
            var_error = sum(group.var_error * group.count / (group.count - 1) for group in groups) / len(groups)
            return [Bounded(mean, sum(group.mean_error for group in groups) / len(groups)), Bounded(var, var_error)]
        n = sum(group.count for group in groups)
        mean = sum(group.count * group.mean for group in groups) / n
        var = sum(group.count * (group.var + (group.mean - mean).square()) for group in groups) / (n - 1)
        mean_error = torch.stack([group.mean_error for group in groups]).amax(0)
        away = torch.stack([(group.mean - mean).abs() for group in groups]).amax(0)
        var_error = torch.stack([group.var_error for group in groups]).amax(0)
        var_error = n / (n - 1) * (var_error + 2 * mean_error * (2 * away + 2 * mean_error))
        return [Bounded(mean, mean_error), Bounded(var, var_error)]


def activation(z: Tensor, name: str | None) -> Tensor:
    functions = {None: lambda z: z, "relu": torch.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.01)}
    return z * torch.sigmoid(z) if name == "silu" else functions[name](z)


def problems(case: Case, found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is wrong with what a rank found, in words."""
    if (found["error"] is not None) != wanted["error"]:
        return [f"error {found['error']!r}"]
    wrong, skipped = [], {}
    if case.options["activation"] is not None and "y" in wanted:  # no activation has a derivative at NaN
        lost = ~torch.isfinite(wanted["y"].value)
        of_channel = lost.transpose(0, 1).flatten(1).any(1)
        skipped = {"dx": lost, "dresidual": lost, "dweight": of_channel, "dbias": of_channel}
    if case.poison is not None and found.get("dweight") is not None:
        # A group that is empty on a rank adds 0, or 0 times an invstd of NaN: the sum over the ranks is NaN either way.
        skipped["dweight"] = skipped.get("dweight", False) | found["dweight"].isnan()
    for name, value in wanted.items():
        if name == "error":
            continue
        if not isinstance(value, Bounded):
            wrong += [f"{name} is {found[name]}, expected {value}"] * (int(found[name]) != value)
        elif found.get(name) is None:
            wrong.append(f"{name} is missing")
        else:
            wrong += _difference(name, found[name], value, skipped.get(name))
    return wrong


def _difference(name: str, found: Tensor, wanted: Bounded, skipped: Tensor | None) -> list[str]:
    if found.shape != wanted.value.shape:
        return [f"{name} has the shape {tuple(found.shape)}"]
    value, limit = wanted.value, torch.finfo(found.dtype).max
    mine = found.double()
    finite = torch.isfinite(value)
    # What overflows in the dtype of the result may be infinite.
    fits = finite & (value.abs() + wanted.error < limit)
    off = (mine - value).abs() > wanted.error
    wrong = (fits & ~(mine - value).isfinite()) | (fits & off)
    wrong |= ~finite & ~((mine == value) | (mine.isnan() & value.isnan()))
    wrong &= torch.ones_like(wrong) if skipped is None else ~skipped
    if not bool(wrong.any()):
        return []
    first = tuple(wrong.nonzero()[0].tolist())
    at, bound = (float(t[first]) for t in (mine, wanted.error))
    return [
        f"{name}{list(first)} is {at!r}, expected {float(value[first])!r} to {bound:.3g} ({int(wrong.sum())} wrong)"
    ]
