"""The import of torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from typing import Any

import torch

# The operators for which torchvision registers a fake implementation at import even if its extension did not load.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A schema lives as long as the Library that defined it.
_libraries: list[torch.library.Library] = []


def import_torchvision(submodule: str | None = None) -> Any:
    """Import torchvision, even if its compiled operators were built for another torch.

    A plain ``pip install`` often puts a CUDA build of torchvision beside a CPU build of torch. Its import then fails
    with "operator torchvision::nms does not exist", although its models, transforms and data sets are written in Python
    and need no such operator. This function declares the missing operators first. Calling one still fails.

    Args:
        submodule: import this part instead, such as ``"transforms.v2"``.

    Returns:
        The module ``torchvision`` or ``torchvision.<submodule>``.

    Raises:
        ImportError: torchvision is not installed, or it does not work with this torch.
    """
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is not None and not _extension_loads(spec.submodule_search_locations or ()):
            _declare_missing_operators()
    try:
        return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")
    except ModuleNotFoundError as error:
        raise ImportError(f"torchvision is needed here ({error}); install: pip install 'syncbn[train]'") from error
    except (RuntimeError, AttributeError) as error:
        raise ImportError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); "
            "install the torchvision release that belongs to this torch"
        ) from error


def _extension_loads(package_folders: Sequence[str]) -> bool:
    """Whether torchvision will find its operators. Loads its library, as torchvision's own import would do next."""
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
