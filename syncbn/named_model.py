"""A model by name, with random weights, and inputs for it: from timm, torchvision, transformers or the user's code."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from syncbn.compat import import_timm, import_torchvision
from syncbn.train.config import ConfigError, LocalError, meant, require
from syncbn.train.tasks.named import TaskError, find

Shape = tuple[int, ...]
"""Of one input: (C, H, W), or (C, T, H, W) for videos."""
_FRAMES = 16


@dataclass(frozen=True)
class NamedModel:
    name: str
    """With the library or the module that it comes from."""
    model: nn.Module
    inputs: Any
    """A tensor, a tuple of arguments or a dictionary of keyword arguments for ``model``."""

    def call(self, model: nn.Module, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def build(name: str, batch_size: int, input_size: int | None) -> NamedModel:
    """The model ``name``, and a batch for it.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``transformers:NAME``, where the last is a type of model such as
            ``resnet``; a bare NAME, looked up in this order; or ``MODULE:FUNCTION``, where the function returns a model
            for images, or a model and its inputs.
        input_size: height and width of the images. None is what the model was made for.

    Raises:
        ConfigError: there is no such model, or it cannot be made or takes no images.
        TaskError: the user's function raised an error.
    """
    library, colon, rest = name.partition(":")
    if colon and library not in _LIBRARIES:
        return _from_function(name, batch_size, input_size or 224)
    missing = []
    for key in [library] if colon else list(_LIBRARIES):
        try:
            made = _LIBRARIES[key](rest if colon else name, input_size)
        except ImportError as error:
            if colon:
                raise
            missing.append(f"{key} ({error})")
            continue
        if made is not None:
            model, shape = made
            generator = torch.Generator().manual_seed(1)
            return NamedModel(f"{key}:{rest or library}", model, torch.randn(batch_size, *shape, generator=generator))
    looked = f"the name of a model of {library}" if colon else f"a model of {', '.join(_LIBRARIES)}, or MODULE:FUNCTION"
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    raise ConfigError(
        "model", name, looked + absent + meant(rest or library, _names(library if colon else None), most=5)
    )


def _from_function(name: str, batch_size: int, size: int) -> NamedModel:
    make = find(name, "model")
    try:
        made = make()
    except (ConfigError, LocalError):
        raise
    except Exception as error:  # whatever the user's code raises
        raise TaskError(f"model {name}: the function raised {type(error).__name__}: {_first_line(error)}") from error
    if isinstance(made, nn.Module):
        generator = torch.Generator().manual_seed(1)
        return NamedModel(name, made, torch.randn(batch_size, 3, size, size, generator=generator))
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)
    require(
        pair, "model", name, f"a function that returns a model, or a model and its inputs, not {type(made).__name__}"
    )
    return NamedModel(name, *made)


def _timm(name: str, size: int | None) -> tuple[nn.Module, Shape] | None:
    timm: Any = import_timm()
    if not timm.is_model(name):
        return None
    usual = timm.models.get_pretrained_cfg(name)
    channels, height, width = (3, 224, 224) if usual is None else usual.input_size
    options = {"img_size": size} if size and usual is not None and usual.fixed_input_size else {}
    model = _made("timm", name, lambda: timm.create_model(name, pretrained=False, **options))
    return model, (channels, size or height, size or width)


def _torchvision(name: str, size: int | None) -> tuple[nn.Module, Shape] | None:
    models: Any = import_torchvision("models")
    if name not in models.list_models():
        return None
    module = models.get_model_builder(name).__module__
    expected = "no detector, which takes targets; give MODULE:FUNCTION, which returns the model and its inputs"
    require(".detection." not in module, "model", f"torchvision:{name}", expected)
    # They would draw their weights from a truncated normal distribution, which takes long.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    weights = models.get_model_weights(name)
    usual = getattr(weights.DEFAULT.transforms, "keywords", {}).get("crop_size", 224)
    height, width = (usual, usual) if isinstance(usual, int) else usual
    model = _made("torchvision", name, lambda: models.get_model(name, weights=None, **options))
    frames = (_FRAMES,) if ".video." in module else ()
    return model, (3, *frames, size or height, size or width)


def _transformers(name: str, size: int | None) -> tuple[nn.Module, Shape] | None:
    import_torchvision()  # transformers imports it
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers is needed here ({error}); install: pip install transformers") from error
    if name not in transformers.CONFIG_MAPPING:
        return None
    config = transformers.AutoConfig.for_model(name)
    auto: Any = transformers.AutoModel
    model = _made("transformers", name, lambda: auto.from_config(config))
    takes = getattr(model, "main_input_name", None)
    expected = f"a model of images, not of {takes}; give MODULE:FUNCTION, which returns the model and its inputs"
    require(takes == "pixel_values", "model", f"transformers:{name}", expected)
    usual = getattr(config, "image_size", None) or 224
    height, width = (usual, usual) if isinstance(usual, int) else usual
    return model, (getattr(config, "num_channels", 3), size or height, size or width)


_LIBRARIES: dict[str, Callable[[str, int | None], tuple[nn.Module, Shape] | None]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _names(library: str | None) -> list[str]:
    """Names that a misspelt one may stand for; transformers' few types of models are short, and left out."""
    found: list[str] = []
    with contextlib.suppress(ImportError):
        if library in (None, "timm"):
            found += import_timm().list_models()
        if library in (None, "torchvision"):
            found += import_torchvision("models").list_models()
    return list(dict.fromkeys(found))


def _made(library: str, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights that were not asked for
            return make()
    except Exception as error:  # whatever the library's code raises
        expected = f"a model that can be made with random weights ({_first_line(error)})"
        raise ConfigError("model", f"{library}:{name}", expected) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
