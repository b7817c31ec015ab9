"""Each script of `examples/` runs by the command in its docstring and prints what it promises."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

PRINTED = {
    "ddp": r"running means equal on all ranks: True",
    "fsdp2": r"of the norm's 32 weights, 16 are here",
    "ghost": r"largest difference from four batches of 8: 0e\+00\n",
    "population_statistics": r"loss with running statistics 0\.\d+, with population statistics 0\.\d+",
    "renorm": r"BatchNorm: 0\.[0-4]\d, BatchRenorm: 0\.[89]\d",
    "study": r"report: .*report\.html",
}
"""By the script's name, a pattern of its output."""


def command_of(script: Path) -> list[str]:
    """The words of the line `Run: ...` in a script's docstring, with this Python."""
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    found = re.search(r"^Run: (.+)$", docstring, re.MULTILINE)
    assert found, f"{script.name}: no line 'Run: ...' in its docstring"
    program, *arguments = shlex.split(found[1])
    assert program in ("python", "torchrun")
    return [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *arguments]


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize(
    "name",
    [
        # A whole study: it starts worker processes and draws a report.
        pytest.param(name, marks=pytest.mark.slow) if name == "study" else name
        for name in PRINTED
    ],
)
def test_example(name: str, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 40
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command_of(script),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[name], done.stdout), done.stdout
