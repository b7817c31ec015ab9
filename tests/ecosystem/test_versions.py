"""The versions that the table of libraries names are those that the tests are run with."""

from __future__ import annotations

import importlib.metadata

import pytest
from works_with import rows


@pytest.mark.parametrize("library", sorted({row.library for row in rows()}))
def test_installed_version(library: str) -> None:
    pinned = {row.version for row in rows() if row.library == library}
    installed = importlib.metadata.version(library).partition("+")[0]  # torch adds its build
    assert pinned == {installed}, "the versions of constraints.txt are installed by: make test-ecosystem"
