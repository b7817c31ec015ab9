"""What running cells side by side brings on this machine: measured before a study starts, and kept out of its records.

One cell is trained for some seconds by one worker, and then by all workers at once; the two take turns, so that what
else the machine does meets both.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from syncbn.study.run.pool import interrupts_ignored
from syncbn.study.run.worker import STOP_SECONDS, Trainer, output_to, prepare_worker
from syncbn.train.config import RunConfig

if TYPE_CHECKING:
    from syncbn.study.plan.grid import Cell
    from syncbn.train.result import RunResult

FILE = "speedup.json"
ROUNDS = 3
SECONDS = 4.0
"""About how long each training of a round takes."""
_PROBE_STEPS = 5


class MeasurementError(RuntimeError):
    """A worker could not train the cell."""


def measure_speedup(
    cell: Cell, workers: int, out: Path, *, trainer: Trainer | None = None, seconds: float = SECONDS
) -> dict[str, Any]:
    """Measure the training speed of one worker and of several side by side, and write ``speedup.json`` to ``out``.

    Args:
        cell: what is trained, for as many steps as take about ``seconds``; the same number in every round.
        workers: processes side by side, two or more.
        out: the study's folder; nothing else is written there but a log.
        trainer: what trains, by default the package's own.
        seconds: about how long a training takes.

    Returns:
        What was written: ``workers``, ``cores``, ``cell`` (its label), ``key``, ``steps`` of each training, ``rounds``
        (each with ``alone``, the images a second of one worker, and ``together``, those of each of several at once),
        ``alone`` (median), ``together`` (median of the sum), ``speedup`` (``together / alone``), ``spread`` (smallest
        and largest value of the three, each round giving one).

    Raises:
        MeasurementError: a worker failed.
    """
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for _ in range(workers):
            process, pipe = _start(trainer or Trainer(), out / "logs" / "speedup.log")
            processes.append(process)
            pipes.append(pipe)
        steps = _PROBE_STEPS
        for duration in (seconds / 4, seconds):
            # The first steps also load and allocate what later ones find in place: a second, longer look tells more.
            speeds = _train(pipes, _steps(cell.config, steps))
            steps = max(_PROBE_STEPS, round(duration * median(speeds) / cell.config.step_batch_size))
        config = _steps(cell.config, steps)
        rounds = [(_train(pipes[:1], config)[0], _train(pipes, config)) for _ in range(ROUNDS)]
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join(STOP_SECONDS)
            process.kill()
    found = _summary(rounds) | {"cell": cell.label, "key": cell.key, "steps": steps}
    from syncbn.train.result import write_atomically

    write_atomically(out / FILE, json.dumps(found, indent=1))
    return found


def _summary(rounds: list[tuple[float, list[float]]]) -> dict[str, Any]:
    alone = [speed for speed, _ in rounds]
    together = [sum(speeds) for _, speeds in rounds]
    ratios = [b / a for a, b in zip(alone, together, strict=True)]
    return {
        "workers": len(rounds[0][1]),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": [{"alone": speed, "together": speeds} for speed, speeds in rounds],
        "alone": median(alone),
        "together": median(together),
        "speedup": median(together) / median(alone),
        "spread": {
            "alone": [min(alone), max(alone)],
            "together": [min(together), max(together)],
            "speedup": [min(ratios), max(ratios)],
        },
    }


def _steps(config: RunConfig, steps: int) -> RunConfig:
    """A configuration cut to some steps, without checkpoints and with the one evaluation that every run ends with."""
    budget = replace(config.budget, epochs=None, steps=steps, checkpoint_every=0, eval_every=steps)
    return replace(config, budget=budget, evaluation=replace(config.evaluation, batch=False, population_samples=[]))


def _train(pipes: list[Connection], config: RunConfig) -> list[float]:
    """Images a second of each worker, all at the same time."""
    try:
        for pipe in pipes:
            pipe.send(config)
        answers = [pipe.recv() for pipe in pipes]
    except (EOFError, OSError):
        raise MeasurementError("a worker process died") from None
    failed = next((answer for answer in answers if isinstance(answer, str)), None)
    if failed is not None:
        raise MeasurementError(failed)
    return cast(list[float], answers)


def _start(trainer: Trainer, log: Path) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, trainer, log), name="syncbn speed worker")
    with interrupts_ignored():
        process.start()
    there.close()
    return process, here


def _serve(connection: Connection, trainer: Trainer, log: Path) -> None:
    """Body of a worker: trains each configuration it receives and answers with images a second, or with an error."""
    prepare_worker()
    from syncbn.train.loop import train

    while True:
        try:
            config: RunConfig = connection.recv()
        except EOFError:
            return
        try:
            with output_to(log):
                result = cast("RunResult", (trainer.train or train)(config, None))
            connection.send(result.images_per_second)
        except Exception as error:  # the study is run all the same
            connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
