"""Records of a run while it trains, which rank 0 writes: a JSONL file, a progress bar, memory use."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from syncbn.train.result import jsonable, write_atomically


class MetricsLog:
    """Appends one JSON object per line to ``path``, if any. A resumed run keeps the records up to ``resume_step``."""

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self._path = path
        kept = ""
        if path is not None and resume_step and path.exists():
            for line in path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a killed run may leave half a line
                    kept += f"{line}\n" if json.loads(line)["step"] <= resume_step else ""
        if path is not None:
            write_atomically(path, kept)

    def write(self, records: list[dict[str, Any]]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.writelines(json.dumps(jsonable(record), allow_nan=False) + "\n" for record in records)


def progress_bar(total: int) -> Any:
    """rich's progress bar over the optimizer steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar.add_task("training", total=total)
    return bar


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
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    return None
