"""Studies from Python: what the command line does, as methods of one object."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.study.analysis.findings import Finding, findings_of
from syncbn.study.analysis.summary import Summary, summary_of
from syncbn.study.plan import grid, study_file
from syncbn.study.run.own_loop import train_function
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import Executor, run_cells
from syncbn.study.stages import left_words, run_stages, stages
from syncbn.train.config import require
from syncbn.train.result import RunResult

if TYPE_CHECKING:
    import pandas as pd

Results = Mapping[str, RunResult] | str | Path
"""Results by the keys of a study's cells, or the folder of the study."""


class Study:
    """A question, the arms that answer it, the axes along which they are run, and the seeds of each setting.

    Args:
        plan: the keys of a study's file, with the values that they have there, such as ``base``, ``arms``, ``sweep``,
            ``tune`` and ``contrasts``. ``run`` may be a function, and ``seeds`` a range.

    Raises:
        ValueError: a key is missing or unknown, or a value cannot be used.

    Example:
        >>> import tempfile
        >>> from syncbn.study import Study
        >>> def run(setting):
        ...     return {"error": 0.2 - setting.config.optimizer.lr + 0.01 * setting.seed}
        >>> study = Study(
        ...     run=run,
        ...     metric={"name": "error"},
        ...     arms={"batch": {"overrides": {"norm": {"name": "batch"}}}},
        ...     axes={"optimizer.lr": [0.1, 0.15]},
        ...     seeds=range(2),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = study.run(folder, progress=False)
        ...     runs = study.frame(folder)
        >>> runs[["optimizer.lr", "seed", "status", "test_error"]].round(2).values.tolist()
        [['0.1', 0, 'done', 0.1], ['0.15', 0, 'done', 0.05], ['0.1', 1, 'done', 0.11], ['0.15', 1, 'done', 0.06]]
    """

    def __init__(self, **plan: Any) -> None:
        named = {"name": "study", "title": "Study", "question": "Which normalization helps?", "base": {}}
        content = named | plan
        if isinstance(content.get("seeds"), range | tuple):
            content["seeds"] = list(content["seeds"])
        self.plan: grid.Study = study_file.study_from_dict(content)
        self._out: Path | None = None

    @classmethod
    def of(cls, plan: grid.Study) -> Study:
        """A study that has been read."""
        made = cls.__new__(cls)
        made.plan, made._out = plan, None
        return made

    def __repr__(self) -> str:
        return f"Study({self.plan.name!r}: {len(self.arms)} arms, {len(self.seeds)} seeds)"

    @property
    def name(self) -> str:
        """Short name."""
        return self.plan.name

    @property
    def title(self) -> str:
        """Heading of the report."""
        return self.plan.title

    @property
    def arms(self) -> tuple[grid.Arm, ...]:
        """The arms, in the order of the file."""
        return self.plan.arms

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every setting."""
        return self.plan.seeds

    @property
    def contrasts(self) -> tuple[grid.Contrast, ...]:
        """The planned comparisons."""
        return self.plan.contrasts

    def run(
        self, out: str | Path, workers: int | None = None, *, executor: Executor = "pool", progress: bool = True
    ) -> Path:
        """Do the runs that ``out`` has no record of, and write the report; interrupted, it goes on when called again.

        Args:
            out: folder of the study.
            workers: processes that do runs side by side; by default one per core. A ``run`` that is a function is
                called in this process, unless there are several workers, which have to be able to import it.
            executor: who does the runs, as for ``syncbn study run``.
            progress: print each run that ends.

        Returns:
            The path of the report.

        Raises:
            RuntimeError: runs failed, after all others were done; the message has the first one's reason. If the first
                runs all fail by the same mistake of yours, the others are left.
        """
        from syncbn.study.report.report import write_report  # matplotlib is slow to import

        if multiprocessing.parent_process() is not None and workers != 1:
            problem = "run() was called while a worker process imports the script that starts it"
            raise RuntimeError(f'{problem}: put the call under `if __name__ == "__main__":`')
        self._out = Path(out)
        self._out.mkdir(parents=True, exist_ok=True)
        if callable(self.plan.run) and (workers or 1) == 1:
            executor = "here"
        run = partial(run_cells, train=train_function(self.plan), workers=workers, executor=executor, progress=progress)
        cells, outcomes = run_stages(self.plan, self._out, run)
        results = {key: outcome.result for key, outcome in outcomes.items() if outcome.result is not None}
        failures = {key: outcome.message for key, outcome in outcomes.items() if outcome.state == "failed"}
        command = "syncbn.study.Study(...).run(...)"
        report = write_report(self.plan, cells, results, self._out, command=command, failures=failures)
        if failures:
            first = next(outcome for outcome in outcomes.values() if outcome.state == "failed")
            more = f"{len(failures)} of {len(outcomes)} runs failed; the first, {first.job.label}: {first.message}"
            stopped = any(outcome.state == "missing" for outcome in outcomes.values())
            left = f"; {left_words(self.plan, outcomes, self._out)}" if stopped else ""
            raise RuntimeError(f"{more} (log: {first.job.log}){left}")
        return report

    def frame(self, out: str | Path | None = None) -> pd.DataFrame:
        """One row for each run, with the columns of ``results.csv``; runs may be missing. Needs pandas."""
        import pandas as pd

        from syncbn.study.report.tables import runs_csv

        results = results_of(self._folder(out))
        _, cells = stages(self.plan, results)
        return pd.read_csv(StringIO(runs_csv(self.plan, cells, results)), dtype=dict.fromkeys(self.plan.axes, str))

    def compare(self, out: str | Path | None = None) -> pd.DataFrame:
        """One row for each planned contrast: the fields of :func:`compare`'s findings. Needs pandas.

        If the study tunes, ``chosen`` and ``chosen_against`` are what the two sides of the contrast chose, such as
        "optimizer.lr 0.1", or None for a side that is not tuned or has not chosen yet.

        Raises:
            ConfigError: the study plans no contrast.
        """
        import pandas as pd

        from syncbn.study.report.format import frame_choices

        planned = "at least one for a comparison; mark one of several arms with `reference: true`, or name them"
        require(bool(self.contrasts), "contrasts", list(self.contrasts), planned)
        summary = summary_in(self.plan, self._folder(out))
        rows = []
        for finding in findings_of(summary):
            values = {
                name: value for name, value in vars(finding).items() if name not in ("contrast", "metric", "pairs")
            }
            row = {"contrast": finding.contrast.name, "metric": finding.metric.name, **values}
            rows.append(row | frame_choices(summary, finding.contrast))
        return pd.DataFrame(rows)

    def _folder(self, out: str | Path | None) -> Path:
        folder = self._out if out is None else Path(out)
        require(folder is not None, "out", None, "the folder of the study, unless run() was called before")
        assert folder is not None, "checked before"
        return folder


def load_study(path_or_name: str | Path) -> Study:
    """Read a study from its YAML file.

    Args:
        path_or_name: path of a YAML file, or the name of a study that comes with the package.

    Returns:
        The study. Each of its cells has a possible configuration.

    Raises:
        ValueError: there is no such study, or its file has a mistake; the message names the file, the key, the value
            and what was expected.

    Example:
        >>> from syncbn.study import load_study
        >>> study = load_study("quickstart")
        >>> study.name, study.seeds
        ('quickstart', (0, 1, 2))
    """
    return Study.of(study_file.load_study(path_or_name))


def compare(study: Study, results: Results) -> list[Finding]:
    """Evaluate the contrasts that a study plans.

    Args:
        study: the study.
        results: the folder of the study, or results by the keys of the study's cells. Runs may be missing.

    Returns:
        One finding for each of ``study.contrasts``. Its fields are ``contrast``, ``metric``, ``pairs`` (seed and two
        test scores each), ``difference`` of the scores, ``low`` and ``high`` (95 % interval), ``margin``, ``p``,
        ``p_no_worse``, ``p_sign_flip``, ``smallest_effect``, ``test_set_error``, ``verdict``, ``diverged`` and
        ``missing`` (numbers of runs). Scores are in the metric's own unit, so those in percent are fractions; NaN is
        unknown, and ``verdict`` is None until all runs of the contrast have ended.

    Raises:
        ConfigError: the results have different metrics.

    Example:
        >>> from syncbn.study import compare, load_study
        >>> [finding.verdict for finding in compare(load_study("quickstart"), {})][:1]  # None: not finished
        [None]
    """
    return findings(study.plan, results)


def findings(plan: grid.Study, results: Results) -> list[Finding]:
    """As :func:`compare`, of a study's plan."""
    return list(findings_of(summary_in(plan, results)))


def summary_in(plan: grid.Study, results: Results) -> Summary:
    """The settings of a study's plan, from its folder or from results by the keys of its cells."""
    known = results_of(results)
    _, cells = stages(plan, known)
    return summary_of(plan, cells, known)


def results_of(results: Results) -> Mapping[str, RunResult]:
    """Results by the keys of cells."""
    if isinstance(results, Mapping):
        return results
    return {key: record.result for key, record in read_records(Path(results)).items()}
