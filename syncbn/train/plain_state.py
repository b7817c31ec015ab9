"""A training state as JSON and named tensors, so that a checkpoint is read without unpickling anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def to_plain(tree: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """``tree`` (dicts, lists, tuples, tensors, numbers, texts, None) in values of JSON; its tensors go to ``tensors``.

    What JSON has no word for is a list that begins with its kind.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous()
        return ["tensor", name]
    if isinstance(tree, dict):
        pairs = enumerate(tree.items())
        # Keys are kept as they are: optimizers number their parameters.
        return ["dict", *([key, to_plain(value, tensors, f"{name}.{number}")] for number, (key, value) in pairs)]
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return [kind, *(to_plain(value, tensors, f"{name}.{number}") for number, value in enumerate(tree))]
    assert tree is None or isinstance(tree, bool | int | float | str), f"{name} is a {type(tree).__name__}"
    return tree


def from_plain(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """What :func:`to_plain` was given. Raises ValueError, KeyError or TypeError for anything else."""
    if not isinstance(plain, list):
        return plain
    kind, *rest = plain
    if kind == "tensor":
        return tensors[rest[0]]
    if kind == "dict":
        return {key: from_plain(value, tensors) for key, value in rest}
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r}")
    values = [from_plain(value, tensors) for value in rest]
    return tuple(values) if kind == "tuple" else values
