"""The ``study`` commands: plan, run, status, report, export and compare.

Each takes a study's YAML file, or the name of one that comes with the package, and the study's folder; it returns the
exit code, and raises ConfigError for a mistake in the study or in the arguments.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args

from syncbn.study.analysis.summary import Summary, summary_of
from syncbn.study.plan.alike import alike, named
from syncbn.study.plan.beyond import beyond_lines
from syncbn.study.plan.folder import FILE, save_study, study_in
from syncbn.study.plan.grid import Cell, State, Study, spelled, unique_cells
from syncbn.study.plan.study_file import load_study
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import print_table
from syncbn.study.report.tuning import rung_lines
from syncbn.study.report.two_studies import FORMATS as COMPARISONS
from syncbn.study.report.two_studies import print_comparison
from syncbn.study.run import ranks
from syncbn.study.run.own_loop import train_function
from syncbn.study.run.parity import check_parity
from syncbn.study.run.progress import duration
from syncbn.study.run.records import Record, read_records
from syncbn.study.run.runner import Executor, run_cells
from syncbn.study.run.signals import StudyStopped, stopping
from syncbn.study.run.status import Outcome, left_over, seconds_left, study_outcomes
from syncbn.study.stages import left_words, recorded_stages, run_stages, stages
from syncbn.study.user_code import changed_note, user_code
from syncbn.train.config import ConfigError, require
from syncbn.train.launch import placement
from syncbn.train.launch_error import LaunchError
from syncbn.train.result import RunResult
from syncbn.train.stopping import STOPPED, leave_mark


def plan_study(config: str, out: Path | None = None, workers: int | None = None) -> int:
    """Print a study's grid, how much of it is done in ``out``, and an estimate of how long the rest takes."""
    if workers is not None and workers < 1:
        raise ConfigError("workers", workers, "a positive integer")
    study = load_study(config)
    records = read_records(out) if out is not None else {}
    trials, cells = recorded_stages(study, out)
    runs = unique_cells([*trials, *cells])
    note_changes(study, runs, records)
    _warn_of_steps(runs, records, set())
    missing = sum(cell.key not in records for cell in runs)
    print(f"{study.title}\n")
    _print_grid(study, cells)
    if trials:
        decides = "; what the arms choose decides which of the others are the same runs"
        print(f"\ntuning: {len(trials)} cells, {len(unique_cells(trials))} different runs{decides}")
        for line in rung_lines(study):
            print(line)
    print(f"\n{len(cells)} cells, {len(runs)} different runs: {len(runs) - missing} done, {missing} to do")
    if study.parity is not None:
        counts = ", ".join(map(str, study.parity.processes))
        print(f"parity check: {study.parity.arm}, {study.parity.steps} steps under {counts} processes")
    if note := left_over(runs, records):
        print(note)
    if missing:
        print(_time_left(runs, records, min(workers or len(os.sched_getaffinity(0)), missing)))
    return 0


