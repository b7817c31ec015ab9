"""Records of a run while it trains, which rank 0 writes: a JSONL file, a progress bar, memory use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from syncbn.train.result import jsonable, naming, write_atomically


class MetricsLog:
    """Appends one JSON object per line to ``path``, if any, which begins with ``past`` records.

    A resumed run writes those of its checkpoint, because a killed one may have left half a line, or records of later
    steps.
    """

    def __init__(self, path: Path | None, past: list[dict[str, Any]]) -> None:
        self._path = path
        if path is not None:
            write_atomically(path, _lines(past))

    def write(self, records: list[dict[str, Any]]) -> None:
        if self._path is not None:
            with naming(self._path), self._path.open("a") as file:
                file.write(_lines(records))


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(jsonable(record), allow_nan=False) + "\n" for record in records)


def step_records(
    losses: list[float], steps_per_epoch: int, lr: Callable[[int], float], start: int = 0
) -> list[dict[str, Any]]:
    """The records of all steps after the first ``start``; ``lr`` tells the learning rate of a step, from 0."""
    return [
        {"kind": "step", "step": step + 1, "epoch": step // steps_per_epoch, "train_loss": losses[step], "lr": lr(step)}
        for step in range(start, len(losses))
    ]


def evaluation_record(entry: dict[str, Any]) -> dict[str, Any]:
    """The record of an entry of a run's history."""
    return {"kind": "eval", **entry}


def past_records(
    losses: list[float], history: list[dict[str, Any]], steps_per_epoch: int, lr: Callable[[int], float]
) -> list[dict[str, Any]]:
    """All records of a run so far: an evaluation follows its step."""
    steps = step_records(losses, steps_per_epoch, lr)
    return sorted([*steps, *map(evaluation_record, history)], key=lambda record: record["step"])


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
