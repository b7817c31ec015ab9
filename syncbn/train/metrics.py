"""What a run writes while it goes on: one JSONL file, trackers, a progress bar. All of it on rank 0 only."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from syncbn.train.result import jsonable, write_atomically


class MetricsLog:
    """Appends one JSON object a line; does nothing without a path."""

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self._path = path
        if path is None:
            return
        kept = []
        if resume_step and path.exists():
            # Steps after the checkpoint are taken again; a last line may have been cut off.
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if record["step"] <= resume_step:
                    kept.append(line)
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def write(self, records: list[dict[str, Any]]) -> None:
        if self._path is not None and records:
            with self._path.open("a") as file:
                file.writelines(json.dumps(jsonable(record), allow_nan=False) + "\n" for record in records)


class ProgressBar:
    """A rich progress bar over the optimizer steps; as a context manager, and silent unless ``shown``."""

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


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys and values a tracker can store."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def reset_peak_memory(device: torch.device) -> None:
    """Begin anew to watch :func:`peak_memory`. On Linux the kernel's mark of the resident memory is set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes since :func:`reset_peak_memory`: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
