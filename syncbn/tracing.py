"""What follows what in a model: calls of modules, read off traces of ``forward`` (:mod:`torch.fx`).

A copy is traced, in training and in evaluation, with optional arguments and without, with values that are tensors to
``isinstance`` and that are not: a copy without hooks, with parameters and buffers that have no values, so that the
model cannot notice. Modules without a batch normalization
inside are not looked into; one that cannot be traced is set aside, and its parts and what surrounds it are traced
without it.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

# More optional arguments than this are too many to try with and without.
_MAX_OPTIONAL = 3
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def find_followers(
    module: nn.Module,
    layers: Iterable[_BatchNorm],
    is_follower: Callable[[nn.Module], bool],
    shared: Callable[[nn.Module], bool],
) -> dict[_BatchNorm, nn.Module]:
    """For each of ``layers`` the module that gets all that it returns, where there is one and that is certain.

    Args:
        module: the model.
        layers: some of its batch normalizations.
        is_follower: which modules are wanted, among those without a batch normalization inside.
        shared: which of these may be called elsewhere too; the others have that one call.
    """
    proofs = _trace_parts(module, is_follower, set(), set())
    traces = [trace for proof in proofs for trace in proof.traces]
    places = Counter(m for _, m in module.named_modules(remove_duplicate=False))
    found = {}
    for layer in layers:
        partners = [call.partner for trace in traces for call in trace if call.module is layer]
        follower = partners[0] if partners else None
        if follower is None or any(partner is not follower for partner in partners):
            continue
        complete = [proof for proof in proofs if proof.sees_all_of(layer, places)]
        if not shared(follower):
            complete = [proof for proof in complete if proof.sees_all_of(follower, places)]
            uses = [[call.partner for call in trace if call.module is follower] for trace in traces]
            if any(use not in ([], [layer]) for use in uses):
                continue
        if complete:
            found[layer] = follower
    return found


def is_plain(module: nn.Module) -> bool:
    """Whether a call of ``module`` does what its class does, and no more."""
    return "forward" not in vars(module) and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return any(vars(module).get(name) for name in _HOOKS)


def _trace_parts(
    root: nn.Module, is_follower: Callable[[nn.Module], bool], opaque: set[nn.Module], tried: set[nn.Module]
) -> list[_Proof]:
    """Traces of ``root``, and of its parts where it cannot be traced whole.

    What cannot be traced at all goes to ``opaque``, and what was looked at to ``tried``.
    """
    tried.add(root)
    inner = {m for m in root.modules() if not isinstance(m, _BatchNorm) and _has_norm(m)}
    if root not in inner:
        return []
    proofs: list[_Proof] = []
    traces = _trace(root, inner - opaque, is_follower)
    if traces is None:
        known = len(opaque)
        for child in root.children():
            if child not in tried:
                proofs += _trace_parts(child, is_follower, opaque, tried)
        if len(opaque) > known:
            traces = _trace(root, inner - opaque, is_follower)
    if traces is None:
        opaque.add(root)
    else:
        closed = (m for m in root.modules() if m not in inner or m in opaque)
        hidden = {part for m in closed for part in m.modules() if part is not m}
        inside = Counter(m for _, m in root.named_modules(remove_duplicate=False))
        proofs.append(_Proof(root, traces, hidden, inside))
    return proofs


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _trace(
    root: nn.Module, inner: set[nn.Module], is_follower: Callable[[nn.Module], bool]
) -> list[list[_Call]] | None:
    """The calls in ``root.forward``, in every way in which it may be called; None where one cannot be traced."""
    if "forward" in vars(root):
        return None
    try:
        parameters = list(inspect.signature(type(root).forward).parameters.values())[1:]
        optional = {p.name: p.default for p in parameters if p.default is not p.empty}
        if len(optional) > _MAX_OPTIONAL:
            return None
        left_out = [c for n in range(len(optional) + 1) for c in itertools.combinations(optional, n)]
        return [
            _calls(_trace_once(root, inner, training, tensors, {name: optional[name] for name in names}), is_follower)
            for training, tensors, names in itertools.product((True, False), (True, False), left_out)
        ]
    except Exception:  # this runs the model's own code on what is no tensor: anything may go wrong
        return None


@contextmanager
def _unnoticed() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)


@contextmanager
def _answering(inner: set[nn.Module], tensors: bool) -> Iterator[None]:
    """Whether values in a trace are tensors to ``isinstance``, in the files that define the classes of ``inner``.

    By themselves they are not, and a ``forward`` that asks would show one of its ways alone.
    """

    def answer(value: Any, classes: Any) -> bool:
        traced = issubclass(type(value), fx.Proxy)
        return tensors and issubclass(Tensor, classes) if traced else isinstance(value, classes)

    names = {cls.__module__ for m in inner for cls in type(m).__mro__}
    spaces = [vars(sys.modules[name]) for name in names if name in sys.modules and not f"{name}.".startswith("torch.")]
    spaces = [space for space in spaces if "isinstance" not in space]
    try:
        for space in spaces:
            space["isinstance"] = answer
        yield
    finally:
        for space in spaces:
            space.pop("isinstance", None)


def _trace_once(
    root: nn.Module, inner: set[nn.Module], training: bool, tensors: bool, left_out: dict[str, Any]
) -> _Tracer:
    copied, originals = _copy(root)
    for m in originals:
        vars(m)["training"] = training
    tracer = _Tracer(originals, inner)
    with _unnoticed(), _answering(inner, tensors):
        tracer.trace(copied, left_out or None)
    # A value that was put into an attribute can be used when the trace is over.
    kept = (value for m in originals for value in pytree.tree_leaves(vars(m)))
    tracer.kept = {value.node for value in kept if issubclass(type(value), fx.Proxy)}
    return tracer


def _calls(tracer: _Tracer, is_follower: Callable[[nn.Module], bool]) -> list[_Call]:
    called = tracer.called
    partners: dict[fx.Node, nn.Module] = {}
    for node, m in called.items():
        if isinstance(m, _BatchNorm) and len(node.users) == 1 and node not in tracer.kept:
            (user,) = node.users
            if user in called and is_follower(called[user]) and user.args == (node,) and not user.kwargs:
                partners |= {node: called[user], user: m}
    return [_Call(m, partners.get(node)) for node, m in called.items()]


def _copy(root: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """``root`` for tracing, and whose copy each module in it is."""
    memo: dict[int, Any] = {}
    for m in root.modules():
        memo |= {id(value): type(value)() for key, value in vars(m).items() if key.endswith("_hooks")}
        memo |= {id(t): _without_values(t) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        if isinstance(m, _BatchNorm):  # never run, and may have a process group, which cannot be copied
            memo[id(m)] = norm = object.__new__(type(m))
            vars(norm).update(vars(m))
    copied = copy.deepcopy(root, memo)
    return copied, {memo[id(m)]: m for m in root.modules() if id(m) in memo}


def _without_values(t: Tensor) -> Tensor:
    if type(t) is Tensor:
        return torch.empty_like(t, device="meta")
    if type(t) is nn.Parameter:
        return nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=t.requires_grad)
    return t


def _seen(*values: Any) -> None:
    """Stands in a trace for a hook's look at values."""


