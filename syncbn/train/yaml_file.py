"""Reading and writing YAML files: YAML 1.2's meaning of plain values, and one line for everything that is wrong.

PyYAML follows YAML 1.1, in which `no` is false, `1e3` a text, `1:30` the number 90 and `010` the number 8.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from syncbn.train.config import ConfigError

_LONGEST = 2**20
_MOST_VALUES = 100_000
"""Of a file in which anchors repeat values: a few lines can stand for billions."""
_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2, and `<<` of YAML 1.1: tag, expression, first characters ("" for an empty value).
_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


def _with_plain_values(cls: Any) -> Any:
    cls.yaml_implicit_resolvers = {}
    for tag, expression, first in _PLAIN:
        cls.add_implicit_resolver(_TAG + tag, re.compile(f"^(?:{expression})$"), list(first))
    return cls


@_with_plain_values
class _Loader(yaml.SafeLoader):
    """Rejects a key that is given twice, of which YAML would keep the last one, and values that repeat without end."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before `<<` is resolved: a key may be given beside a merged one of the same name.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for child, _ in node.value:
            if not isinstance(child, yaml.ScalarNode) or child.tag == _TAG + "merge":
                continue
            if (child.tag, child.value) in seen:
                problem = f"key {child.value!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=child.start_mark)
            seen.add((child.tag, child.value))
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, ())
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        # Escapes can spell what no path and no file in UTF-8 can hold.
        if any(c == "\0" or 0xD800 <= ord(c) < 0xE000 for c in text):
            problem = "a text has a NUL or half a character in it"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return text


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


@_with_plain_values
class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that the loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_yaml(path: Path, key: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty for an empty file.

    Raises:
        ConfigError: the file cannot be read, or is something else. The error has ``key`` and names the file, but holds
            nothing of its content but keys.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(key, path, f"a file that can be read ({reason})") from None
    try:
        if len(content) > _LONGEST:
            raise ValueError(f"it has {len(content):,} bytes")
        values = yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(key, path, f"a file in UTF-8 (byte {error.start} is not)") from None
    except RecursionError:
        raise ConfigError(key, path, "a file in YAML (it is nested too deeply)") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(key, path, f"a file in YAML ({line}{error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(key, path, f"a file in YAML ({str(error).splitlines()[0]})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(key, path, f"a file that holds keys with their values, not a {type(values).__name__}")
    return values


def plain_value(text: str) -> Any:
    """The value that a text stands for in a file. Raises ValueError if it is none."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(getattr(error, "problem", None) or "nested too deeply") from error


def yaml_text(values: Any, **options: Any) -> str:
    """``values`` as YAML, with keys in their order; `read_yaml` reads the same values from it."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options)
    return text


def _count(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """The values of a node with all that its anchors repeat."""
    if id(node) in above:
        raise yaml.constructor.ConstructorError(problem="a value holds itself", problem_mark=node.start_mark)
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count(child, known, (*above, id(node))) for child in children)
        if known[id(node)] > _MOST_VALUES:
            problem = f"its anchors repeat more than {_MOST_VALUES:,} values"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
    return known[id(node)]
