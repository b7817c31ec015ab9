"""What the repeat of one cell under real processes shows about the emulation of logical GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from syncbn.study.plan.grid import Cell, Study, repeated_cell
from syncbn.study.report.format import percent, place_words
from syncbn.study.run.agreement import Agreement, agreement

if TYPE_CHECKING:
    from syncbn.study.run.runner import Outcome
    from syncbn.train.result import RunResult


def study_repeat_words(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> str:
    """The repeat of a study in words; empty where it names none."""
    from syncbn.study.run.runner import repeat_id

    repeat, cell = study.repeat_distributed, repeated_cell(study, list(cells))
    if repeat is None or cell is None:
        return ""
    label = next(arm.label for arm in study.arms if arm.name == cell.arm)
    place = place_words(cell.point)
    emulated, repeated = outcomes.get(cell.key), outcomes.get(repeat_id(repeat, cells))
    return repeat_words(
        emulated.result if emulated else None,
        repeated.result if repeated else None,
        f"{label}{f' at {place}' if place else ''}, seed {cell.seed},",
        repeat.processes,
        repeated.message if repeated else "",
    )


def repeat_words(
    emulated: RunResult | None, repeated: RunResult | None, label: str, processes: int, message: str = ""
) -> str:
    """One repeat in words.

    Args:
        emulated: the cell's result as the study has it, if there is one.
        repeated: its result under another number of processes, if there is one.
        label: the arm and the seed, in words.
        processes: real processes that the repeat was to have, for the words where there is no result.
        message: why the repeat failed, if it did.
    """
    if emulated is None or repeated is None:
        why = f": {message}" if message else ""
        return f"{label} was to be repeated under {processes} real processes; there is nothing to compare{why}."
    first, again = emulated.processes, repeated.processes
    words = f"{label} was run {_under(first)} and again {_under(again)}. "
    if first == again:
        words += "As both had the same number, that shows no more than that a run can be repeated. "
    if emulated.losses and repeated.losses:
        words += f"{_loss_words(agreement(emulated.losses, repeated.losses))} "
    ends = [
        percent(result.test_error) if result.test_error is not None and result.status == "ok" else "divergence"
        for result in (emulated, repeated)
    ]
    if "divergence" in ends:
        words += "Both diverged." if ends[0] == ends[1] else f"They end at {ends[0]} and {ends[1]}."
    else:
        words += f"They end at {ends[0]} and {ends[1]} test error."
    precision = emulated.config.get("precision")
    if precision in ("fp32", "bf16", "fp16"):
        words += (
            f" Both do the same sums in another order, so in {precision} rounding differences appear, and training"
            " amplifies them; the command syncbn parity makes the exact comparison, in fp64."
        )
    return words


def _under(processes: int) -> str:
    return "in one process" if processes == 1 else f"under {processes} real processes"


def _loss_words(found: Agreement) -> str:
    if found.largest == 0:
        return "The training losses are the same at every step."
    steps = min(found.steps)
    if math.isinf(found.largest):
        lost = f"At step {found.largest_step} of {steps} the training loss of one of the two is no longer finite"
        if found.largest_step == 1:
            return f"{lost}."
        return f"{lost}; before, {_within(found.steps_within, steps, found.tolerance)}."
    within = _within(found.steps_within, steps, found.tolerance)
    return (
        f"The training losses differ by {_small(found.first)} at the first step and by at most {_small(found.largest)},"
        f" at step {found.largest_step} of {steps} (by {_small(found.mean)} on average; {within})."
    )


def _within(steps: int, of: int, tolerance: float) -> str:
    if steps == of:
        return f"never above {tolerance:g}"
    return f"they agree within {tolerance:g} up to step {steps}" if steps else f"above {tolerance:g} from the start"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.2f}"
