"""Public names that are imported when they are first used, so that the command line starts without torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """The class of a package with such names."""

    def __getattr__(self, name: str) -> Any:
        home = vars(self)["_homes"].get(name)
        if home is None and not name.startswith("_") and find_spec(f"{self.__name__}.{name}") is not None:
            return import_module(f"{self.__name__}.{name}")
        if home is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        value = getattr(import_module(f"{self.__name__}.{home}"), name)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import of convert.py sets `syncbn.convert` to the module, and that name is the function's.
        if not (isinstance(value, ModuleType) and name in vars(self)["_homes"]):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *vars(self)["_homes"]})


def import_when_used(package: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Let the names of a package that is being imported come from its modules; ``names`` has those of each module."""
    module = sys.modules[package]
    vars(module)["_homes"] = {name: home for home, found in names.items() for name in found}
    module.__class__ = LazyPackage