class _Call(NamedTuple):
    module: nn.Module
    """A module that is not looked into."""
    partner: nn.Module | None
    """Of a layer the activation that gets its output, and of this the layer; None where that is not all."""


class _Proof(NamedTuple):
    root: nn.Module
    traces: list[list[_Call]]
    """One for each way to call ``root``."""
    hidden: set[nn.Module]
    """Modules inside of those that were not looked into."""
    inside: Counter[nn.Module]
    """How many names each module has within ``root``."""

    def sees_all_of(self, module: nn.Module, places: Counter[nn.Module]) -> bool:
        """Whether the traces have every call of ``module``, given how many names each has in the whole model."""
        return module not in self.hidden and places[module] == places[self.root] * self.inside[module]


class _Tracer(fx.Tracer):
    """Records calls of the modules without batch normalization inside, and of batch normalizations."""

    trace_asserts = True

    def __init__(self, originals: dict[nn.Module, nn.Module], inner: set[nn.Module]) -> None:
        super().__init__()
        self.originals = originals
        self.inner = inner
        self.called: dict[fx.Node, nn.Module] = {}
        """The modules that were not looked into, by their calls."""
        self.kept: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.originals[m] not in self.inner

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        original = self.originals[m]
        if type(original) is nn.Identity and is_plain(original) and len(args) == 1 and not kwargs:
            return args[0]
        hooked = _is_hooked(original)
        if hooked:
            self.create_proxy("call_function", _seen, (args, kwargs), {})
        result = super().call_module(m, forward, args, kwargs)
        if self.is_leaf_module(m, ""):
            self.called[result.node] = original
        if hooked:
            self.create_proxy("call_function", _seen, (result,), {})
        return result
