"""The ``study`` command: run what is missing, write the report, say where it is."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from syncbn.study.plan import study_cells
from syncbn.study.report import print_table, write_report
from syncbn.study.runner import run_cells
from syncbn.study.study_file import load_study
from syncbn.train.config import ConfigError


def run_study(config: str, out: Path, workers: int | None = None) -> int:
    """Run a study's missing cells in ``out`` and write its report there; run again, it goes on where it was.

    Args:
        config: a study's YAML file, or the name of one that comes with the package.
        out: folder of the study.
        workers: runs side by side; None is one for each core.

    Returns:
        0, or 1 if a cell failed (its message is printed, and the report says what is missing).

    Raises:
        ConfigError: a mistake in the study, or in ``workers``.
    """
    if workers is not None and workers < 1:
        raise ConfigError("workers", workers, "a positive integer")
    study = load_study(config)
    cells = study_cells(study)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes = run_cells(study, cells, out, workers=workers)
    ran = sum(outcome.status == "ran" for outcome in outcomes.values())
    command = shlex.join(["syncbn", "study", "run", "--config", _shown(config), "--out", _shown(out)])
    report = write_report(study, cells, outcomes, out, command=command)
    print_table(study, cells, outcomes)
    failed = [outcome for outcome in outcomes.values() if outcome.status == "failed"]
    for outcome in failed:
        print(f"failed: {outcome.job.label}: {outcome.message} (log: {outcome.job.log})", file=sys.stderr)
    kept = len(outcomes) - ran - len(failed)
    print(f"{ran} runs in {time.monotonic() - started:.0f} s, {kept} kept from before, {len(failed)} failed")
    print(f"report: {report}")
    return 1 if failed else 0


def _shown(path: str | Path) -> str:
    """A path for a page that others read: where an absolute one lies on this machine is nothing to them."""
    return Path(path).name if Path(path).is_absolute() else str(path)
