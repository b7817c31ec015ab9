"""Pauses between optimizer steps: losses are fetched, and the processes agree on a checkpoint and on stopping.

In a pause the processes also see that they still hold the same weights. A pause is two collectives and two waits for
the device. When a run pauses changes nothing of what it computes or records.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from syncbn.agreement import verify_ranks
from syncbn.collectives import gathered
from syncbn.train.config import ConfigError
from syncbn.train.metrics import step_records

if TYPE_CHECKING:
    from syncbn.train.state import Run

FLUSH_STEPS = 20
"""Steps for which losses stay on their device and process, at most. Every so many of an epoch they are judged."""
PAUSE_SECONDS = 5.0
"""Seconds between pauses if steps are slow: a signal is answered, and losses can be read, after as many."""


@dataclass
class Pace:
    """When a run pauses. Times are those of this process's clock."""

    steps: int = 1
    """Steps from one pause to the next, the same on all processes."""
    wanted: int = 1
    """What the last pause has shown ``steps`` should be. That of the first process becomes the next ``steps``."""
    paused: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Begin to count anew, after what is no training. The next step is followed by a pause."""
        self.steps, self.paused = 1, time.perf_counter()

    def note(self, steps: int) -> float:
        """Note a pause after these steps; returns the seconds that they took."""
        now = time.perf_counter()
        seconds, self.paused = now - self.paused, now
        self.wanted = max(1, min(FLUSH_STEPS, int(PAUSE_SECONDS * steps / max(seconds, 1e-9))))
        return seconds


class Due(NamedTuple):
    """What the processes have agreed on."""

    checkpoint: bool
    stop: bool


def pauses_now(run: Run) -> bool:
    """Whether a pause is due after this step: the same on all processes."""
    budget = run.config.budget
    alone = run.partition.placement.processes == 1
    saves = budget.checkpoint_every_steps > 0 and run.progress.step % budget.checkpoint_every_steps == 0
    return saves or len(run.pending) >= run.pace.steps or (alone and run.noted.received is not None)


def pause(run: Run) -> Due:
    """Fetch and record the pending losses; returns what is due now."""
    budget, pace, done = run.config.budget, run.pace, run.progress
    try:
        verify_ranks(run.model)
    except RuntimeError as error:
        expected = f"a task whose parameters change by the optimizer alone; at step {done.step} {error}"
        raise ConfigError("task.name", run.task_name, expected) from error
    minutes = budget.checkpoint_every_minutes
    late = minutes > 0 and time.perf_counter() - pace.saved >= 60 * minutes
    first = run.partition.placement.rank == 0
    own = [[float(run.noted.received is not None), float(first and late)], [float(pace.wanted if first else 0), 0.0]]
    pairs = torch.cat((torch.stack(run.pending), torch.tensor(own, dtype=torch.float64, device=run.device)))
    everywhere = pairs.unsqueeze(0)
    if run.partition.placement.processes > 1:
        # Not a reduction: on three processes or more, how it rounds depends on how many losses travel together.
        everywhere = gathered(pairs)
    *sums, (signals, late_first), (steps, _) = [
        [sum(column) for column in zip(*each, strict=True)] for each in zip(*everywhere.tolist(), strict=True)
    ]
    run.pending.clear()
    # A step in which nothing is counted, as where all pixels are ignored, has a loss of 0 and moves no weight.
    done.losses += [total / count if count else 0.0 * total for total, count in sums]
    done.seconds += pace.note(len(sums))
    pace.steps = int(steps)
    run.metrics.write(
        step_records(done.losses, run.schedule.steps_per_epoch, run.lr, start=len(done.losses) - len(sums))
    )
    if run.bar is not None:
        description = f"epoch {done.epoch + 1}/{run.schedule.epochs}  loss {done.losses[-1]:.3f}"
        run.bar.update(run.bar.task_ids[0], completed=done.step, description=description)
    every = budget.checkpoint_every_steps
    return Due(checkpoint=late_first > 0 or (every > 0 and done.step % every == 0), stop=signals > 0)
