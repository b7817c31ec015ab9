"""A study's folder says which study it holds: ``OUT/study.yaml`` is the study's file as it was last run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from syncbn.study.plan.grid import Study
from syncbn.study.plan.study_file import load_study
from syncbn.train.config import ConfigError
from syncbn.train.result import write_atomically
from syncbn.train.yaml_file import yaml_text

FILE = "study.yaml"


def save_study(study: Study, out: Path) -> None:
    """Write the study's file into its folder. A function in it is written by its name."""
    content = json.loads(json.dumps(study.content, default=_plain))
    if not content:  # a study that no file and no call of its constructor made
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / FILE, yaml_text(content, allow_unicode=True, width=120))


def study_in(folder: Path, config: str | None, option: str) -> Study:
    """The study that a folder holds; ``config`` names it if the folder does not say so.

    Raises ConfigError if there is no such folder or study; the message names ``option``, which would give ``config``.
    """
    if not folder.is_dir():
        raise ConfigError("folder", folder, "the folder of a study")
    if config is not None:
        return load_study(config)
    if not (folder / FILE).is_file():
        expected = f"one with {FILE}, which `study run` and `study report` write; or name its study with {option}"
        raise ConfigError("folder", folder, expected)
    try:
        return load_study(folder / FILE)
    except ConfigError as error:
        value = folder / FILE if error.key == "config" else error.value
        raise ConfigError(error.key, value, f"{error.expected}; or name the study with {option}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, range):
        return list(value)
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else str(value)
