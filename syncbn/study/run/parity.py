"""The parity check of a study: one cell trained under several numbers of processes, in float64, for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from syncbn.study.plan.grid import Cell, Study, parity_cell
from syncbn.study.plan.parity_file import ParityResult, read_parity, write_parity
from syncbn.train.parity import run_parity


def check_parity(study: Study, cells: Sequence[Cell], out: Path, say: Callable[[str], None] = print) -> bool:
    """Run the parity check that a study names, unless ``OUT/parity.json`` has it already.

    The file holds ``key`` (of the cell), ``arm``, ``processes``, ``steps``, ``lines`` (the result) and ``agrees``.

    Returns whether all numbers of processes gave the same losses, weights and buffers; True if the study names no
    check. Raises LaunchError if a training failed.
    """
    if study.parity is None:
        return True
    cell = parity_cell(study.parity, cells)
    assert cell is not None
    asked: dict[str, object] = {
        "key": cell.key,
        "arm": cell.arm,
        "processes": [*study.parity.processes],
        "steps": study.parity.steps,
    }
    known = read_parity(out)
    if known is not None and asked.items() <= known.items():
        return known["agrees"]
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        say(line)

    # What is evaluated does not enter the training, which is compared.
    evaluation = replace(cell.config.evaluation, batch=False, population_samples=[])
    agrees = run_parity(replace(cell.config, evaluation=evaluation), study.parity.processes, study.parity.steps, keep)
    write_parity(cast(ParityResult, {**asked, "lines": lines, "agrees": agrees}), out)
    return agrees
