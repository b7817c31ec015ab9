"""The user's code of a study: that it can be found, and whether it has changed since the runs that are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from syncbn.study.plan.grid import Cell, Study
from syncbn.study.run.records import Record
from syncbn.train.tasks.named import find, load_task
from syncbn.train.tasks.source import KEY, digest_of, source_of


def user_code(study: Study, cells: Sequence[Cell]) -> list[Any]:
    """The tasks of the cells, or the training loop of the user's.

    Raises:
        ConfigError: there is no such task or function, or a task does not take its options.
        TaskError: importing or making it raised an error.
    """
    if study.run is not None:
        return [find(study.run, "run") if isinstance(study.run, str) else study.run]
    tasks = {(c.config.task.name, repr(c.config.task.options)): c.config for c in cells}
    return [load_task(config, torch.device("cpu")) for config in tasks.values()]


def changed_note(code: Iterable[Any], cells: Sequence[Cell], records: Mapping[str, Record]) -> str | None:
    """A note on recorded runs of another version of the user's files; None if there are none."""
    digests = {digest_of(each).get(KEY) for each in code}
    known = [records[cell.key].result.environment.get(KEY) for cell in cells if cell.key in records]
    changed = sum(digest is not None and digest not in digests for digest in known)
    if not changed or None in digests:
        return None
    files = ", ".join(sorted({path.name for each in code if (path := source_of(each)) is not None}))
    return f"{files} has changed since {changed} of the runs, which are kept; to do them again, use another --out"
