"""The notebook of the documentation runs, and finds what its stored outputs say."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"
VERDICTS = r"<td>(better|worse|no worse|no difference shown|too few seeds|diverged|None)</td>"


def verdicts(notebook: nbformat.NotebookNode) -> list[str]:
    """The column of that name, of the frames that cells show."""
    pages = [output["data"].get("text/html", "") for output in outputs(notebook) if "data" in output]
    return re.findall(VERDICTS, "".join(pages))


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.fixture
def stored() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_stored_outputs(stored: nbformat.NotebookNode) -> None:
    """They are of one run of the whole notebook, without errors and warnings, and have the frame and the figure."""
    assert NOTEBOOK.stat().st_size < 200_000
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [output.output_type for output in outputs(stored)]
    assert kinds.count("error") == kinds.count("stream") == 0
    assert sum("image/png" in output.get("data", ()) for output in outputs(stored)) == 1
    assert len(verdicts(stored)) == 2


def test_it_finds_the_same_when_executed(stored: nbformat.NotebookNode, tmp_path: Path) -> None:
    executed = copy.deepcopy(stored)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(executed, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert verdicts(executed) == verdicts(stored)
    assert [path.name for path in tmp_path.iterdir()] == []
