"""What is imported when: the command line starts without torch, and the package brings nothing but torch."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn

ROOT = Path(__file__).resolve().parents[2]
LAZY = ("syncbn", "syncbn.train")
SLOW = pytest.mark.slow  # it imports torch in a process of its own

COMMANDS_WITHOUT_TORCH = """
import contextlib, io, sys
from syncbn.cli import COMMANDS, main

options = [[*name.split(), "--help"] for name in COMMANDS if name != "bench"]  # its parser knows this processor
for words in (["--version"], ["--help"], ["train", "--gpus", "x"], ["nonsense"], *options):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    assert code == (2 if words[-1] in ("x", "nonsense") else 0), (words, said.getvalue())
    assert "torch" not in sys.modules, words
"""

NAMES = """
import json, sys
import torch

found = [set(sys.modules)]
import syncbn
found.append(set(sys.modules))
for name in syncbn.__all__:
    getattr(syncbn, name)
found.append(set(sys.modules))
print(json.dumps([sorted(new - old) for old, new in zip(found, found[1:])]))
"""

FILES_FIRST = """
import pickle
import syncbn.convert, syncbn.fold, syncbn.uneven, syncbn.watchdog
from syncbn.convert import revert
from syncbn import *
import torch

model = syncbn.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), "sync")
assert convert is syncbn.convert and type(model[0]) is not torch.nn.BatchNorm1d
assert isinstance(pickle.loads(pickle.dumps(model))[0], SyncBatchNorm)
assert pickle.loads(pickle.dumps(syncbn.convert)) is convert
assert type(syncbn.revert(model)[0]) is torch.nn.BatchNorm1d
assert callable(fold) and callable(uneven) and callable(watchdog)
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_that_compute_nothing_start_without_torch() -> None:
    pytest.importorskip("jsonargparse", reason="the commands' parser")
    python(COMMANDS_WITHOUT_TORCH)


@SLOW
def test_the_package_imports_nothing_but_torch_and_the_standard_library() -> None:
    at_import, by_names = json.loads(python(NAMES))
    assert at_import == ["syncbn", "syncbn.lazy"]
    assert "syncbn.layers" in by_names
    others = {name.partition(".")[0] for name in by_names} - {"syncbn", "torch", *sys.stdlib_module_names}
    assert not others


@SLOW
def test_a_function_is_not_hidden_by_the_file_of_its_name() -> None:
    python(FILES_FIRST)


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_and_the_interpreter_find_the_same_names(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    found = {
        alias.name: (node.module or "").removeprefix(f"{package}.")
        for block in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found == vars(module)["_homes"]
    assert sorted({*found, "__version__"} if package == "syncbn" else found) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name).__module__ == f"{package}.{home}" for name, home in found.items())


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'syncbn' has no attribute 'BatchNormalisation'"):
        syncbn.BatchNormalisation  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'BatchNormalisation' from 'syncbn'"):
        from syncbn import BatchNormalisation  # type: ignore[attr-defined]  # noqa: F401
