"""The parity check of a study: one cell trained under several numbers of processes, in float64, for a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from syncbn.study.plan.grid import Cell, Study, parity_cell
from syncbn.train.parity import run_parity
from syncbn.train.result import write_atomically

FILE = "parity.json"


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
    asked = {"key": cell.key, "arm": cell.arm, "processes": [*study.parity.processes], "steps": study.parity.steps}
    path = out / FILE
    if path.exists():
        known = json.loads(path.read_text())
        if all(known.get(name) == value for name, value in asked.items()):
            return bool(known["agrees"])
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        say(line)

    # What is evaluated does not enter the training, which is compared.
    evaluation = replace(cell.config.evaluation, batch=False, population_samples=[])
    agrees = run_parity(replace(cell.config, evaluation=evaluation), study.parity.processes, study.parity.steps, keep)
    write_atomically(path, json.dumps({**asked, "lines": lines, "agrees": agrees}, indent=1) + "\n")
    return agrees
