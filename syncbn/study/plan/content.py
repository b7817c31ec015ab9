"""Parts of a study file and their checks. ``where`` is what an error message calls the part, as ``my.yaml: seeds``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.study.plan.grid import Value
from syncbn.train.config import ConfigError, meant, require


def mapping(content: object, where: str, required: Sequence[str] = (), optional: Sequence[str] = ()) -> dict[Any, Any]:
    """``content`` if it is a mapping with exactly these keys (any keys, if none are named)."""
    if not isinstance(content, dict):
        raise ConfigError(where, content, "a mapping")
    known = (*required, *optional)
    for key in content:
        require(not known or key in known, f"{where}: key", key, f"one of {', '.join(known)}{meant(key, known)}")
    for key in required:
        require(key in content, f"{where}: keys", list(content), f"the key {key!r} too")
    return content


def axis_values(content: object, where: str) -> tuple[Value, ...]:
    """The values of an axis: at least one, plain and different."""
    plain = isinstance(content, list) and all(isinstance(v, int | float | str | bool | None) for v in content)
    if not isinstance(content, list) or not plain or not content:
        raise ConfigError(where, content, "a list of at least one value")
    values = tuple(map(number, content))
    require(len({(type(v) is bool, v) for v in values}) == len(values), where, content, "values that differ")
    return values


def place(content: object, axes: Mapping[str, Sequence[Value]], where: str) -> dict[str, Value]:
    """The axes that ``content`` names, each with one of its values."""
    found = {}
    for axis, given in mapping(content, where).items():
        require(axis in axes, where, axis, f"an axis of the study ({', '.join(axes) or 'it has none'})")
        value = number(given)
        alike = [known for known in axes[axis] if known == value and isinstance(known, bool) == isinstance(value, bool)]
        require(bool(alike), f"{where}.{axis}", given, f"one of that axis's values {list(axes[axis])}")
        found[axis] = alike[0]
    return found


def number(value: Any) -> Any:
    """The number that a text spells, else the value itself: YAML reads 1e-3, which has no point, as a text."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def positive(value: object, where: str) -> int:
    """``value`` if it is a positive integer."""
    if type(value) is not int or value < 1:
        raise ConfigError(where, value, "a positive integer")
    return value


def text(value: object, where: str) -> str:
    """``value`` without blanks around it, if it is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(where, value, "a text that is not empty")
    return value.strip()
