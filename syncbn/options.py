"""The options of a command, read so that a mistake is one line as it is in a file: key, value, what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from syncbn.train.config import ConfigError, RunConfig, check_keys, described_type, meant, require

Details = Mapping[str, Any]
"""The arguments of ``add_argument`` for an option."""
_HELP = ("--help", "-h")
_RUN_OPTIONS: dict[str, Details] = {
    "--config": {"type": str, "help": "YAML file with any of the keys below."},
    "--print-config": {"action": "store_true", "help": "Print the whole configuration and exit."},
}


def read_options(
    command: str, description: str, options: Mapping[str, Details], words: Sequence[str], takes_run: bool
) -> dict[str, Any]:
    """The options that are given, by key; with ``takes_run`` also the keys of a run, ``config`` and ``print_config``.

    A name without ``--`` is an argument: what stands alone is its value.

    Raises:
        ConfigError: an option is not known, lacks its value, has one of a wrong type, or is required and not given.
        ImportError: jsonargparse is not installed.
    """
    try:
        from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed; pip install 'syncbn[study]'") from error

    from syncbn.train.yaml_file import plain_value

    set_loader("yaml12", plain_value, exceptions=(ValueError,))  # a value means the same here and in a file
    # Abbreviations would take a misspelt key for another, and torchrun's options for ours.
    how: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": "yaml12"}
    parser = ArgumentParser(prog=f"syncbn {command}", description=description, formatter_class=_formatter(), **how)
    options = {**options, **(_RUN_OPTIONS if takes_run else {})}
    for option, details in options.items():
        parser.add_argument(option, **details)
    if takes_run:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        parser.add_class_arguments(RunConfig, None)
    hints = {option.removeprefix("--"): details.get("type") for option, details in options.items()}
    arguments = [option for option in options if not option.startswith("--")]
    hints |= _hints(RunConfig) if takes_run else {}
    given: dict[str, str | None] = {}
    if not set(words) & set(_HELP):
        given = _split(command, words, hints, arguments)
        words = [
            f"--{key}" if value is None else f"--{key}={value}" for key, value in given.items() if key not in arguments
        ]
        words += [str(given[key]) for key in arguments if key in given]
        for option, details in options.items():
            needed = f"{described_type(details.get('type'))}, which syncbn {command} needs"
            key = option.removeprefix("--")
            require(not (details.get("required") or option in arguments) or key in given, key, None, needed)
        for key, text in given.items():
            section = hints.get(key)
            if isinstance(section, type) and is_dataclass(section):
                _check_section(key, text, section, plain_value)
    try:
        # Without defaults, a key that is not given leaves the file's value as it is.
        return vars(parser.parse_args(list(words), defaults=False).as_flat())
    except (ArgumentError, OverflowError) as error:  # an integer may be too large for a float
        named = re.match(r'Parser key "([^"]+)"', str(error))
        wrong = next((key for key in given if named and _covers(named[1], key.replace("-", "_"))), None)
        if wrong is None:
            raise ConfigError(command, " ".join(words), f"options that can be read ({error})") from error
        raise ConfigError(wrong, given[wrong], described_type(_hint(wrong, hints))) from error


def run_options() -> dict[str, Details]:
    """The options of a command that takes a run: ``--config``, ``--print-config`` and every key."""
    keys = {f"--{key}": hint for key, hint in _hints(RunConfig).items() if not is_dataclass(hint)}
    return {**_RUN_OPTIONS, **{option: {"type": hint, "help": described_type(hint)} for option, hint in keys.items()}}


def _formatter() -> Any:
    """jsonargparse's formatter of ``--help``, without defaults that are None and with a word for a path."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            shown: str = super()._get_help_string(action)
            if action.default is None:
                shown = re.sub(r"(, )?default: %\(default\)s", "", shown)
            if getattr(action, "_typehint", None) is Path:
                shown = shown.replace("type: %(type)s", "type: path")
            return shown.replace(" ()", "")

    return Formatter


def _check_section(key: str, text: str | None, kind: type, parse: Callable[[str], Any]) -> None:
    """Check the keys of a section that is given as a whole: the parser would name no key."""
    try:
        values = parse(text or "")
    except ValueError:  # the parser says so
        return
    if isinstance(values, dict):
        check_keys(values, kind, f"{key}.")


def _covers(named: str, key: str) -> bool:
    """Whether an error of the parser at ``named`` is about the option ``key``."""
    return named == key or named.startswith(f"{key}.") or key.startswith(f"{named}.")


def _hints(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type of each key of a configuration, sections included."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[prefix + name] = hint
        if is_dataclass(hint):
            found |= _hints(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def _split(
    command: str, words: Sequence[str], hints: Mapping[str, Any], arguments: Sequence[str]
) -> dict[str, str | None]:
    """The text of each option and argument that is given, by key; None for an option that takes no value."""
    given: dict[str, str | None] = {}
    left, free = list(words), list(arguments)
    while left:
        word = left.pop(0)
        if free and not word.startswith("--"):
            given[free.pop(0)] = word
            continue
        key, joined, value = word.removeprefix("--").partition("=")
        follows = left[0] if left and not left[0].startswith("--") else None
        if not word.startswith("--"):
            more = "nothing more but options" if arguments else "options alone"
            raise ConfigError(command, word, f"{more}, which begin with -- (see syncbn {command} --help)")
        if not _known(key, hints):
            close = meant(f"--{key}", [f"--{name}" for name in hints])
            raise ConfigError(key, value if joined else follows, f"an option of syncbn {command}{close}")
        hint = _hint(key, hints)
        if hint is None:
            require(not joined, key, value, "no value: the option is given or not")
            given[key] = None
        elif joined:
            given[key] = value
        else:
            require(follows is not None, key, None, described_type(hint))
            given[key] = left.pop(0)
    return given


def _known(key: str, hints: Mapping[str, Any]) -> bool:
    return key in hints or _owner(key, hints) is not None


def _owner(key: str, hints: Mapping[str, Any]) -> str | None:
    """The mapping of which ``key`` is an item, as ``model.options`` is of ``model.options.dropout``."""
    parents = (key[: match.start()] for match in re.finditer(r"\.", key))
    return next((name for name in parents if name in hints and get_origin(hints[name]) is dict), None)


def _hint(key: str, hints: Mapping[str, Any]) -> Any:
    """The type of an option's value; None if it takes none."""
    return hints.get(key, object)
