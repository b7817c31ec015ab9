"""The table of faults in the documentation: a row for each case of a test that is marked `fault`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROWS = (
    "fault(kind, fault, moment, outcome, lost, keeps): a row of docs/faults.md. The texts may name parameters of the "
    "test, as in {world}. keeps: patterns of files that may be left"
)
KINDS = {
    "death": "A process dies",
    "signal": "A signal comes",
    "hang": "Ranks do not come, or come to another layer",
    "disk": "A disk is full or refuses",
    "file": "A file is damaged",
    "data": "Data and numbers",
    "mistake": "Code and configurations",
    "together": "Two at once, clocks and networks",
}
"""The parts of the page, and their headings."""
START, END = "<!-- rows -->\n", "<!-- end of the rows -->\n"
HEAD = "| fault | when | what happens | what is lost | seconds | test |\n|---|---|---|---|---|---|\n"


class Row(NamedTuple):
    kind: str
    fault: str
    moment: str
    outcome: str
    lost: str
    test: str


class FaultTable:
    """A plugin that notes the rows of the collected tests and the seconds of those that passed."""

    def __init__(self, page: str | None) -> None:
        self.page = None if page is None else Path(page)
        self.rows: dict[str, Row] = {}
        self.files: set[str] = set()
        self.seconds: dict[Row, float] = defaultdict(float)

    @pytest.hookimpl(tryfirst=True)  # before tests are deselected: their rows stay in the page
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.files.add(item.path.name)
            if (mark := item.get_closest_marker("fault")) is not None:
                self.rows[item.nodeid] = row_of(mark, item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and (row := self.rows.get(report.nodeid)) is not None:
            self.seconds[row] = max(self.seconds[row], report.duration)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.page is not None and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            rows = set(self.rows.values())
            self.page.write_text(written(self.page.read_text(), rows, self.seconds, self.files))


def row_of(mark: pytest.Mark, item: pytest.Item) -> Row:
    """The row of a mark; ValueError for a kind that is none, and KeyError for a text that is missing."""
    kind, fault = mark.args
    if kind not in KINDS:
        raise ValueError(f"fault: got kind {kind!r}, expected one of {', '.join(KINDS)}")
    case = getattr(item, "callspec", None)
    names = {} if case is None else {**case.params, "id": case.id}
    texts = (fault, *(mark.kwargs[name] for name in ("moment", "outcome", "lost")))
    return Row(kind, *(text.format(**names) for text in texts), item.path.name)


def written(page: str, rows: set[Row], seconds: dict[Row, float], files: set[str]) -> str:
    """The page with these rows, and those that it has of other test files than these.

    A row whose tests were not run keeps the seconds that it has in the page.
    """
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    known = rows_in(page)
    kept = {row for row in known if row.test not in files}
    shown = {row: f"{seconds[row]:.1f}" if row in seconds else known.get(row, "not run") for row in rows | kept}
    return f"{before}{START}\n{''.join(_parts(shown))}{END}{after}"


def _parts(shown: dict[Row, str]) -> Iterator[str]:
    for kind, heading in KINDS.items():
        yield f"### {heading}\n\n{HEAD}"
        for row in sorted(row for row in shown if row.kind == kind):
            yield f"| {row.fault} | {row.moment} | {row.outcome} | {row.lost} | {shown[row]} | `{row.test}` |\n"
        yield "\n"


def rows_in(page: str) -> dict[Row, str]:
    """The rows of a page, with their seconds."""
    found, kind = {}, ""
    for line in page.partition(START)[2].partition(END)[0].splitlines():
        kind = next((name for name, heading in KINDS.items() if line == f"### {heading}"), kind)
        if line.startswith("| ") and line not in HEAD:
            *texts, took, test = line.removeprefix("| ").removesuffix(" |").split(" | ")
            found[Row(kind, *texts, test.strip("`"))] = took
    return found
