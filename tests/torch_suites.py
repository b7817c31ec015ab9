"""What torch's own test suites contain, read from the sources that come with torch.

They are not imported. That would freeze the flags of torch's back-ends for the whole process, give hypothesis another
profile, need a package that torch does not require, and take many seconds.
"""

from __future__ import annotations

import ast
import copy
import enum
import functools
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.testing import make_tensor

_CLASSES = ("FunctionInput", "ModuleInput", "ModuleErrorEnum", "ErrorModuleInput")


def source(name: str) -> str:
    """The source of a module of ``torch.testing._internal``."""
    spec = importlib.util.find_spec("torch.testing._internal")
    assert spec is not None, "every wheel of torch has it"
    assert spec.submodule_search_locations is not None, "it is a package"
    return Path(spec.submodule_search_locations[0], *name.split(".")).with_suffix(".py").read_text()


@functools.cache
def _list_of_modules() -> ast.Module:
    return ast.parse(source("common_modules"))


def batchnorm_infos() -> list[str]:
    """The classes of batch normalization for which torch's list of modules has an entry."""
    calls = (node for node in ast.walk(_list_of_modules()) if isinstance(node, ast.Call) and node.args)
    found = (ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "ModuleInfo")
    return sorted(name for name in found if "BatchNorm" in name)


@functools.cache
def _definitions() -> dict[str, Any]:
    """The functions of torch's list of modules that make the inputs of batch normalization."""
    kept: list[ast.stmt] = [
        node
        for node in _list_of_modules().body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (node.name in _CLASSES or "BatchNorm" in node.name)
    ]
    needed = {"partial": functools.partial, "wraps": functools.wraps, "deepcopy": copy.deepcopy, "Enum": enum.Enum}
    names: dict[str, Any] = {**needed, "torch": torch, "make_tensor": make_tensor}
    exec(compile(ast.Module(kept, []), "common_modules.py", "exec"), names)
    return names


def module_inputs(torchs: type, dtype: torch.dtype, *, training: bool, requires_grad: bool = False) -> list[Any]:
    """The inputs with which torch tests a class of batch normalization.

    Each has ``constructor_input`` and ``forward_input`` with ``args`` and ``kwargs``, and ``desc``.
    """
    function = _definitions()[f"module_inputs_torch_nn_{torchs.__name__}"]
    info = SimpleNamespace(module_cls=torchs)
    inputs: list[Any] = function(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    return inputs


def module_error_inputs(torchs: type, dtype: torch.dtype, *, training: bool) -> list[Any]:
    """The inputs that must raise: ``module_error_input``, ``error_type`` and ``error_regex``."""
    function = _definitions()["module_error_inputs_torch_nn_BatchNorm1d_2d_3d"]
    info = SimpleNamespace(module_cls=torchs)
    inputs: list[Any] = function(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    return inputs


def distributed_tests(pattern: str) -> list[str]:
    """The names of torch's distributed tests that match a pattern, whatever its case."""
    names = set(re.findall(r"^ +def (test_\w+)\(", source("distributed.distributed_test"), re.MULTILINE))
    return sorted(name for name in names if re.search(pattern, name, re.IGNORECASE))
