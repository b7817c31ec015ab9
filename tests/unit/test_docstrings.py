"""The examples in the docstrings of the public names run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import sys

import pytest

import syncbn

NAMES = (
    "syncbn.checkpoints.translate_state",
    "syncbn.checkpoints.translate_options",
    "syncbn.integrations.timm.register",
)
PUBLIC = {f"syncbn.{name}": getattr(syncbn, name) for name in syncbn.__all__ if name != "__version__"}
PUBLIC["syncbn.SyncBatchNorm.forward"] = syncbn.SyncBatchNorm.forward
PUBLIC |= {name: pkgutil.resolve_name(name) for name in NAMES}


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str) -> None:
    documented = PUBLIC[name]
    names = vars(sys.modules[documented.__module__])
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(documented) or "", dict(names), name, None, None)
    assert example.examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(example).failed == 0
