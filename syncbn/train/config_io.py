"""Reading and writing run configurations: YAML files, dictionaries, command lines. jsonargparse does the work."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from syncbn.train.config import ConfigError, RunConfig


def add_run_arguments(parser: Any) -> None:
    """Add ``--config`` and an option for every field of :class:`RunConfig` to a jsonargparse parser."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True, instantiate_subclass_spec_in_any=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(RunConfig, None)


def make_parser(**options: Any) -> Any:
    """A jsonargparse parser that raises instead of exiting."""
    from jsonargparse import ArgumentParser

    # Abbreviations would take a misspelt key for another, and under torchrun its launcher's options for ours.
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)


def instantiate_run(parser: Any, namespace: Any) -> RunConfig:
    """The run configuration in a parsed namespace, which may hold other options too. Raises ConfigError."""
    made = parser.instantiate(namespace)
    return RunConfig(**{f.name: getattr(made, f.name) for f in fields(RunConfig)})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file; ``overrides`` are command-line words such as ``["--norm.momentum", "0.05"]``.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type, or a value that cannot be.
    """
    return _parse(lambda parser: parser.parse_args(["--config", str(path), *overrides]))


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Build a configuration from nested dictionaries; what is missing has its default. Raises ConfigError."""
    _check_sections(values, RunConfig)
    return _parse(lambda parser: parser.parse_object(values))


def _check_sections(values: Any, kind: type, key: str = "") -> None:
    """jsonargparse takes a section that is no mapping for one of its own objects, and fails in many ways."""
    if not isinstance(values, dict):
        raise ConfigError(key or "config", values, "a mapping")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and is_dataclass(hints[name]):
            _check_sections(value, hints[name], f"{key}.{name}" if key else name)


@lru_cache(maxsize=1)  # making it costs a hundred times what parsing does, and a study parses hundreds of runs
def _run_parser() -> Any:
    parser = make_parser()
    add_run_arguments(parser)
    return parser


def _parse(parse: Any) -> RunConfig:
    from jsonargparse import ArgumentError

    parser = _run_parser()
    try:
        return instantiate_run(parser, parse(parser))
    except ArgumentError as error:
        raise config_error(error) from error


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values, which :func:`config_from_dict` reads back."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, every field of it, as YAML."""
    import yaml

    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def known_keys(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Every key of the configuration, dotted."""
    hints = get_type_hints(kind)
    keys: list[str] = []
    for f in fields(kind):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += known_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


class _Unquoted(str):
    """What stands in a message where there is no value to quote."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def config_error(error: Exception) -> ConfigError:
    """jsonargparse's several lines as a key, a value and what was expected."""
    text = str(error)
    unknown = re.search(r"unrecognized arguments: --?([\w.-]+)(?:[= ](\S+))?", text)
    in_group = re.search(r"(?:Group|Key) '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", text)
    top = re.search(r"(?:does not accept|[Uu]nknown|not expected)\D*?[\"']([\w.]+)[\"']", text)
    if unknown or in_group or (top and "Parser key" not in text):
        key = unknown[1] if unknown else f"{in_group[1]}.{in_group[2]}" if in_group else top[1] if top else ""
        close = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5)
        expected = f"a known key, such as {', '.join(close)}" if close else "a known key (see --help)"
        value = unknown[2] if unknown and unknown[2] else _Unquoted("an unknown key")
        return ConfigError(key, value, expected)
    key_match = re.search(r'[Kk]ey "([\w.]+)"', text)
    value_match = re.search(r"(?:Got value|Given value): (.+)", text)
    if key_match and value_match:
        return ConfigError(key_match[1], value_match[1].strip(), _expected(text))
    if missing := re.search(r"File does not exist: '(.*)'", text):
        return ConfigError(key_match[1] if key_match else "config", missing[1], "a file that exists")
    if option := re.match(r"argument --?([\w.]+): (.*)", text):
        return ConfigError(option[1], _Unquoted("no value"), option[2].removeprefix("expected "))
    key = key_match[1] if key_match else "config"
    return ConfigError(key, _Unquoted("what cannot be read"), f"valid YAML ({' '.join(text.split())})")


def _expected(text: str) -> str:
    """What jsonargparse says it expected, in words."""
    kinds = re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", text)
    names = {"<class 'int'>": "an integer", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
    names |= {"<class 'NoneType'>": "null", "<class 'str'>": "text"}
    words = []
    for kind in kinds:
        literal = re.match(r"(?:typing\.)?Literal\[(.*)\]", kind)
        words.append(f"one of {literal[1]}" if literal else names.get(kind, kind))
    return " or ".join(dict.fromkeys(words)) or "another type"
