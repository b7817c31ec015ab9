"""Whether a model computes the same after its conversion, and after it was reverted: ``syncbn convert-check``.

Everything is done in float64 in one process, where each kind of layer, with one ghost group or in renorm's warm-up, is
plain batch normalization. Differences are then rounding: below 1e-9 in all models of docs/convert_check.md, while a
lost activation, another eps or another variance are above 1e-3.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.convert import convert, revert
from syncbn.frozen_batchnorm import is_frozen
from syncbn.named_model import NamedModel
from syncbn.train.config import ConfigError
from syncbn.trees import leaves, tree_map

TOLERANCE = 1e-6
"""Largest difference that is taken for rounding: the middle, in powers of ten, of the two above."""
KINDS: dict[str, dict[str, Any]] = {
    "sync": {},
    "ghost": {"ghost_batch_size": 2**40, "remainder": "smaller"},  # one group, however many rows the layer has
    "renorm": {},
}
Tensors = dict[str, Tensor]


@dataclass
class Comparison:
    """What a conversion did to a model, and how far the models are from each other."""

    name: str
    kind: str
    replaced: Counter[str]
    kept: Counter[str]
    refused: list[str]
    reverted: bool = False
    """Whether revert gave back every class, and every name in a checkpoint."""
    differences: dict[str, tuple[float, str]] = field(default_factory=dict)
    """By what was compared, the largest difference and the tensor that has it."""

    @property
    def same(self) -> bool:
        near = all(difference <= TOLERANCE for difference, _ in self.differences.values())
        return near and self.reverted and not self.refused


def compare(named: NamedModel, kind: str) -> Comparison:
    """Convert a copy of the model and revert it, and compare all that both compute with torch's layers.

    Raises:
        ConfigError: the model has no batch normalization or does not take its inputs.
    """
    _check_norms(named)
    plain = named.model.double()
    inputs = tree_map(lambda x: x.double() if x.is_floating_point() else x, named.inputs)
    try:
        _settle(plain, lambda: named.call(plain, inputs))
        model = copy.deepcopy(plain)
        before = _state_of_classes(model)
        expected = _computed(named, plain, inputs)
    except Exception as error:  # whatever the model's code raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        shapes = ", ".join(str(tuple(x.shape)) for x in leaves(_tree(inputs)))
        raise ConfigError("model", named.name, f"a model that takes {shapes} in float64 ({reason})") from error
    norms = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    refused = _convert_each(model, kind, norms)
    replaced = Counter(cls for name, cls in norms.items() if name not in refused)
    found = Comparison(named.name, kind, replaced, _other_norms(model), list(refused.values()))
    for what, tensors in _computed(named, model, inputs).items():
        found.differences[what] = largest_difference(tensors, expected[what])
    revert(model)
    model.load_state_dict(plain.state_dict())
    found.reverted = before == _state_of_classes(model)
    after = _outputs(named, model.eval(), inputs)
    found.differences["outputs after revert"] = largest_difference(after, _outputs(named, plain.eval(), inputs))
    return found


def largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest value of its tensor, and the name of the tensor.

    The scale is at least a thousandth of all tensors' largest value, for what is zero but for rounding, such as the
    gradient of a bias before a normalization.
    """
    if actual.keys() != expected.keys():
        return math.inf, next(iter(actual.keys() ^ expected.keys()))
    largest = max((_largest(t) for t in expected.values()), default=0.0)
    worst = (0.0, "")
    for name, tensor in expected.items():
        if tensor.shape != actual[name].shape:
            return math.inf, name
        if tensor.numel():
            found, wanted = actual[name].detach().double(), tensor.detach().double()
            alike = (found == wanted) | (found.isnan() & wanted.isnan())  # also where both are infinite
            off = (found - wanted).abs().nan_to_num(nan=math.inf).where(~alike, 0.0)
            difference = float(off.max()) / max(_largest(tensor), 1e-3 * largest, 1e-300)
            if difference > worst[0]:
                worst = (difference, name)
    return worst


def _largest(tensor: Tensor) -> float:
    """The largest finite value."""
    values = tensor.detach().double().abs()
    return float(values.where(values.isfinite(), 0.0).max()) if tensor.numel() else 0.0


