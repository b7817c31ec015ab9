"""The table of libraries in the documentation: a row for each mark `works_with` of a test.

The marks are read from the sources, so that the table can be checked where the libraries are not installed. To write
the page anew: python tests/works_with.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fault_table import END, START

MARK = (
    "works_with(library, what): a row of docs/compatibility.md, which names the test. library: its name in "
    "constraints.txt; what: what the test does with it"
)
TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
CONSTRAINTS = TESTS.parent / "constraints.txt"
NAME = "works_with"
CALL = f"pytest.mark.{NAME}("
HEAD = "| library | version | what was done | test |\n|---|---|---|---|\n"


class Row(NamedTuple):
    library: str
    version: str
    what: str
    test: str


def tested_versions() -> dict[str, str]:
    """The pinned version of each package, with which the tests are run."""
    lines = CONSTRAINTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def rows() -> list[Row]:
    """In the page's order: torch first. Raises KeyError for a library that is not in constraints.txt."""
    versions = tested_versions()
    found = [
        Row(library, versions[library], what, f"{path.name}::{test}")
        for path in TESTS.rglob("test_*.py")
        for test, library, what in marks_of(path)
    ]
    return sorted(found, key=lambda row: (row.library != "torch", row.library.lower(), row.what.lower()))


def marks_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """The test, the library and what is done, for each mark on a test of this file or on a case of one."""
    text = path.read_text()
    for function in ast.walk(ast.parse(text)) if CALL in text else ():
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == NAME:
                    library, what = map(ast.literal_eval, call.args)
                    yield function.name, library, what


def written(page: str) -> str:
    """The page with the rows of the tests."""
    before, _, rest = page.partition(START)
    table = "".join(f"| {row.library} | {row.version} | {row.what} | `{row.test}` |\n" for row in rows())
    return f"{before}{START}\n{HEAD}{table}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
