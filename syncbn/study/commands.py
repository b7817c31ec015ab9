"""The ``study`` commands: run what is missing and write the report, or only the report."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from syncbn.study.plan.grid import Cell, Study, study_cells, unique_cells
from syncbn.study.plan.study_file import load_study
from syncbn.study.report.report import print_table, write_report
from syncbn.study.run.ranks import Ranks, launched
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import Executor, Outcome, left_over, run_cells
from syncbn.study.run.speedup import MeasurementError, measure_speedup
from syncbn.study.run.status import study_outcomes
from syncbn.train.config import ConfigError


def run_study(
    config: str,
    out: Path,
    workers: int | None = None,
    *,
    executor: Executor = "pool",
    slurm_options: Mapping[str, Any] | None = None,
    speedup: bool = False,
) -> int:
    """Run a study's missing cells in ``out`` and write its report there; run again, it goes on where it was.

    Under a launcher such as torchrun its processes run the cells together, one after another, and the first of them
    does all the rest.

    Args:
        config: a study's YAML file, or the name of one that comes with the package.
        out: folder of the study.
        workers: runs side by side; None is one for each core, or on a Slurm cluster all at once.
        executor: who does the runs; see :data:`syncbn.study.run.runner.Executor`.
        slurm_options: parameters of a cluster's jobs, for submitit.
        speedup: first measure what running cells side by side brings (see :mod:`syncbn.study.run.speedup`).

    Returns:
        0, or 1 if a cell failed (its message is printed, and the report says what is missing).

    Raises:
        ConfigError: a mistake in the study, or in the arguments.
        ImportError: submitit, which a cluster needs, is not installed.
        LaunchError: the cluster did not take the jobs.
    """
    _check(workers, executor, slurm_options, speedup)
    study = load_study(config)
    cells = study_cells(study)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if launched():
        with Ranks() as ranks:
            if ranks.rank:
                ranks.follow()
                return 0
            outcomes = run_cells(study, cells, out, ranks=ranks)
    else:
        if speedup:
            _measure(study, cells, out, workers)
        outcomes = run_cells(study, cells, out, workers=workers, executor=executor, options=slurm_options)
    return _report_run(study, cells, outcomes, config, out, time.monotonic() - started)


def report_study(config: str, out: Path) -> int:
    """Write the report of a study from what is there, without running anything.

    Args:
        config: a study's YAML file, or the name of one that comes with the package.
        out: folder of the study.

    Returns:
        0.

    Raises:
        ConfigError: a mistake in the study, or a folder without any finished run of it.
    """
    study = load_study(config)
    cells = study_cells(study)
    outcomes = study_outcomes(study, cells, out)
    if not any(outcome.result is not None for outcome in outcomes.values()):
        raise ConfigError("out", str(out), f"a folder with at least one finished run of the study {study.name}")
    report = _write(study, cells, outcomes, config, out)
    print(f"report: {report}")
    return 0


def _check(workers: int | None, executor: str, options: Mapping[str, Any] | None, speedup: bool) -> None:
    if workers is not None and workers < 1:
        raise ConfigError("workers", workers, "a positive integer")
    if executor not in get_args(Executor):
        raise ConfigError("executor", executor, f"one of {', '.join(get_args(Executor))}")
    if options and executor == "pool":
        raise ConfigError("slurm-options", dict(options), "none with --executor pool")
    if speedup and executor != "pool":
        raise ConfigError("measure-speedup", speedup, "false unless --executor is pool")
    if not launched():
        return
    size = os.environ["WORLD_SIZE"]
    together = f"as the {size} processes of the launcher run each cell together"
    if workers is not None and workers > 1:
        raise ConfigError("workers", workers, f"1, {together}")
    if executor != "pool":
        raise ConfigError("executor", executor, f"none, {together}")
    if speedup:
        raise ConfigError("measure-speedup", speedup, f"false, {together}")


def _measure(study: Study, cells: Sequence[Cell], out: Path, workers: int | None) -> None:
    """Measure the speed-up with the study's first missing cell, and say what was found."""
    records = read_records(out)
    missing = [cell for cell in unique_cells(list(cells)) if cell.key not in records]
    side_by_side = min(workers or len(os.sched_getaffinity(0)), len(missing))
    if side_by_side < 2:
        what = "one worker does the runs" if missing else "no cell is missing"
        print(f"speed-up: nothing to measure, as {what}")
        return
    print(f"speed-up: measuring with {missing[0].label}", flush=True)
    try:
        found = measure_speedup(missing[0], side_by_side, out)
    except MeasurementError as error:
        print(f"speed-up: not measured: {error}", file=sys.stderr)
        return
    low, high = found["spread"]["speedup"]
    print(
        f"speed-up: {found['together']:.0f} images/s with {side_by_side} workers, {found['alone']:.0f} with one: "
        f"{found['speedup']:.2f} times ({low:.2f} to {high:.2f} in the rounds)",
        flush=True,
    )


def _write(study: Study, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], config: str, out: Path) -> Path:
    """Write the report and print its tables; the path of its page."""
    results = {key: outcome.result for key, outcome in outcomes.items() if outcome.result is not None}
    failures = {key: outcome.message for key, outcome in outcomes.items() if outcome.status == "failed"}
    report = write_report(study, cells, results, out, command=_command(config, out), failures=failures)
    print_table(study, cells, results)
    return report


def _report_run(
    study: Study, cells: list[Cell], outcomes: Mapping[str, Outcome], config: str, out: Path, seconds: float
) -> int:
    report = _write(study, cells, outcomes, config, out)
    failed = [outcome for outcome in outcomes.values() if outcome.status == "failed"]
    for outcome in failed:
        print(f"failed: {outcome.job.label}: {outcome.message} (log: {outcome.job.log})", file=sys.stderr)
    ran = sum(outcome.status == "ran" for outcome in outcomes.values())
    kept = len(outcomes) - ran - len(failed)
    print(f"{ran} runs in {seconds:.0f} s, {kept} kept from before, {len(failed)} failed")
    if note := left_over(study, cells, read_records(out)):
        print(note)
    print(f"report: {report}")
    return 1 if failed else 0


def _command(config: str, out: Path) -> str:
    return shlex.join(["syncbn", "study", "run", "--config", _shown(config), "--out", _shown(out)])


def _shown(path: str | Path) -> str:
    """A path for a page that others read: where an absolute one lies on this machine is nothing to them."""
    return Path(path).name if Path(path).is_absolute() else str(path)