def _tree(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _check_norms(named: NamedModel) -> None:
    if not any(isinstance(m, _BatchNorm) for m in named.model.modules()):
        others = ", ".join(f"{number} {name}" for name, number in _other_norms(named.model).items())
        frozen = any(is_frozen(m) for m in named.model.modules())
        remedy = "; syncbn.convert(model, kind, frozen=True) makes the frozen ones trainable" if frozen else ""
        has = f" (it has {others}{remedy})" if others else ""
        raise ConfigError("model", named.name, f"a model with batch normalization{has}")


def _other_norms(model: nn.Module) -> Counter[str]:
    """Normalizations that are no batch normalization, by class; modules that only contain some are left out."""
    return Counter(
        type(m).__name__
        for m in model.modules()
        if "norm" in type(m).__name__.lower() and not isinstance(m, _BatchNorm) and (m._parameters or m._buffers)
    )


def _settle(model: nn.Module, call: Callable[[], Any]) -> None:
    """Give the batch normalizations parameters that are not 1 and 0, and the running statistics of one batch.

    Fresh ones would hide an exchange, and let values grow from layer to layer in evaluation.
    """
    torch.manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            if norm.bias is not None:
                nn.init.uniform_(norm.bias, -0.5, 0.5)
    with torch.no_grad():
        model.train()
        call()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _convert_each(model: nn.Module, kind: Any, norms: Mapping[str, str]) -> dict[str, str]:
    """Convert layer by layer, so that all that cannot be converted are known: by name, why not."""
    refused: dict[str, str] = {}
    for name in norms:
        try:
            convert(model, kind, where=_only(name), **KINDS[kind])
        except ValueError as error:
            refused[name] = str(error)
    return refused


def _only(name: str) -> Callable[[str, nn.Module], bool]:
    return lambda each, layer: each == name


def _computed(named: NamedModel, model: nn.Module, inputs: Any) -> dict[str, Tensors]:
    """What the model computes in evaluation and in one step of training, by what it is and by name."""
    in_evaluation = _outputs(named, model.eval(), inputs)
    model.train()
    tensors = tree_map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, _tree(inputs))
    model.zero_grad()
    outputs = _outputs(named, model, tensors, grad=True)
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum()
        for t in outputs.values()
        if t.requires_grad
    )
    if not isinstance(loss, Tensor):
        raise ValueError("it returns no tensor that depends on its inputs or parameters")
    loss.backward()
    return {
        "outputs in evaluation": in_evaluation,
        "outputs in training": {name: t.detach() for name, t in outputs.items()},
        "gradients of inputs": {str(i): x.grad for i, x in enumerate(leaves(tensors)) if x.grad is not None},
        "gradients of parameters": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "buffers after the step": {n: b.clone() for n, b in model.named_buffers()},
    }


def _outputs(named: NamedModel, model: nn.Module, inputs: Any, grad: bool = False) -> Tensors:
    torch.manual_seed(2)  # dropout draws the same each time
    if not grad:
        inputs = tree_map(Tensor.clone, _tree(inputs))  # which the model may change
    with torch.set_grad_enabled(grad):
        found = leaves(named.call(model, inputs))
    return {str(i): t for i, t in enumerate(found) if t.is_floating_point()}


def _state_of_classes(model: nn.Module) -> tuple[dict[str, type], list[str], list[str]]:
    classes = {name: type(m) for name, m in model.named_modules()}
    return classes, list(model.state_dict()), [name for name, _ in model.named_parameters()]


def lines(found: Comparison) -> list[str]:
    """The comparison in words, for a terminal."""
    said = [f"{found.name}, converted to {found.kind}"]
    said += [f"  replaced  {number} {cls}" for cls, number in found.replaced.items()]
    said += [f"  kept      {number} {cls}" for cls, number in found.kept.items()]
    said += [f"  refused   {reason}" for reason in found.refused]
    said.append(f"  reverted  {'to the first classes' if found.reverted else 'but NOT to the first classes'}")
    said.append(f"  largest differences, relative to the largest value of a tensor; up to {TOLERANCE:.0e} is rounding:")
    for what, (difference, name) in found.differences.items():
        where = f"  in {name}" if difference > TOLERANCE and name else ""
        said.append(f"    {what:<24}  {difference:.1e}{where}")
    verdict = "the same" if found.same else "NOT the same" if not found.refused else "not converted as a whole"
    return [*said, f"  {verdict}"]
