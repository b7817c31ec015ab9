"""The script with which bash or zsh completes the command line. It holds all names: no key press starts Python."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def completion_script(shell: str, commands: Mapping[str, tuple[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """The script for a shell.

    Args:
        shell: ``"bash"`` or ``"zsh"``.
        commands: by the words of each command, its help and, by option, arguments of ``add_argument``.

    Raises:
        ImportError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("shtab is not installed; pip install 'syncbn[completion]'") from error

    root = argparse.ArgumentParser("syncbn")
    root.add_argument("--version", action="store_true", help="Print the version.")
    tops = root.add_subparsers()
    groups: dict[str, Any] = {}
    for name, (text, options) in commands.items():
        *group, word = name.split()
        for first in group:
            if first not in groups:
                groups[first] = tops.add_parser(first, help=f"Commands of a {first}.").add_subparsers()
        parser = (groups[group[0]] if group else tops).add_parser(word, help=text)
        for option, details in options.items():
            _add(parser, option, details, shtab.FILE)
    script: str = shtab.complete(root, shell)
    return script


def _add(parser: argparse.ArgumentParser, option: str, details: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    kind, text = details.get("type"), details["help"]
    if "action" in details:
        parser.add_argument(option, action=details["action"], help=text)
        return
    kinds = (kind, *get_args(kind))  # the second may be that of `Literal["a", "b"] | None`
    values = [str(value) for each in kinds if get_origin(each) is Literal for value in get_args(each)]
    if kind is bool:
        values = ["true", "false"]
    action = parser.add_argument(option, choices=values or None, help=text)
    if Path in kinds or option.startswith("--config"):
        action.complete = file  # type: ignore[attr-defined]
