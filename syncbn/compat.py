"""The one place that knows how torchvision has to be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from typing import Any

import torch

# Operators for which torchvision registers a fake implementation while it is imported, whether or not its compiled
# extension could be loaded. (Its other registrations are skipped without the extension.)
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A schema lives as long as the Library that defined it.
_libraries: list[torch.library.Library] = []


def import_torchvision(submodule: str | None = None) -> Any:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    A CUDA build of torchvision beside a CPU build of torch (what a plain ``pip install`` often makes) cannot load its
    extension. It then fails at import, with "operator torchvision::nms does not exist", though its models, transforms
    and data sets are Python and need none of those operators. Here the missing schemas are declared first; calling such
    an operator still fails with torchvision's own message.

    A torchvision whose extension loads is left to define its operators itself. Calling this again, or after an
    ``import torchvision`` that failed, is fine.

    Args:
        submodule: import this part instead, such as ``"transforms.v2"``.

    Returns:
        The module ``torchvision`` (or ``torchvision.<submodule>``).

    Raises:
        ImportError: torchvision is not installed, or is not made for this torch.
    """
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is not None and not _extension_loads(spec.submodule_search_locations or ()):
            _declare_missing_operators()
    try:
        return importlib.import_module(".".join(["torchvision", submodule] if submodule else ["torchvision"]))
    except ModuleNotFoundError as error:
        raise ImportError(f"torchvision is needed here ({error}); install: pip install 'syncbn[train]'") from error
    except (RuntimeError, AttributeError) as error:
        raise ImportError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); "
            "install the torchvision release that belongs to this torch"
        ) from error


def _extension_loads(package_folders: Sequence[str]) -> bool:
    """Whether torchvision will find its operators: its own test at import, made without importing it.

    Loading is what registers the operators, and the library is loaded once a process, so torchvision's own attempt
    later on changes nothing.
    """
    spec = PathFinder.find_spec("_C", list(package_folders))
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError):
        return False
    return True


def _declare_missing_operators() -> None:
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(name + schema)
            _libraries.append(library)
