"""`syncbn env`: what it tells, what it never tells, and that a broken installation does not stop it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import syncbn
from syncbn.bug_report import FACTS, lines
from syncbn.cli import main
from syncbn.kernels.cpu import build


def facts() -> dict[str, str]:
    return {line[:13].strip(): line[13:] for line in lines()}


def test_every_line_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in shown] == list(FACTS)
    assert all(line[13:].strip() for line in shown)
    assert not [line for line in shown if "not known" in line]
    found = facts()
    assert found["syncbn"].startswith(syncbn.__version__)
    assert found["torch"].startswith(torch.__version__)
    assert found["instructions"].endswith(f"torch uses {torch.backends.cpu.get_cpu_capability().lower()}")
    assert ("gloo" in found["distributed"]) == torch.distributed.is_gloo_available()
    assert ("none" in found["GPUs"]) == (torch.cuda.device_count() == 0)


def test_it_needs_no_parser_and_reports_a_torch_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch        not known: ModuleNotFoundError: import of torch halted" in out
    assert "processor    " in out


def test_secrets_and_the_home_folder_are_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = {
        "HOME": str(tmp_path),
        "LD_LIBRARY_PATH": f"{tmp_path}/lib",
        "NCCL_NET_TOKEN": "s3cret",
        "TORCH_HOME": "https://me:s3cret@example.org/models",
        "UNRELATED": "s3cret",
        "OMP_NUM_THREADS": "3",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    shown = facts()["variables"]
    assert "OMP_NUM_THREADS=3" in shown
    assert "LD_LIBRARY_PATH=~/lib" in shown
    assert "NCCL_NET_TOKEN=(hidden)" in shown
    assert "TORCH_HOME=https://(hidden)@example.org/models" in shown
    whole = "\n".join(lines())
    assert "s3cret" not in whole
    assert "UNRELATED" not in whole
    assert str(tmp_path) not in whole


@pytest.mark.parametrize("compiler", [True, False], ids=["with_a_compiler", "without"])
def test_kernels_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: bool) -> None:
    monkeypatch.setattr(build, "library", lambda kind: tmp_path / kind)
    monkeypatch.setenv("CXX", sys.executable if compiler else "no-such-compiler")
    wanted = f"the compiler is {sys.executable}" if compiler else "no C++ compiler was found: no-such-compiler"
    assert facts()["CPU kernels"].startswith(f"not compiled; {wanted}".replace(os.path.expanduser("~"), "~"))


def test_operators_are_not_compiled_for_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind in build.kinds():
        (tmp_path / kind).touch()
    monkeypatch.setattr(build, "library", lambda kind: tmp_path / kind)
    monkeypatch.setattr(build, "operators", lambda: tmp_path / "operators")
    monkeypatch.setattr(build, "build_operators", lambda: pytest.fail("it compiles"))
    shown = facts()["CPU kernels"]
    assert shown.startswith(f"compiled for {', '.join(build.kinds())}; their operators for this torch are not")


def test_a_wrong_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_CPU", "sse9")
    assert "SYNCBN_CPU='sse9'" in facts()["instructions"]