def run_study(
    config: str,
    out: Path,
    workers: int | None = None,
    *,
    executor: Executor = "pool",
    slurm_options: Mapping[str, Any] | None = None,
) -> int:
    """Run the missing cells of a study and its parity check, and write its report; run again, it goes on.

    Under a launcher such as torchrun, all its processes train each cell together, one cell after another. The exit code
    is 1 if a cell failed or the parity check did not hold, and 85 if SIGTERM or SIGUSR1 stopped the study.

    Raises:
        ConfigError: a mistake in the study or in the arguments.
        ImportError: submitit, which a cluster needs, is not installed.
        LaunchError: the cluster did not take the jobs.
    """
    _check(workers, executor, slurm_options)
    study = load_study(config)
    if study.run is not None and ranks.launched():
        raise ConfigError("run", study.run, "a study that no launcher starts; `processes` launches each of its runs")
    records = read_records(out)
    trials, cells = recorded_stages(study, out)
    note_changes(study, [*trials, *cells], records)
    warned: set[str] = set()
    _warn_of_steps([*trials, *cells], records, warned)

    def run_and_warn(cells: Sequence[Cell], out: Path, **how: Any) -> dict[str, Outcome]:
        _warn_of_steps(cells, read_records(out), warned)  # after the tuning, the number of samples is known
        return run_cells(cells, out, **how)

    train = train_function(study)
    if study.tune is not None:
        print(f"tuning first: {len(unique_cells(trials))} runs, whose test scores have no part in it")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with stopping() if placement().rank == 0 else nullcontext():  # the others end with it
            if ranks.launched():
                with ranks.process_group() as rank:
                    if rank:
                        ranks.follow(train)
                        return 0
                    cells, outcomes = run_stages(study, out, partial(run_and_warn, train=train, together=True))
                    ranks.share(None)
            else:
                run = partial(run_and_warn, train=train, workers=workers, executor=executor, options=slurm_options)
                cells, outcomes = run_stages(study, out, run)
            code = _ended(study, cells, outcomes, (config, out), time.monotonic() - started)
    except StudyStopped as error:
        leave_mark()
        if placement().rank == 0:
            print(f"syncbn: {_left_off(study, (config, out), str(error))}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left_off(study, (config, out), "Ctrl-C")) from None
    trials, cells = recorded_stages(study, out)
    _warn_of_steps([*trials, *cells], read_records(out), warned)
    return code


def _left_off(study: Study, place: tuple[str, Path], cause: str) -> str:
    """What has stopped the study, how far it has come, and the command that goes on with it."""
    trials, cells = recorded_stages(study, place[1])
    runs = unique_cells([*trials, *cells])
    records = read_records(place[1])
    done = sum(cell.key in records for cell in runs)
    return f"stopped by {cause} with {done} of {len(runs)} runs done; to go on: {_again(*place)}"


def _ended(
    study: Study, cells: list[Cell], outcomes: Mapping[str, Outcome], place: tuple[str, Path], seconds: float
) -> int:
    """What follows the runs of a study, whose file and folder are ``place``; returns the exit code."""
    config, out = place
    stopped = any(outcome.state == "missing" for outcome in outcomes.values())
    agrees = not stopped and _agrees(study, cells, out)
    failed = _print_failures(outcomes, sys.stderr)
    if stopped:
        words = f"{left_words(study, outcomes, out)}; when it is mended: {_again(config, out)}"
        print(f"stopped: {words}", file=sys.stderr)
    if study.tune is not None and not any(cell.key in outcomes for cell in cells):
        if not stopped:
            print("nothing was run after the tuning, which failed", file=sys.stderr)
        return 1
    report = _write(study, cells, outcomes, config, out)
    ran = sum(outcome.ran for outcome in outcomes.values())
    kept = sum(outcome.result is not None and not outcome.ran for outcome in outcomes.values())
    print(f"{ran} runs in {seconds:.0f} s, {kept} kept from before, {failed} failed")
    trials, cells = recorded_stages(study, out)
    if note := left_over([*trials, *cells], read_records(out)):
        print(note)
    print(f"report: {report}")
    return 0 if agrees and not failed else 1


def print_status(config: str, out: Path) -> int:
    """Print how many runs of a study are in which state, and about how long the rest takes; nothing is written."""
    study = load_study(config)
    if out.exists() and not out.is_dir():
        raise ConfigError("out", out, "a folder")
    records = read_records(out)
    trials, own = recorded_stages(study, out)
    cells = [*trials, *own]
    outcomes = study_outcomes(cells, out)
    print(f"{study.name}: {len(outcomes)} runs in {out}" + ("" if out.exists() else ", which does not exist yet"))
    counts = Counter(outcome.state for outcome in outcomes.values())
    begun = sum(o.state == "missing" and o.job.directory.exists() for o in outcomes.values())
    remarks = {"failed": ", to be tried again", "missing": f", {begun} of them begun and cut off" if begun else ""}
    for state in get_args(State):
        print(f"{state:8} {counts[state]:4}" + (remarks.get(state, "") if counts[state] else ""))
    print(_time_left(cells, records, counts["running"]))
    if note := left_over(cells, records):
        print(note)
    for state in ("running", "diverged"):
        for outcome in outcomes.values():
            if outcome.state == state:
                print(f"{state}: {outcome.job.label}")
    _print_failures(outcomes, sys.stdout)
    return 0


def report_study(config: str, out: Path) -> int:
    """Write the report of a study from what is there, without running anything."""
    study = load_study(config)
    trials, cells = recorded_stages(study, out)
    outcomes = study_outcomes([*trials, *cells], out)
    if not any(outcome.result is not None or outcome.state == "failed" for outcome in outcomes.values()):
        raise ConfigError("out", out, f"a folder with at least one finished run of the study {study.name}")
    save_study(study, out)
    report = _write(study, cells, outcomes, config, out)
    print(f"report: {report}")
    return 0


def export_study(config: str, out: Path, format: str, to: Path | None = None) -> int:
    """Write a study's main table, or its figures as files, from the runs that are done."""
    from syncbn.study.report.export import FORMATS, export

    if format not in FORMATS:
        raise ConfigError("format", format, f"one of {', '.join(FORMATS)}")
    study = load_study(config)
    results = {key: record.result for key, record in read_records(out).items()}
    trials, cells = recorded_stages(study, out)
    _check_finished(study, (trials, cells), results, "out", (config, out))
    names = {"latex": f"{study.name}.tex", "pdf": "figures", "svg": "figures"}
    for path in export(study, cells, results, format, to or out / names.get(format, f"{study.name}.{format}")):
        print(path)
    return 0


def compare_studies(
    a: Path, b: Path, config_a: str | None = None, config_b: str | None = None, format: str = "table"
) -> int:
    """Print two studies side by side: what differs in their configurations, then the settings that both have."""
    if format not in COMPARISONS:
        raise ConfigError("format", format, f"one of {', '.join(COMPARISONS)}")
    first, second = _summary(a, config_a, "--config-a"), _summary(b, config_b, "--config-b")
    print_comparison(first, second, (str(a), str(b)), format)
    return 0


def _summary(folder: Path, config: str | None, option: str) -> Summary:
    study = study_in(folder, config, option)
    results = {key: record.result for key, record in read_records(folder).items()}
    trials, cells = stages(study, results)
    _check_finished(study, (trials, cells), results, "folder", (config or str(folder / FILE), folder))
    return summary_of(study, cells, results)


def _check_finished(
    study: Study,
    cells: tuple[Sequence[Cell], Sequence[Cell]],
    results: Mapping[str, RunResult],
    key: str,
    place: tuple[str, Path],
) -> None:
    """Raise ConfigError unless a run of the study is done; those of its tuning have no part in a comparison.

    ``cells`` are the tuning's and the study's own, ``place`` its file and folder, and ``key`` names the folder.
    """
    trials, own = (any(cell.key in results for cell in each) for each in cells)
    tuning = f"; it has runs of the tuning alone so far, and this does the others: {_again(*place)}" * trials
    expected = f"a folder with at least one finished run of the study {study.name}{tuning}"
    require(own, key, str(place[1]), expected)


def _again(config: str, out: Path) -> str:
    """The command that goes on with a study."""
    return shlex.join(["syncbn", "study", "run", "--config", config, "--out", str(out)])


def note_changes(study: Study, cells: Sequence[Cell], records: Mapping[str, Record]) -> None:
    """Check that the user's code is there, and print a note if it is not that of the recorded runs."""
    if note := changed_note(user_code(study, cells), cells, records):
        print(f"note: {note}")


def _warn_of_steps(cells: Sequence[Cell], records: Mapping[str, Record], warned: set[str]) -> None:
    """Print a warning for each arm with a key that lies beyond its runs, unless it is among those ``warned`` of."""
    lines = beyond_lines(cells, {key: record.result for key, record in records.items()})
    for line in lines if placement().rank == 0 else ():
        if line not in warned:
            print(f"warning: {line}")
    warned.update(lines)


def _check(workers: int | None, executor: str, options: Mapping[str, Any] | None) -> None:
    if workers is not None and workers < 1:
        raise ConfigError("workers", workers, "a positive integer")
    if executor not in get_args(Executor):
        raise ConfigError("executor", executor, f"one of {', '.join(get_args(Executor))}")
    if options and executor == "pool":
        raise ConfigError("slurm-options", dict(options), "none with --executor pool")
    if ranks.launched():
        together = f"as the {os.environ['WORLD_SIZE']} processes of the launcher run each cell together"
        if workers is not None and workers > 1:
            raise ConfigError("workers", workers, f"1, {together}")
        if executor != "pool":
            raise ConfigError("executor", executor, f"none, {together}")


def _print_grid(study: Study, cells: list[Cell]) -> None:
    for name, values in study.axes.items():
        print(f"{name}: {', '.join(map(spelled, values))}")
    print(f"seeds: {', '.join(map(str, study.seeds))}")
    for arm in study.arms:
        own = [cell for cell in cells if cell.arm == arm.name]
        runs = len(unique_cells(own))
        sizes = sorted({cell.config.normalization_batch_size or 0 for cell in own})
        batch = "no batch statistics" if sizes == [0] else f"normalization batch {', '.join(map(str, sizes))}"
        shared = f" for {len(own)} cells" if runs < len(own) else ""
        print(f"  {arm.label}{' (reference)' if arm.reference else ''}: {runs} runs{shared}, {batch}")


def _time_left(cells: list[Cell], records: Mapping[str, Record], workers: int) -> str:
    seconds = seconds_left(cells, records)
    if seconds is None:
        return "no estimate before the first run has finished"
    if not seconds:
        return "nothing is left to do"
    side = f", {duration(seconds / workers)} with {workers} side by side" if workers > 1 else ""
    return f"about {duration(seconds)} left, one run at a time{side}, from the runs that have finished"


def _agrees(study: Study, cells: list[Cell], out: Path) -> bool:
    """Whether the study's parity check holds, if it has one. The runs are done, and the report shows them anyway."""
    try:
        return check_parity(study, cells, out)
    except LaunchError as error:
        print(f"parity check: failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return False


def _print_failures(outcomes: Mapping[str, Outcome], file: Any) -> int:
    """Print the runs that failed, a line for all that failed with the same sentence; returns their number."""
    failed = {key: outcome for key, outcome in outcomes.items() if outcome.state == "failed"}
    for keys in alike({key: outcome.message for key, outcome in failed.items()}):
        first = failed[keys[0]]
        words = named(first.job.label, len(keys))
        print(f"failed: {words}: {first.message} (log: {first.job.log})", file=file)
    return len(failed)


def _write(study: Study, cells: list[Cell], outcomes: Mapping[str, Outcome], config: str, out: Path) -> Path:
    """Write the report and print its table; returns the path of its page."""
    command = shlex.join(["syncbn", "study", "run", "--config", _shown(config), "--out", _shown(out)])
    results = {key: outcome.result for key, outcome in outcomes.items() if outcome.result is not None}
    failures = {key: outcome.message for key, outcome in outcomes.items() if outcome.state == "failed"}
    running = [key for key, outcome in outcomes.items() if outcome.state == "running"]
    report = write_report(study, cells, results, out, command=command, failures=failures, running=running)
    print_table(study, cells, results, failures)
    return report


def _shown(path: str | Path) -> str:
    """A path for a page that others read, to whom a folder of this machine means nothing."""
    return Path(path).name if Path(path).is_absolute() else str(path)
