"""The Triton kernels without a GPU: in Triton's interpreter against their twins, and through its compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="a CPU build of torch does not bring Triton")

HERE = Path(__file__).parent
KERNELS = {"group_sums_kernel", "normalize_kernel", "backward_sums_kernel", "grad_input_kernel", "finish_kernel"}


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
    out = run(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], TRITON_INTERPRET="1"
    )
    assert " passed" in out
    assert "skipped" not in out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", ["90"])
def test_kernels_compile(capability, tmp_path):
    """Without spilling registers."""
    out = run([HERE / "triton_compiled.py", capability], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    lines = [line.split() for line in out.splitlines()]
    assert {name for name, _ in lines} == {*KERNELS, "commit_kernel"}
    # Some bytes are saved around a call of a float64 function.
    assert max(int(stack) for _, stack in lines) <= 64
