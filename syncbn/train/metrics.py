"""Records of a run while it trains: a JSONL file, a progress bar, memory use. Rank 0 writes them."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from syncbn.train.result import jsonable, write_atomically


class MetricsLog:
    """Appends one JSON object per line to ``path``; None writes nothing.

    A resumed run keeps the records up to ``resume_step``, as the later steps are repeated.
    """

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self._path = path
        if path is None:
            return
        kept = []
        if resume_step and path.exists():
            for line in path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a killed run may leave half a line
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(f"{line}\n")
        write_atomically(path, "".join(kept))

    def write(self, records: list[dict[str, Any]]) -> None:
        if self._path is not None and records:
            with self._path.open("a") as file:
                file.writelines(json.dumps(jsonable(record), allow_nan=False) + "\n" for record in records)


class ProgressBar:
    """A progress bar over the optimizer steps, as a context manager; does nothing unless ``shown``."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("training", total=total)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of :func:`peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes since :func:`reset_peak_memory`: allocated on a GPU, else resident in this process (Linux only)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
