"""The result of a study's parity check: ``OUT/parity.json``, as the check writes it and the report shows it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

from syncbn.train.config import fits
from syncbn.train.result import write_atomically
from syncbn.train.stored import IncompleteFile, read_json

FILE = "parity.json"


class ParityResult(TypedDict):
    """What the file holds."""

    key: str
    """Of the cell that was checked."""
    arm: str
    processes: list[int]
    steps: int
    lines: list[str]
    """The result in words."""
    agrees: bool


def read_parity(out: Path) -> ParityResult | None:
    """The check's result; None if there is none, or a damaged one: the check is then made again.

    Raises ConfigError if the file cannot be read.
    """
    values: Any = None
    with suppress(IncompleteFile):
        values = read_json(out / FILE, "parity")
    hints = get_type_hints(ParityResult)
    whole = isinstance(values, dict) and all(fits(values.get(name), hint) for name, hint in hints.items())
    return cast(ParityResult, values) if whole else None


def write_parity(result: ParityResult, out: Path) -> None:
    """Write the check's result, atomically."""
    write_atomically(out / FILE, json.dumps(result, indent=1) + "\n")
