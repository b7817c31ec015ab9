"""The results of the literature's experiments in the documentation: a row for each check of a kept page.

To keep the pages of new runs and to write the documentation anew: python tests/experiment_table.py FOLDER, with the
folder that `make experiments` writes to; without one, the documentation alone.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from fault_table import END, START

from syncbn.experiments import Experiment, experiment_names, load_experiment
from syncbn.experiments.checks import Measured
from syncbn.experiments.page import WORDS, verdict

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments.md"
RESULTS = ROOT / "configs" / "experiments" / "results"
KEPT = ("experiment.html", "checks.csv")
HEAD = "| the claim says | expected | measured (95 % interval) | here |\n|---|---|---|---|\n"


def kept(experiment: Experiment, results: Path = RESULTS) -> list[Measured]:
    """The kept results of an experiment's checks. Raises ValueError where they are of other checks than it has now."""
    agreements = {words: agreement for agreement, words in WORDS.items()}
    found = []
    with (results / experiment.name / "checks.csv").open(newline="") as file:
        for check, row in zip(experiment.checks, csv.DictReader(file), strict=True):
            if (row["check"], row["expected"]) != (check.text, check.expected):
                raise ValueError(f"{experiment.name}: {row['check']!r}, {row['expected']}: the check is now {check}")
            mean, low, high = (float(row[name] or "nan") for name in ("mean", "low", "high"))
            agreement = agreements[row["agrees"]]
            found.append(
                Measured(check=check, seeds=int(row["seeds"]), mean=mean, low=low, high=high, agreement=agreement)
            )
    return found


def written(page: str) -> str:
    """The page with the kept results."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{''.join(_parts())}{END}{rest.partition(END)[2]}"


def _parts() -> Iterator[str]:
    for experiment in map(load_experiment, experiment_names()):
        found = kept(experiment)
        yield f"### {experiment.study.title}\n\n"
        yield f"`{experiment.name}`: {experiment.source}.\n\n{experiment.claim} **{verdict(found)}**\n\n{HEAD}"
        for m in found:
            yield f"| {m.check.text} | {m.check.expected} | {m.words} | {WORDS[m.agreement]} |\n"
        yield "\n"


def keep(folder: Path) -> None:
    """Copy the pages and the checks of new runs to the kept ones."""
    for name in experiment_names():
        (RESULTS / name).mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            if (folder / name / file).is_file():
                shutil.copyfile(folder / name / file, RESULTS / name / file)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    PAGE.write_text(written(PAGE.read_text()))
