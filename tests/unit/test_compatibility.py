"""The table of libraries is that of the tests: none of its rows stays when a test or a version has changed."""

from __future__ import annotations

from works_with import CALL, PAGE, TESTS, marks_of, rows, written


def test_the_table_is_that_of_the_tests() -> None:
    page = PAGE.read_text()
    assert page == written(page), "run: python tests/works_with.py"


def test_every_row_says_one_thing_once() -> None:
    found = rows()
    assert len(found) >= 30
    assert len({(row.library, row.what) for row in found}) == len(found)


def test_no_mark_is_overlooked() -> None:
    """A mark that is not on a test, such as one in a variable, would be no row."""
    for path in TESTS.rglob("test_*.py"):
        if path.name != "test_compatibility.py":
            assert path.read_text().count(CALL) == len(list(marks_of(path))), path.name
