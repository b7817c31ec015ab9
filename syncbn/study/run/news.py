"""How far a run is, read from the file of metrics that it writes while it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from syncbn.study.run.jobs import Job

MOST_BYTES = 2**16
"""What one look reads at most: a run that is resumed may have written much before."""


class News:
    """Where a run stands and its last metric, in words; both are empty before the run has written anything.

    The run does nothing for this and never waits: a look reads what was added to ``metrics.jsonl`` since the last one.
    """

    def __init__(self, job: Job) -> None:
        self.place = self.metric = ""
        self._path = job.directory / "metrics.jsonl"
        self._budget = job.cell.config.budget
        self._seen = 0

    def look(self) -> None:
        """Read on. Nothing that the file holds, and no lack of it, is an error."""
        for line in self._lines():
            # The writer may be killed in the middle of a line, and a user's own loop may write anything.
            with suppress(Exception):
                self._note(json.loads(line))

    def _lines(self) -> Iterator[bytes]:
        """The lines that are whole now and were not before: the writer may be in the middle of the last one."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = max(self._seen if self._seen <= size else 0, size - MOST_BYTES)  # it may have begun anew
                file.seek(start)
                added = file.read(MOST_BYTES)
        except OSError:  # nothing is written yet, or the disk does not answer
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._seen = start + len(whole)
        yield from whole.splitlines()

    def _note(self, record: dict[str, Any]) -> None:
        step, kind, budget = int(record["step"]), record.get("kind"), self._budget
        if kind is None:  # a training loop of the user's, which has no budget that this package knows
            values = {name: value for name, value in record.items() if name != "step" and value is not None}
            chosen = next((name for name in values if name.startswith("validation_")), next(iter(values), None))
            self.metric = self.metric if chosen is None else f"{chosen} {float(values[chosen]):.4g}"
            self.place = f"step {step}"
            return
        if budget.epochs is None:
            self.place = f"step {step} of {budget.steps}"
        else:  # a step is counted within its epoch, an evaluation follows it
            self.place = f"epoch {int(record['epoch']) + (kind == 'step')} of {budget.epochs}"
        values = record.get("validation") or {}
        if values:
            name = next((name for name in values if name != "loss"), "loss")
            self.metric = f"validation {name} {float(values[name]):.4g}"
        elif not self.metric.startswith("validation"):
            self.metric = f"training loss {float(record['train_loss']):.4g}"
