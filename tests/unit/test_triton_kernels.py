"""The Triton kernels without a GPU: in Triton's interpreter against their twins, and through its compiler."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="a CPU build of torch does not bring Triton")

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "configs/bench/results/cuda_kernels.csv"


def run(arguments, **environment):
    """A process of its own: Triton's modes are set before it is imported, and hold for the process."""
    places = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_in_the_interpreter():
    files = [HERE / "triton_interpreted.py", HERE / "triton_access_cases.py"]
    out = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], TRITON_INTERPRET="1")
    assert " passed" in out
    assert "skipped" not in out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_kernels_are_those_of_the_table(tmp_path):
    """For each GPU of the table. Other releases of Triton need other numbers of registers: 3.6 spills one in a case."""
    run([HERE / "triton_compiled.py", tmp_path / "found.csv"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    found, kept = (list(csv.DictReader(path.open(newline=""))) for path in (tmp_path / "found.csv", TABLE))
    names = [[(row["capability"], row["kernel"], row["case"]) for row in rows] for rows in (found, kept)]
    assert names[0] == names[1]
    assert {row["kernel"] for row in found} == kernels()
    assert {row["spill_stores"] for row in kept} == {"0"}
    assert max(int(row["spill_stores"]) for row in found) <= 16  # bytes
    if {row["triton"] for row in found} == {row["triton"] for row in kept}:
        assert found == kept


def test_predicted_traffic_is_that_of_the_page():
    page = (HERE.parents[1] / "docs/speed.md").read_text()
    assert run([HERE / "triton_traffic.py"]) in page


def kernels():
    """The names of all kernels in the sources."""
    sources = (HERE.parents[1] / "syncbn/kernels/cuda").glob("*.py")
    return {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
