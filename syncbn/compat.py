"""The imports of torchvision and timm."""

from __future__ import annotations

import importlib
from typing import Any

import torch

# A schema lives as long as the Library that defined it.
_libraries: list[torch.library.Library] = []


def import_torchvision(submodule: str | None = None) -> Any:
    """Import torchvision, even if its compiled operators were built for another torch.

    A plain ``pip install`` often puts a CUDA build of torchvision beside a CPU build of torch. Its import then fails
    with "operator torchvision::nms does not exist", although its models, transforms and data sets are written in Python
    and need no such operator. This function declares the missing operators and imports it again. Calling one still
    fails. ``submodule`` is a part to import instead, such as ``"transforms.v2"``.
    """
    name = f"torchvision.{submodule}" if submodule else "torchvision"
    try:
        try:
            return importlib.import_module(name)
        except RuntimeError:
            _declare_missing_operators()
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"torchvision is needed here ({error}); install: pip install 'syncbn[train]'") from error
    except (RuntimeError, AttributeError) as error:
        raise ImportError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); "
            "install the torchvision release that belongs to this torch"
        ) from error


def has_torchvision_operators() -> bool:
    """Whether torchvision's compiled operators, such as non-maximum suppression, can be called."""
    return bool(import_torchvision("extension")._has_ops())


def import_timm(submodule: str = "") -> Any:
    """Import timm, or a part of it such as ``"layers"``."""
    import_torchvision()  # timm imports it, and a torchvision that does not fit torch needs preparation
    try:
        return importlib.import_module(f"timm.{submodule}" if submodule else "timm")
    except ImportError as error:
        raise ImportError(f"timm is needed here ({error}); install: pip install 'syncbn[train]'") from error


def _declare_missing_operators() -> None:
    """Declare those for which torchvision registers a fake implementation even if its extension did not load."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
