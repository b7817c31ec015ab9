"""Checks of configuration values, and the errors they raise: the key, the value and what was expected."""

from __future__ import annotations

import math
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


class ConfigError(ValueError):
    """A value of the configuration that cannot be used."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}: got {value!r}, expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class LocalError(ValueError):
    """A mistake that only one process meets, such as an image that cannot be read. That process has to report it."""


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Raise :class:`ConfigError` unless ``ok``."""
    if not ok:
        raise ConfigError(key, value, expected)


def check_rules(config: Any, prefix: str, *rules: tuple[str, bool, str]) -> None:
    """Raise :class:`ConfigError` for the first broken rule: a field's name, whether it is right, what was expected."""
    for name, holds, expected in rules:
        require(holds, prefix + name, getattr(config, name), expected)


def check_values(config: Any, prefix: str, **least: int) -> None:
    """Check every field of a dataclass against its type, and those named in ``least`` against a smallest value.

    Raises:
        ConfigError: names the first wrong field, with ``prefix`` before it.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        require(_fits(value, hint), prefix + f.name, value, _described(hint))
        if f.name in least and value is not None:
            smallest = least[f.name]
            expected = f"a number of at least {smallest}" if hint is float else f"an integer of at least {smallest}"
            require(value >= smallest, prefix + f.name, value, expected)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (list, tuple):
        right_length = origin is list or len(value) == len(parts) if isinstance(value, list | tuple) else False
        return right_length and all(_fits(item, parts[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(_described(part) for part in parts)
    if origin is list:
        return f"a list, each item {_described(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}, each item {_described(parts[0])}"
    return _WORDS.get(hint, "a mapping")
