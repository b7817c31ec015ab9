"""The three layers and their base class: parameters, buffers and checks."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, NoReturn, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary

from syncbn.autograd import Rule, batch_norm
from syncbn.collectives import Scope, check_positive, make_scope, max_over_ranks, resolve_name
from syncbn.domain_statistics import BUFFERS, DomainStatistics, add_missing_domains, kept_wide
from syncbn.functional.epilogue import ACTIVATIONS, NO_EPILOGUE, ActivationName, Epilogue, activate
from syncbn.functional.masked import fill, zero_invalid
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running, RunningUpdate
from syncbn.functional.statistics import ONE_GROUP, Groups, compute_dtype
from syncbn.profiling import recorded
from syncbn.recompute import domain_of_pass, is_repeated, is_taped
from syncbn.torch_internals import (
    PLAIN_TYPES,
    assert_async,
    constant_result,
    has_transforms,
    is_profiled,
    runs_at_once,
    static_address,
)

Remainder = Literal["error", "smaller"]
Save = Literal["input", "output"]

_CHECKPOINT = "pass context_fn=syncbn.checkpoint_contexts to torch.utils.checkpoint, with use_reentrant=False"
MIN_WEIGHT = 1 / 128
"""With ``save="output"``, the smallest absolute value of a weight, and of a weight divided by its bias. Recovering the
input from the output loses up to (1 + |bias|) / |weight| in relative precision, which this keeps below about 2^8."""


class SampleGroups(NamedTuple):
    """Which samples of a batch share statistics.

    Set as :attr:`SmallBatchNorm.sample_groups`, it replaces ``ghost_batch_size`` in training until it is set again.
    """

    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    """Group of each sample, (N,) int64 on the input's device. None puts all samples in group 0."""
    number: int
    """Number of groups, including those without a sample on this rank. The same on all ranks that share statistics."""
    divisor: float | None = None
    """Divides the sum over groups in the running statistics. None is the number of groups that have samples."""
    smallest: int = 0
    """Fewest samples in any non-empty group, over all ranks that share statistics. 0: unknown, read from the device."""


class Frozen(NamedTuple):
    """What :func:`syncbn.unfreeze` restores."""

    training: bool
    """The mode that the last ``train()`` or ``eval()`` asked for."""
    parameters: tuple[str, ...]
    """Names of the parameters that no longer need gradients."""


class BatchError(ValueError):
    """The layer fits its input, but this batch cannot be normalized by statistics over its samples."""


class RowsError(BatchError):
    """The rows of a layer's input are not the samples that its groups are made of."""


