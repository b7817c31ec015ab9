"""Files that a run or a study wrote and reads again: what they hold, or one line that names the file.

A file that a kill, a full disk or a hand has left incomplete is an :class:`IncompleteFile`. Where its writer can write
it again, that counts as no file. Anything else that is wrong is a ConfigError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from syncbn.train.config import ConfigError


class IncompleteFile(ConfigError):
    """A file that is missing, or that is not what its format says."""


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds; ``what`` names its kind in errors, such as "result".

    Raises:
        IncompleteFile: there is no file, or it is not JSON.
        ConfigError: the file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        kind = IncompleteFile if isinstance(error, FileNotFoundError) else ConfigError
        raise kind(what, path, f"a file that can be read ({error.strerror})") from None
    except RecursionError:
        raise IncompleteFile(what, path, "a file in JSON (it is nested too deeply)") from None
    except ValueError as error:  # not UTF-8, not JSON, or a path with a NUL
        raise IncompleteFile(what, path, f"a file in JSON ({_where(error)})") from None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of metrics: the lines that are mappings with an integer ``step``.

    A killed run may leave half a line. A file that is not there has no records.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    found = list[dict[str, Any]]()
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.append(record)
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, which names the file."""
    from safetensors.torch import save_file

    with _writing(path):
        save_file(dict(tensors), path)


def save_model_tensors(model: nn.Module, path: Path) -> None:
    """The same for parameters and buffers; those that share memory are written once."""
    from safetensors.torch import save_model

    with _writing(path):
        save_model(model, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ConfigError if it cannot be read."""
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def load_model_tensors(model: nn.Module, path: Path) -> None:
    """Load what :func:`save_model_tensors` wrote.

    Raises ConfigError if the file cannot be read, and RuntimeError if its tensors are not those of ``model``.
    """
    from safetensors.torch import load_model

    with _reading(path):
        load_model(model, str(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        kind = IncompleteFile if isinstance(error, FileNotFoundError) else ConfigError
        raise kind("weights", path, f"a file that can be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise IncompleteFile("weights", path, f"a file in safetensors' format ({error})") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # Rust's error has the number in its text alone.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), _reason(str(error)), str(path)) from error


def _reason(text: str) -> str:
    """ "No space left on device" out of "Error while serializing: I/O error: No space left on device (os error 28)"."""
    return text.rpartition(": ")[2].partition(" (os error")[0]


def _where(error: ValueError) -> str:
    """What is wrong with a file, without its content."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return f"{error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
