"""Trees of tensors: batches as data loaders and models have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` (a tensor, or dicts, lists and tuples of trees) with ``function`` applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        values = {key: tree_map(function, value) for key, value in tree.items()}
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return values
        made = copy.copy(tree)  # of its class, such as transformers' BatchEncoding
        for key, value in values.items():  # some of them have no update()
            made[key] = value
        return made
    if isinstance(tree, list | tuple):
        mapped = [tree_map(function, value) for value in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree."""
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) or x, tree)  # type: ignore[func-returns-value]
    return found