class SmallBatchNorm(_BatchNorm):
    """Base class of this package's layers. It has every option; each layer's ``__init__`` sets those that it takes."""

    scope: Scope | None = None
    """Which processes share statistics. None is this process alone."""
    ghost_batch_size: int | None = None
    remainder: Remainder = "error"
    max_ghost_groups: int | None = None
    running_update: RunningUpdate = "mean"
    activation: ActivationName | None
    negative_slope: float
    save: Save
    """What is kept for the backward pass; see :class:`SyncBatchNorm`."""
    sample_groups: SampleGroups | None
    qualified_name: str | None
    """Name within the model, for error messages. :func:`syncbn.convert` sets it."""
    after: Callable[[Any, Tensor], Tensor] | None
    """Called with the layer and its output; returns what the layer returns. :func:`syncbn.convert` sets it for classes
    that do more than normalize."""
    observer: Callable[[Any, Tensor, Tensor, Tensor], None] | None
    """Called with the layer and each batch's count (G, 1), mean and biased variance (G, C). While it is set, the
    running statistics stay as they are. See :mod:`syncbn.population`."""
    frozen_state: Frozen | None = None
    """See :func:`syncbn.freeze`. A frozen layer is in evaluation mode."""
    default_domain: str | None = None
    """The domain whose statistics are the layer's own buffers. None without :func:`syncbn.domains`."""
    active_domain: DomainStatistics | None = None
    """What the layer uses in place of its own statistics. None is the default domain. A reference to the module itself
    and not its name, so that one compiled graph serves all domains but the default."""
    num_nonfinite_batches: Tensor
    """() int64: number of batches left out of the running statistics because theirs were not finite. It is no buffer,
    so that a layer has the buffers of torch's, and is not saved. Transforms of torch.func do not count."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not bias:  # _BatchNorm has this argument in some versions of torch only
            self.register_parameter("bias", None)
        if self.running_mean is not None and self.running_var is not None:
            if self.running_mean.dtype.itemsize < 4:
                self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
            self.num_nonfinite_batches = _zero_counter(self.running_mean.device)
        self.sample_groups = self.qualified_name = self.after = self.observer = None
        self._agreed_groups: int | None = None

    def _check_options(self) -> None:
        if not (isinstance(self.eps, float | int) and 0 < self.eps < math.inf):
            raise ValueError(f"eps must be a positive number, got {self.eps!r}")
        for name in ("ghost_batch_size", "max_ghost_groups"):
            check_positive(name, getattr(self, name))
        choices = {"remainder": get_args(Remainder), "running_update": get_args(RunningUpdate), "save": get_args(Save)}
        for name, known in (*choices.items(), ("activation", (None, *ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if not (isinstance(self.negative_slope, float | int) and math.isfinite(self.negative_slope)):
            raise ValueError(f"negative_slope must be a finite number, got {self.negative_slope!r}")
        invertible = self.activation is None or (self.activation == "leaky_relu" and self.negative_slope > 0)
        if self.save == "output" and not invertible:
            raise ValueError(
                f"save='output' needs an activation that can be inverted: None or 'leaky_relu' with a positive "
                f"negative_slope, got {self.activation!r} and {self.negative_slope!r}"
            )

    # -- torch.nn.Module's own -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # The ranks agree on this number in each training, so a copy or a saved layer must not have it.
        # A copy is in no context of syncbn.domain or syncbn.accumulate_statistics.
        state = {**vars(self), "_agreed_groups": None, "observer": None}
        state.pop("active_domain", None)
        return state

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_state is not None:
            self.frozen_state, self.training = self.frozen_state._replace(training=mode), False
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if self.default_domain is not None:
            add_missing_domains(self, state_dict, prefix)
        conversion = vars(self).get("_conversion")
        if conversion is not None and conversion.frozen is not None and (local_metadata.get("version") or 0) > 2:
            # A frozen layer has no num_batches_tracked. torch adds it to a checkpoint of version 1 or none, but that of
            # detectron2's FrozenBatchNorm2d is 3. BatchNorm's own is 2.
            local_metadata = {**local_metadata, "version": None}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def reset_running_stats(self) -> None:
        if self.frozen_state is not None:  # torch.optim.swa_utils.update_bn resets all layers, also in evaluation mode
            return
        if self.active_domain is None:
            super().reset_running_stats()
        else:
            self.active_domain.reset_running_stats()
        self._reset_counter()

    def _reset_counter(self) -> None:
        if "num_nonfinite_batches" in vars(self):
            self.num_nonfinite_batches.zero_()

    def reset_parameters(self) -> None:
        super().reset_running_stats()  # of a frozen layer too: on a new device its memory may hold anything
        self._reset_counter()
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks each module for what it is to script in its place.
        remedy = "script syncbn.revert(model), or use torch.jit.trace"
        raise ValueError(f"{self._name()} cannot be scripted: {remedy}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with kept_wide(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.nonfinite_counter()  # which takes it to where the statistics are now
        return self

    def nonfinite_counter(self) -> Tensor | None:
        """``num_nonfinite_batches``, on the device of the running statistics, which it follows.

        None without running statistics, and where nothing but buffers may change: in an export, and under transforms.
        """
        mean = self.running_mean
        if mean is None or torch.compiler.is_exporting() or has_transforms():
            return None
        counter: Tensor | None = vars(self).get("num_nonfinite_batches")
        if counter is None or counter.device != mean.device:
            # A layer on the meta device has no number to take along.
            known = None if counter is None or counter.is_meta or mean.is_meta else counter
            counter = _zero_counter(mean.device) if known is None else static_address(known.to(mean.device))
            self.num_nonfinite_batches = counter
        return counter

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            self._fail(input, "expected (N, C) or (N, C, *), that is at least 2 dimensions")
        if input.shape[1] != self.num_features:
            self._fail(input, f"expected {self.num_features} channels in dimension 1, got {input.shape[1]}")
        if input.is_quantized:
            self._fail(input, f"expected a floating-point input, got {input.dtype}; quantize syncbn.revert(model)")
        if not input.is_floating_point():
            self._fail(input, f"expected a floating-point input, got {input.dtype}; convert it first")

    def _fail(self, x: Tensor, problem: str, error: type[ValueError] = ValueError) -> NoReturn:
        raise error(f"{self._name()} (num_features={self.num_features}), input of shape {tuple(x.shape)}: {problem}")

    def _name(self) -> str:
        name = type(self).__name__
        if self.qualified_name is not None:
            name = f"{name} '{self.qualified_name}'"
        domain = self.default_domain if self.active_domain is None else self.active_domain.domain
        return name if domain is None else f"{name} in domain {domain!r}"

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.scope is not None:
            where = self.scope.ranks if self.scope.ranks is not None else self.scope.sync_group_size
            parts.append(f"sync={'world' if where is None else where}")
        if self.ghost_batch_size is not None:
            parts.append(f"ghost_batch_size={self.ghost_batch_size}, remainder={self.remainder!r}")
        usual = {"running_update": "mean", "activation": None, "negative_slope": 0.01, "save": "input"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        parts += ["frozen=True"] if self.frozen_state is not None else []
        return ", ".join(parts)

    # -- the data path -------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input`` (N, C) or (N, C, *); the output has its shape, dtype and memory format.

        Args:
            input: (N, C) or (N, C, *).
            residual: added to the normalized values before the activation; shape, dtype and device of ``input``.
            mask: bool, True where ``input`` is valid in all channels, (N, *) or (N, 1, *) on its device; dimensions
                after the first may be 1. Count, mean, variance and running statistics are those of the valid elements.
                What ``input`` and ``residual`` have elsewhere changes nothing and gets no gradient, and the output is 0
                there. None: all are valid.

        Raises:
            ValueError: the input has the wrong number of dimensions or channels, the residual or the mask does not fit
                it, the ghost groups leave a remainder, a group has one value per channel over all processes, which has
                no variance, or a weight is too small for ``save="output"``.

        Example:
            >>> layer, x = SyncBatchNorm(3), torch.randn(2, 3, 5)
            >>> mask = torch.arange(5) < torch.tensor([[5], [2]])  # a sequence of 5 steps, and one of 2 with padding
            >>> layer(x, mask=mask)[1, 0, 2:].detach()
            tensor([0., 0., 0.])
        """
        if has_torch_function_unary(input) and not torch.compiler.is_compiling():
            if isinstance(input, torch.fx.Proxy):
                return self._traced(input, residual, mask)
            output: Tensor = handle_torch_function(_forward_of_subclass, (input,), self, input, residual, mask)
            return output
        self._check_input_dim(input)
        if residual is not None:
            self._check_residual(input, residual)
        if mask is not None:
            mask = self._full_mask(input, mask)
            residual = None if residual is None else zero_invalid(residual, mask)
        if not torch.compiler.is_compiling() and is_profiled():
            output = recorded(f"syncbn.{type(self).__name__}", self._in_its_domain, input, residual, mask)
        else:
            output = self._in_its_domain(input, residual, mask)
        if mask is not None:
            output = zero_invalid(output, mask)
        return output if self.after is None else self.after(self, output)

    def _in_its_domain(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.default_domain is None or not (is_taped() or is_repeated()):
            return self._normalize(x, residual, mask)
        with self._in_domain_of_first_pass():
            return self._normalize(x, residual, mask)

    def _normalize(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        # Some code sets `training` itself, which leaves a frozen layer frozen.
        if (self.training and self.frozen_state is None) or self.running_mean is None:
            output = self._normalize_by_batch(x, residual, mask)
        else:
            output = self._normalize_by_running(x if mask is None else zero_invalid(x, mask))
            if residual is not None:
                output = output + residual
            output = activate(output, Epilogue(None, self.activation, self.negative_slope))
        return output

    @contextmanager
    def _in_domain_of_first_pass(self) -> Iterator[None]:
        """In this context a forward pass that is repeated uses the domain of the first, whichever is in use by now."""
        if not is_taped():
            raise RuntimeError(f"{self._name()} would be repeated in the domain of the backward pass: {_CHECKPOINT}")
        present = self.active_domain
        self.use_domain(domain_of_pass(present))
        try:
            yield
        finally:
            self.use_domain(present)

    def use_domain(self, domain: DomainStatistics | None) -> None:
        """Set :attr:`active_domain`."""
        # An assignment would make it a submodule, which it is already, under its own name.
        vars(self).pop("active_domain", None)
        if domain is not None:
            vars(self)["active_domain"] = domain

    def _traced(self, input: Any, residual: Any, mask: Any) -> Any:
        """The call of this layer in a graph of torch.fx, in which it is one node, as torch's own layers are."""
        path = input.tracer.path_of_module(self)
        if not path:
            raise ValueError(f"{self._name()} cannot be traced by itself; trace a model that contains it")
        args = (input,) if residual is None else (input, residual)
        return input.tracer.create_proxy("call_module", path, args, {} if mask is None else {"mask": mask})

    def _check_residual(self, x: Tensor, residual: Tensor) -> None:
        if self.save == "output":
            self._fail(x, "a residual cannot be recovered from the output; use save='input'")
        if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
            got = f"{tuple(residual.shape)}, {residual.dtype}, {residual.device}"
            wanted = f"the residual must have the input's shape, dtype and device ({x.dtype}, {x.device})"
            hint = "; a mask is given by name: layer(x, mask=...)" if residual.dtype == torch.bool else ""
            self._fail(x, f"{wanted}, got {got}{hint}")

    def _full_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mask as (N, 1, *)."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != x.device:
            got = f"{mask.dtype} on {mask.device}" if isinstance(mask, Tensor) else repr(mask)
            self._fail(x, f"the mask must be a tensor of torch.bool on {x.device}, True where x is valid, got {got}")
        full = (x.shape[0], 1, *x.shape[2:])
        given = mask.unsqueeze(1) if mask.dim() == x.dim() - 1 else mask
        fits = given.dim() == x.dim() and given.shape[:2] == full[:2]
        if not fits or any(size not in (1, whole) for size, whole in zip(given.shape[2:], full[2:], strict=True)):
            wanted = f"{(x.shape[0], *x.shape[2:])} or {full}, or 1 in place of a size after the first"
            self._fail(x, f"the mask must have the shape {wanted}, got {tuple(mask.shape)}")
        return given.expand(full).contiguous()  # the output's memory format would follow that of a transposed mask

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        if self.num_features == 0:  # torch looks at channel 0 of an empty input
            return x.clone()
        # One dtype for all four, as torch wants it: they differ after half(), or from the input.
        dtype = compute_dtype(x)
        # An exported graph must not have a conversion that does nothing: torch's quantization looks for the parameters.
        statistics, affine = self.holder(), self._affine()
        mean, var, weight, bias = (
            t if t is None or t.dtype == dtype else t.to(dtype)
            for t in (statistics.running_mean, statistics.running_var, *affine)
        )
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _normalize_by_batch(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if type(x) not in PLAIN_TYPES and hasattr(x, "to_local"):
            self._fail(x, "a DTensor has no statistics here; give the layer x.to_local(), with sync over its ranks")
        # Evaluation without running statistics uses those of the batch on this process, and never communicates.
        if self.training and torch.compiler.is_exporting():
            _warn_of_export(type(self).__name__)
        group_name = resolve_name(self.scope) if self.training and self.scope is not None else None
        if self.sample_groups is None and self.ghost_batch_size is None:
            groups, divisor, has_variance = ONE_GROUP, None, x.numel() > x.shape[1]
        else:
            index, number, divisor, smallest = self._groups(x, group_name)
            groups = ONE_GROUP if index is None and number == 1 else Groups(index, number)
            has_variance = smallest * math.prod(x.shape[2:]) > 1  # the shapes show it, for every group
        filling, wait = None, True
        if mask is not None:
            x, filling = fill(x, mask, groups)
            # On CUDA the count of valid elements is known to the device alone, and the host must not wait in each step.
            # Under a transform such as vmap it is known to nobody.
            has_variance, wait = has_transforms(), not x.is_cuda
        weight, bias = self._affine()
        if self.save == "output" and weight is not None:
            self._check_weight(x, weight, bias)
        rule = Rule(
            self.eps,
            groups,
            group_name,
            self.save == "output",
            None if has_variance else functools.partial(self._check_count, x, mask is not None, wait),
            # The repetition of a forward pass has nothing new to show.
            None if self.observer is None or is_repeated() else functools.partial(self.observer, self),
            # A compiled graph that knew the name could not serve the blocks of a model that are alike.
            None if group_name is None or torch.compiler.is_compiling() else self._name(),
            filling,
        )
        if not self.eps > 0:
            self._fail(x, f"eps must be positive in training, got {self.eps!r}")
        epilogue = NO_EPILOGUE
        if residual is not None or self.activation is not None:
            epilogue = Epilogue(residual, self.activation, self.negative_slope)
        return batch_norm(x, weight, bias, self._running(divisor), epilogue, rule)

    def holder(self) -> Any:
        """The module whose running statistics the layer uses: itself, or what it has for the domain in use."""
        return self if self.active_domain is None else self.active_domain

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight and the bias, those of the domain if it has its own."""
        owner: Any = self if self.active_domain is None or not self.active_domain.has_affine else self.active_domain
        try:  # attribute access takes ten times as long
            return owner._parameters["weight"], owner._parameters["bias"]
        except KeyError:  # a parametrization, which may return other values the second time
            return owner.weight, owner.bias

    def _running(self, divisor: float | None) -> Running | None:
        statistics = self.holder()
        try:
            buffers = statistics._buffers
            mean, var, tracked = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:
            mean, var, tracked = (getattr(statistics, name, None) for name in BUFFERS)
        if mean is None or var is None:
            return None
        if tracked is None:
            problem = "has running statistics and no num_batches_tracked; set it to a tensor"
            raise ValueError(f"{type(self).__name__} {problem}")
        update = self.training and self.track_running_stats and self.observer is None
        limits = self._limits() if self.training else None
        if update and is_repeated():
            if limits is not None and not is_taped():
                raise RuntimeError(f"{self._name()} would be repeated with other corrections r and d: {_CHECKPOINT}")
            update = False
        return Running(
            mean, var, tracked, self.nonfinite_counter(), self.momentum, self.running_update, divisor, limits, update
        )

    def _limits(self) -> Limits | None:
        """The limits of renorm's corrections in training, or None for a layer without corrections."""
        return None

    def _groups(self, x: Tensor, group_name: str | None) -> SampleGroups:
        n, g = x.shape[0], self.ghost_batch_size
        if self.training and self.sample_groups is not None:
            index = self.sample_groups.index
            if index is not None and len(index) != n:
                remedy = "the rows of this layer are not samples; run one process for each logical GPU"
                self._fail(x, f"its groups are those of {len(index)} samples: {remedy}", RowsError)
            return self.sample_groups
        if g is None or not self.training:
            return SampleGroups(None, 1, smallest=n)
        if self.remainder == "error" and n % g:  # in this order: a graph is bound to what it has asked of n
            remedy = "drop the last samples, choose a divisor, or pass remainder='smaller' for a smaller last group"
            self._fail(x, f"{n} samples are no multiple of ghost_batch_size={g}; {remedy}", BatchError)
        filled = -(-n // g)
        number = max(1, filled if group_name is None else self._common_groups(x, filled, group_name))
        index = None if number == 1 else _consecutive_groups(n, g, x)
        # A group that is empty here may hold a single sample elsewhere, unless each group is known to be whole.
        whole = self.remainder == "error" and g > 1
        # A single sample of several values has a variance, so the size of the last group does not matter.
        last = 1 if math.prod(x.shape[2:]) > 1 else n % g or g
        smallest = g if whole else 0 if filled < number else last
        return SampleGroups(index, number, smallest=smallest)

    def _common_groups(self, x: Tensor, filled: int, group_name: str) -> int:
        """How many ghost groups travel: a number that all ranks agree on, though their batches may differ."""
        number = self.max_ghost_groups or self._agreed_groups
        if number is None:
            if torch.compiler.is_compiling():
                return filled
            number = self._agreed_groups = max_over_ranks(
                filled, group_name, x.device, f"{self._name()} (number of ghost groups)"
            )
        if filled > number:
            remedy = f"pass max_ghost_groups={filled} (or more) when the first batch is not the largest"
            self._fail(x, f"{filled} ghost groups, but the ranks have agreed on {number}; {remedy}")
        return number

    def _check_count(self, x: Tensor, masked: bool, wait: bool, counts: Tensor) -> None:
        """Raise unless each group (counts are (G,), over all processes) has a variance.

        All ranks raise or none does: the ranks that skip this check know from their shapes that no total is 1.
        ``wait`` is that of :meth:`_require`.
        """
        problem = (
            f"a group of samples holds one {'valid ' if masked else ''}value per channel over all processes, which has "
            f"no variance; use {'a mask with more valid elements, ' if masked else ''}a larger batch, more processes "
            "in the group, or eval mode with running statistics"
        )
        self._require(x, (counts != 1).all(), problem, BatchError, wait)

    def _check_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        least = 1.0 if bias is None else bias.detach().abs().clamp(min=1.0)
        enough = (weight.detach().abs() >= MIN_WEIGHT * least).all()
        problem = (
            "save='output' needs weights of at least 1/128 in size, and 1/128 of their bias; use save='input' for this "
            "layer"
        )
        self._require(x, enough, problem, ValueError, wait=not x.is_cuda)

    def _require(self, x: Tensor, condition: Tensor, problem: str, error: type[ValueError], wait: bool = True) -> None:
        """``error`` unless the () bool tensor holds, or an error on the device if the host must not wait for it."""
        if torch.compiler.is_compiling() or not wait:
            assert_async(condition, f"{type(self).__name__}: {problem}")
        elif not (x.is_cuda and torch.cuda.is_current_stream_capturing()) and not bool(condition):
            self._fail(x, problem, error)


def _forward_of_subclass(layer: SmallBatchNorm, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    """The forward pass for a subclass of Tensor, called by its ``__torch_function__``, which converts the output."""
    if input.is_nested:
        layer._fail(input, "a nested tensor has no channels in dimension 1; give the layer its rows, x.values()")
    residual, mask = (_plain(t) if isinstance(t, Tensor) else t for t in (residual, mask))
    output: Tensor = SmallBatchNorm.forward(layer, _plain(input), residual, mask=mask)
    return output


def _plain(x: Tensor) -> Tensor:
    """``x`` as a Tensor, for which there are kernels, unless its class does operations in its own way."""
    dispatched = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return x if dispatched else x.as_subclass(Tensor)


@constant_result  # tracing runs it
def _warn_of_export(kind: str) -> None:
    said = (
        f"{kind} is exported in training mode: the program will always normalize by the statistics of its batch. For "
        "inference, call model.eval() first; for quantization-aware training, export syncbn.revert(model)"
    )
    warnings.warn(said, UserWarning, stacklevel=2)


def _zero_counter(device: torch.device) -> Tensor:
    return static_address(torch.zeros((), dtype=torch.int64, device=device))


def _consecutive_groups(n: int, size: int, x: Tensor) -> Tensor:
    """The group of each of ``n`` samples, (N,) int64 on the device of ``x``."""
    if x.is_cpu and runs_at_once(x):
        return _kept_groups(n, size, torch.is_inference_mode_enabled())
    return torch.arange(n, device=x.device).div(size, rounding_mode="floor")


@functools.lru_cache(maxsize=256)
def _kept_groups(n: int, size: int, inference: bool) -> Tensor:
    # A tensor made in inference mode must not be saved for a backward pass, so each mode has its own.
    return torch.arange(n, device="cpu").div(size, rounding_mode="floor")


def _optional_scope(sync: bool, process_group: Any, sync_group_size: int | None) -> Scope | None:
    """The scope of a layer that is synchronized only if asked."""
    if sync or process_group is not None or sync_group_size is not None:
        return make_scope(process_group, sync_group_size)
    return None


class SyncBatchNorm(SmallBatchNorm):
    """Batch normalization with the statistics of the samples on all ranks of a process group.

    A drop-in replacement for :class:`torch.nn.SyncBatchNorm`, with the same parameters, buffers and checkpoints. There
    are two differences: ``process_group`` is an argument, not an attribute, and in place of ``convert_sync_batchnorm``
    there is :func:`syncbn.convert`. Inputs are (N, C) or (N, C, *)
    on any device, and N may differ between ranks or be zero. Without an initialized process group it is
    :class:`torch.nn.BatchNorm2d`. ``eval()`` uses the running statistics and never communicates. Second derivatives
    across ranks and ``torch.compile(fullgraph=True)`` work. The ``mask`` of :meth:`forward` leaves out padding.

    Args:
        num_features: number of channels C.
        eps: added to the variance for numerical stability.
        momentum: weight of the new value in the running statistics. None is a cumulative average.
        affine: learn ``weight`` and ``bias``.
        track_running_stats: keep running statistics. Without them evaluation uses those of the local batch.
        process_group: which ranks share statistics: a process group, a 1-D device mesh or a sequence of global ranks.
            None is all ranks.
        device, dtype: of the parameters and buffers. Running statistics are float32 or wider.
        sync_group_size: share statistics only among this many consecutive ranks.
        bias: whether there is a ``bias`` if ``affine`` is True.
        activation: ``"relu"``, ``"leaky_relu"`` or ``"silu"``, applied in the same pass over memory, after the optional
            ``residual`` of :meth:`forward` is added.
        negative_slope: slope of ``leaky_relu``.
        save: ``"input"`` or ``"output"``, what is kept for the backward pass. ``"output"`` is In-Place Activated
            BatchNorm (Rota Bulò et al. 2018, arXiv 1712.02616). It frees the input's memory unless another operation
            keeps the input (a convolution does not keep its own output). It needs an activation with an inverse (none,
            or ``leaky_relu`` with a positive slope), no residual, no second derivative, and no weight below 1/128 in
            size or below 1/128 of its bias. Under ``torch.func`` the input is kept as well.

    Raises:
        ValueError: an option has a wrong value, or both ``process_group`` and ``sync_group_size`` are given.

    Example:
        >>> layer = SyncBatchNorm(3, activation="relu")
        >>> x = torch.randn(4, 3, 8, 8)
        >>> layer(x, residual=x).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        sync_group_size: int | None = None,
        bias: bool = True,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, bias=bias
        )
        self.scope = make_scope(process_group, sync_group_size)
        self.activation, self.negative_slope, self.save = activation, negative_slope, save
        self._check_options()


class GhostBatchNorm(SmallBatchNorm):
    """Batch normalization over groups of consecutive samples (Hoffer et al. 2017, arXiv 1705.08741, algorithm 1).

    In training each group is normalized by its own statistics. Evaluation uses the running statistics and ignores the
    groups. If synchronized, group i of each rank shares its statistics with group i of the others.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: see :class:`SyncBatchNorm`.
        ghost_batch_size: number of samples in each group.
        remainder: what to do if the batch is not a multiple of ``ghost_batch_size``: ``"error"`` raises,
            ``"smaller"`` makes the last group smaller.
        running_update: how the groups of one step enter the running statistics. ``"mean"``: one update with the mean
            over groups of mean and unbiased variance. ``"sequential"``: one update per group, in order. ``"total"``:
            one update with the mean and variance of the whole batch.
        sync, process_group, sync_group_size: share statistics among ranks. Giving a group or a size implies ``sync``.
        max_ghost_groups: if synchronized, the number of groups to reduce in each step, at least as many as any rank's
            largest batch has. None: the ranks agree on it in the first training step (one small collective), so the
            first batch must be as large as any later one. A layer that is compiled before its first step assumes that
            all ranks have equally many groups.
        activation, negative_slope, save: see :class:`SyncBatchNorm`.

    Raises:
        ValueError: an option has a wrong value, or both ``process_group`` and ``sync_group_size`` are given.

    Example:
        >>> layer = GhostBatchNorm(3, ghost_batch_size=2)
        >>> x = torch.randn(4, 3)
        >>> torch.equal(layer(x)[:2], layer(x[:2]))
        True
    """

    def __init__(
        self,
        num_features: int,
        ghost_batch_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        remainder: Remainder = "error",
        running_update: RunningUpdate = "mean",
        sync: bool = False,
        process_group: Any = None,
        sync_group_size: int | None = None,
        max_ghost_groups: int | None = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, bias=bias
        )
        self.scope = _optional_scope(sync, process_group, sync_group_size)
        self.ghost_batch_size, self.remainder, self.max_ghost_groups = ghost_batch_size, remainder, max_ghost_groups
        self.running_update = running_update
        self.activation, self.negative_slope, self.save = activation, negative_slope, save
        self._check_options()


class BatchRenorm(SmallBatchNorm):
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275): batch statistics corrected towards the running statistics.

    In training ``y = weight * ((x - mean_B) / sigma_B * r + d) + bias``; B means "of the batch". The corrections
    r = sigma_B / sigma and d = (mean_B - mean) / sigma are clipped to [1 / r_max, r_max] and [-d_max, d_max], are
    constants for the gradient, and use the running statistics from before this step's update.

    The limits rise with ``num_batches_tracked``, the number of training steps. Parameters, checkpoints and evaluation
    are those of BatchNorm, with sigma = sqrt(running_var + eps). Activation checkpointing needs
    :func:`syncbn.checkpoint_contexts`.

    Args:
        num_features, eps, affine, device, dtype, bias: see :class:`SyncBatchNorm`.
        momentum: weight of the new value in the running statistics; the default 0.01 is the paper's alpha (section 3).
        track_running_stats: must be True.
        r_max, d_max: the limits at the end of their ramps.
        warmup_steps: number of training steps with r = 1 and d = 0, which is plain batch normalization.
        r_ramp_end, d_ramp_end: the step at which each limit reaches its maximum, linearly from the end of the warm-up.
        sync, process_group, sync_group_size: correct statistics that are shared among ranks. Giving a group or a size
            implies ``sync``.
        ghost_batch_size, remainder, max_ghost_groups: correct the statistics of each group; see
            :class:`GhostBatchNorm`. None is the whole batch.
        activation, negative_slope, save: see :class:`SyncBatchNorm`.

    Raises:
        ValueError: an option has a wrong value, or ``track_running_stats`` is False.

    Example:
        >>> layer = BatchRenorm(3, warmup_steps=100, r_ramp_end=800, d_ramp_end=500)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(layer(x), torch.nn.BatchNorm1d(3)(x), atol=1e-6)  # still in the warm-up
        True
    """

    corrects: bool = True
    """Whether r and d are applied in training."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5_000,
        r_ramp_end: int = 40_000,
        d_ramp_end: int = 25_000,
        sync: bool = False,
        process_group: Any = None,
        sync_group_size: int | None = None,
        ghost_batch_size: int | None = None,
        remainder: Remainder = "error",
        max_ghost_groups: int | None = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        save: Save = "input",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, bias=bias
        )
        self.scope = _optional_scope(sync, process_group, sync_group_size)
        self.ghost_batch_size, self.remainder, self.max_ghost_groups = ghost_batch_size, remainder, max_ghost_groups
        self.activation, self.negative_slope, self.save = activation, negative_slope, save
        self._check_options()
        self.r_max, self.d_max = r_max, d_max
        self.warmup_steps, self.r_ramp_end, self.d_ramp_end = warmup_steps, r_ramp_end, d_ramp_end
        if self.running_mean is None:
            raise ValueError("BatchRenorm needs track_running_stats=True, because r and d use the running statistics")
        for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            # An infinite limit cannot rise from a ramp: 0 * inf is NaN.
            if not (limit >= least and math.isfinite(limit)):
                raise ValueError(f"{name} must be a finite number of at least {least}, got {limit!r}")
        for name, end in (("r_ramp_end", r_ramp_end), ("d_ramp_end", d_ramp_end)):
            if not 0 <= warmup_steps <= end:
                raise ValueError(f"expected 0 <= warmup_steps <= {name}, got {warmup_steps!r} and {end!r}")

    def _limits(self) -> Limits | None:
        if not self.corrects:
            return None
        return Limits(self.r_max, self.d_max, self.warmup_steps, self.r_ramp_end, self.d_ramp_end)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}, "
            f"r_ramp_end={self.r_ramp_end}, d_ramp_end={self.d_ramp_end}"
        )
