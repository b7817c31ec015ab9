"""Studies: many training runs that answer one question, and what they show.

>>> from syncbn.study import load_study
>>> load_study("quickstart").seeds
(0, 1, 2)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from syncbn.study.analysis.findings import Finding, findings_of
from syncbn.study.analysis.summary import Setting, summary_of
from syncbn.study.plan.grid import Study, study_cells
from syncbn.study.plan.study_file import load_study
from syncbn.study.run.records import read_records
from syncbn.train.result import RunResult

__all__ = ["Setting", "Study", "compare", "load_study"]


def compare(study: Study, results: Mapping[str, RunResult] | str | Path) -> list[Finding]:
    """Evaluate the contrasts that a study plans.

    Args:
        study: the study.
        results: the folder of the study, or results by the keys of the study's cells. Runs may be missing.

    Returns:
        One finding for each of ``study.contrasts``. Its fields are ``contrast``, ``pairs`` (seed and two errors each),
        ``difference`` of test error, ``low`` and ``high`` (95 % interval), ``p``, ``p_no_worse``, ``p_sign_flip``,
        ``smallest_effect``, ``test_set_error``, ``verdict``, ``diverged`` and ``missing`` (numbers of runs). Errors are
        fractions; NaN is unknown, and ``verdict`` is None until all runs of the contrast have ended.

    Example:
        >>> from syncbn.study import compare, load_study
        >>> [finding.verdict for finding in compare(load_study("quickstart"), {})][:1]  # None: not finished
        [None]
    """
    if not isinstance(results, Mapping):
        results = {key: record.result for key, record in read_records(Path(results)).items()}
    return list(findings_of(summary_of(study, study_cells(study), results)))
