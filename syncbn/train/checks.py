"""What is wrong with a value, said in one way: the key, the value, and what was expected."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A value of the configuration that cannot be used."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}: got {value!r}, expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class LocalError(ValueError):
    """A mistake that only the process which meets it can report, such as an image that cannot be read."""


def check_values(config: Any, prefix: str) -> None:
    """What a type says of a value, for configurations made in Python: a choice among names, and finite numbers."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if get_origin(hint) is Literal:
            require(value in get_args(hint), prefix + f.name, value, f"one of {', '.join(map(repr, get_args(hint)))}")
        if isinstance(value, float):
            require(math.isfinite(value), prefix + f.name, value, "a finite number")


def require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(key, value, expected)
