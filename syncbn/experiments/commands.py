"""The ``experiment`` commands: list, run."""

from __future__ import annotations

import shlex
import sys
import time
from functools import partial
from pathlib import Path

from syncbn.experiments.checks import measure
from syncbn.experiments.experiment import described_experiments, load_experiment
from syncbn.experiments.page import checks_table, verdict, write_experiment
from syncbn.experiments.runs import Runs
from syncbn.study.plan.folder import FILE, study_in
from syncbn.study.report.tables import console, print_rich
from syncbn.study.run.own_loop import train_function
from syncbn.study.run.progress import Display
from syncbn.study.run.runner import run_cells
from syncbn.study.run.signals import StudyStopped, stopping
from syncbn.study.stages import run_stages
from syncbn.train.config import require
from syncbn.train.stopping import STOPPED


def list_experiments() -> int:
    """Print the experiments that come with the package: name, title, source."""
    for name, title, source in described_experiments():
        print(f"{name:<16}{title} ({source})")
    return 0


def _check_folder(out: Path, name: str) -> None:
    """Raise ConfigError if ``out`` holds another experiment, whose page this one would replace."""
    if (out / FILE).is_file():
        held = study_in(out, None, "--out").name
        require(held == name, "out", out, f"a new folder, or that of {name}; it holds {held}")


def run_experiment(name: str, out: Path, workers: int | None = None, *, larger: bool = False) -> int:
    """Do the missing runs of an experiment, print its checks and write its page; run again, it goes on.

    The exit code is 1 if a run failed, and 85 if SIGTERM or SIGUSR1 stopped it. A claim that does not come out is a
    result and no failure.
    """
    experiment = load_experiment(name, larger=larger)
    study = experiment.study
    command = shlex.join(["syncbn", "experiment", name, *(["--larger"] if larger else []), "--out", str(out)])
    _check_folder(out, study.name)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with stopping():
            run = partial(run_cells, train=train_function(study), workers=workers, progress=Display(part=""))
            cells, outcomes = run_stages(study, out, run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped by Ctrl-C; to go on: {command}") from None
    except StudyStopped as error:
        print(f"syncbn: stopped by {error}; to go on: {command}", file=sys.stderr)
        return STOPPED
    failed = [outcome for outcome in outcomes.values() if outcome.state == "failed"]
    for outcome in failed:
        print(f"failed: {outcome.job.label}: {outcome.message} (log: {outcome.job.log})", file=sys.stderr)
    results = {key: outcome.result for key, outcome in outcomes.items() if outcome.result is not None}
    found = [measure(check, Runs(study, cells, results)) for check in experiment.checks]
    page = write_experiment(experiment, results, out, command=command)
    print_rich(console(), checks_table(found))
    ran = sum(outcome.ran for outcome in outcomes.values())
    print(f"{verdict(found)} {ran} runs in {time.monotonic() - started:.0f} s")
    print(f"page: {page}")
    return 1 if failed else 0
