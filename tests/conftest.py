"""The marks whose rows are tables of the documentation, and what each test of a fault has to leave behind: nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import ROWS, FaultTable
from leftovers import files_in, processes, start_of_session, wait_until_gone
from works_with import MARK

start_of_session()
PAGE = Path(__file__).parents[1] / "docs" / "faults.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "write the rows of the tests marked `fault`, with their seconds, into the page"
    parser.addoption("--write-fault-table", action="store_true", help=words)
    parser.addoption("--fault-page", default=str(PAGE), help="the page; by default docs/faults.md")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", ROWS)
    config.addinivalue_line("markers", MARK)
    page = config.getoption("--fault-page") if config.getoption("--write-fault-table") else None
    config.pluginmanager.register(FaultTable(page), "fault-table")


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of a fault leaves no process and no temporary file."""
    mark = request.node.get_closest_marker("fault")
    if mark is None:
        yield
        return
    folder: Path = request.getfixturevalue("tmp_path")
    temporary: Path = request.getfixturevalue("tmp_path_factory").mktemp("temporary")
    before = processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        yield
    left = wait_until_gone(before)
    for pid in left:
        os.kill(pid, 9)
    assert not left, "these processes are left"
    keeps = mark.kwargs.get("keeps", ())
    assert not [path for path in files_in(folder, temporary) if not any(map(path.match, keeps))], "these files are left"
