"""Whether a user's code has changed since a run: a digest of the file that it is in."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

KEY = "task_source"
"""Of the digest in a result's environment."""


def source_of(code: Any) -> Path | None:
    """The file of a task, a class or a function; None if it is in none, as in a notebook."""
    target = code if inspect.isclass(code) or inspect.isroutine(code) else type(code)
    try:
        path = inspect.getsourcefile(target)
    except TypeError:
        return None
    return Path(path) if path is not None and Path(path).is_file() else None


def digest_of(code: Any) -> dict[str, str]:
    """``{KEY: digest}`` for a result's environment, empty without a file."""
    path = source_of(code)
    return {} if path is None else {KEY: hashlib.sha256(path.read_bytes()).hexdigest()[:12]}
