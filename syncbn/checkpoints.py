"""Checkpoints and options of other implementations in the terms of this package, and checkpoints back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Format = Literal["keras", "torchrl", "sb3", "batchrenorm"]


@dataclass(frozen=True)
class _Format:
    names: Mapping[str, str]
    """What its tensors are called here, by their names."""
    defaults: Mapping[str, Any]
    """Its options that matter here."""
    options: Callable[..., dict[str, Any]]
    """This package's options, from its own."""
    has_std: bool = False
    """Whether it keeps a standard deviation, which includes its eps."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The names by which a layer is known."""
        return tuple(name for name, ours in self.names.items() if ours in ("running_mean", "running_var"))


def _keras(momentum: float, epsilon: float) -> dict[str, Any]:
    return {"momentum": 1 - momentum, "eps": epsilon}


def _torchrl(
    momentum: float, eps: float, max_r: float, max_d: float, warmup_steps: int, smooth: bool
) -> dict[str, Any]:
    if smooth:
        raise ValueError("smooth must be False, got True: it weakens r and d themselves, which no limit does")
    return {"momentum": momentum, "eps": eps, "r_max": max_r, "d_max": max_d, **_switch(warmup_steps)}


def _sb3(momentum: float, eps: float, warmup_steps: int) -> dict[str, Any]:
    # Its corrections begin when the counter exceeds the number.
    return {"momentum": momentum, "eps": eps, "r_max": 3.0, "d_max": 5.0, **_switch(warmup_steps + 1)}


def _batchrenorm(momentum: float, eps: float) -> dict[str, Any]:
    # It adds eps to the standard deviation, of which no square is smaller than that of eps.
    ramps = {"warmup_steps": 5_000, "r_ramp_end": 40_000, "d_ramp_end": 25_000}
    return {"momentum": momentum, "eps": eps**2, "r_max": 3.0, "d_max": 5.0, **ramps}


def _switch(steps: int) -> dict[str, int]:
    return dict.fromkeys(("warmup_steps", "r_ramp_end", "d_ramp_end"), steps)


_TORCHS = {name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
_FORMATS: dict[str, _Format] = {
    "keras": _Format(
        {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"},
        {"momentum": 0.99, "epsilon": 1e-3},
        _keras,
    ),
    "torchrl": _Format(
        _TORCHS,
        {"momentum": 0.01, "eps": 1e-5, "max_r": 3.0, "max_d": 5.0, "warmup_steps": 10_000, "smooth": False},
        _torchrl,
    ),
    "sb3": _Format(
        {
            "scale": "weight",
            "bias": "bias",
            "ra_mean": "running_mean",
            "ra_var": "running_var",
            "steps": "num_batches_tracked",
        },
        {"momentum": 0.01, "eps": 1e-3, "warmup_steps": 100_000},
        _sb3,
    ),
    "batchrenorm": _Format(
        {("running_std" if name == "running_var" else name): name for name in _TORCHS},
        {"momentum": 0.01, "eps": 1e-3},
        _batchrenorm,
        has_std=True,
    ),
}
_COUNTERS = ("num_batches_tracked", "steps")
_KEY = re.compile(r"(?P<prefix>(?:.*[./])?)(?P<name>[^./:]+)(?::\d+)?")
"""`stage1/bn/gamma:0` is `gamma` of the layer `stage1/bn`."""


def translate_state(
    state: Mapping[str, Any], *, source: Format | None = None, target: Format | None = None, eps: float | None = None
) -> dict[str, Any]:
    """The tensors of another implementation with the names and the meaning that this package's layers load, or back.

    ====================  ============================================================================================
    format                tensors of a layer
    ====================  ============================================================================================
    ``"keras"``           ``gamma``, ``beta``, ``moving_mean``, ``moving_variance``
    ``"torchrl"``         those of torch; torchrl's ``BatchRenorm1d``
    ``"sb3"``             ``scale``, ``bias``, ``ra_mean``, ``ra_var``, ``steps``; ``BatchRenorm`` of sb3-contrib
    ``"batchrenorm"``     those of torch, but ``running_std`` with eps in it; ludvb/batchrenorm and its many copies
    ====================  ============================================================================================

    A layer is found by its running statistics; what is before these names in a key (``stage1/bn/`` or ``stage1.bn.``)
    stays as it is, as do all other keys. In evaluation both implementations then compute the same, if the layer here
    has the options of :func:`translate_options`.

    Args:
        state: tensors or arrays by name, (C,) each; it is not changed.
        source: the format that ``state`` has.
        target: the format to write, from a state of this package or torch. Give either ``source`` or ``target``.
        eps: of this package's layer, for ``"batchrenorm"``: ``running_var`` is ``running_std**2 - eps``.

    Returns:
        A new dictionary of tensors. From Keras, a layer that has only one of gamma and beta gets the other, as ones or
        zeros, and the step counter begins at 0.

    Raises:
        ValueError: a format is not known, or ``state`` has no layer of it; the tensors of a layer differ in shape;
            ``eps`` is missing, or larger than the square of a standard deviation.

    Example:
        >>> import syncbn
        >>> keras = {"gamma": [1.0, 2.0], "beta": [0.0, 0.0], "moving_mean": [0.5, 0.5], "moving_variance": [1.0, 4.0]}
        >>> layer = syncbn.SyncBatchNorm(2, **translate_options("keras", epsilon=1e-3))
        >>> layer.load_state_dict(translate_state(keras, source="keras"))
        <All keys matched successfully>
    """
    if (source is None) == (target is None):
        raise ValueError(f"expected either source or target, got source={source!r} and target={target!r}")
    known = _known(source if target is None else target)
    if known.has_std == (eps is None):
        raise ValueError(f"eps must be {'given' if known.has_std else 'left out'} with this format, got {eps!r}")
    translate = _from_theirs if target is None else _to_theirs
    names, needed = (known.names, known.needed) if target is None else (_TORCHS, ("running_mean", "running_var"))
    layers = {prefix: keys for prefix, keys in _keys(state, names).items() if set(needed) <= keys.keys()}
    if not layers:
        raise ValueError(f"expected a layer with {' and '.join(needed)}, got the names {', '.join(list(state)[:8])}")
    read = {key for keys in layers.values() for key in keys.values()}
    found = {key: value for key, value in state.items() if key not in read}
    for prefix, keys in layers.items():
        tensors = {name: torch.as_tensor(state[key]) for name, key in keys.items()}
        try:
            _check_shapes(tensors, needed[0])
            found |= {prefix + name: tensor for name, tensor in translate(tensors, known, eps).items()}
        except ValueError as error:
            raise ValueError(f"{prefix or 'the layer'}: {error}") from error
    return found


def translate_options(source: Format, **options: Any) -> dict[str, Any]:
    """The options of another implementation's layer, as those of this package's.

    - ``"keras"``: ``momentum``, the weight of the *old* value there (0.99 is 0.01 here), and ``epsilon``.
    - ``"torchrl"``: ``momentum``, ``eps``, ``max_r``, ``max_d``, ``warmup_steps``. The limits hold from that step on.
      From twice that step on, torchrl multiplies r - 1 and d by 2, then by 3, and so on; here the limits stay.
    - ``"sb3"``: ``momentum``, ``eps``, ``warmup_steps``; the limits are 3 and 5.
    - ``"batchrenorm"``: ``momentum``, ``eps``; the limits and ramps are the paper's. eps is added to the standard
      deviation there, and its square to the variance here, which differs in training where the variance is as small.

    Training goes on with these limits of r and d, from the step that the checkpoint has. Details differ: this package
    normalizes by the biased variance and averages the unbiased one, as torch and torchrl do. Keras averages the biased
    variance, ``"batchrenorm"`` the standard deviation, and ``"sb3"`` normalizes by the unbiased variance.

    Args:
        source: a format of :func:`translate_state`.
        options: those that the layer was made with. Others are as that implementation has them by default.

    Returns:
        Options of :class:`~syncbn.BatchRenorm`, or for Keras of any layer; also for :func:`syncbn.convert`.

    Raises:
        ValueError: the format is not known or has no such option; or torchrl's ``smooth`` is True, which has no
            counterpart.

    Example:
        >>> translate_options("torchrl", warmup_steps=1000)["r_ramp_end"]
        1000
    """
    known = _known(source)
    for name, value in options.items():
        if name not in known.defaults:
            raise ValueError(f"{source} has no option {name!r} (got {name}={value!r}) of {', '.join(known.defaults)}")
    return known.options(**{**known.defaults, **options})


def _known(name: Any) -> _Format:
    if name not in _FORMATS:
        raise ValueError(f"the format must be one of {', '.join(map(repr, _FORMATS))}, got {name!r}")
    return _FORMATS[name]


def _keys(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The keys of ``state`` that end in one of ``names``: by what is before the name, and by the name."""
    found: dict[str, dict[str, str]] = {}
    for key in state:
        match = _KEY.fullmatch(key)
        if match and match["name"] in names:
            found.setdefault(match["prefix"], {})[match["name"]] = key
    return found


def _check_shapes(tensors: Mapping[str, Tensor], mean: str) -> None:
    """Refuse a layer whose tensors are not (C,), as those of another kind of layer with these names."""
    wanted = tensors[mean].shape
    for name, tensor in {mean: tensors[mean], **tensors}.items():
        if name not in _COUNTERS and (tensor.dim() != 1 or tensor.shape != wanted):
            beside = f" beside a {mean} of {tuple(wanted)}" if name != mean else ""
            got = f"{tuple(tensor.shape)}{beside}"
            raise ValueError(f"{name} must have the shape (C,), a value for each channel, got {got}")


def _from_theirs(tensors: dict[str, Tensor], known: _Format, eps: float | None) -> dict[str, Tensor]:
    ours = {known.names[name]: tensor for name, tensor in tensors.items()}
    if eps is not None:
        std = ours["running_var"]
        var = std.double() ** 2 - eps
        if not (var > -1e-6 * eps).all():  # what rounding of a float32 deviation may take from a variance of 0
            least = float(std.min())
            raise ValueError(f"eps must be at most the square of each running_std, got {eps!r} and a {least!r} there")
        ours["running_var"] = var.clamp(min=0).to(std.dtype)
    if ("weight" in ours) != ("bias" in ours):
        mean = ours["running_mean"]
        ours = {"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean)} | ours
    return ours if "num_batches_tracked" in ours else {**ours, "num_batches_tracked": torch.tensor(0)}


def _to_theirs(tensors: dict[str, Tensor], known: _Format, eps: float | None) -> dict[str, Tensor]:
    if eps is not None:
        var = tensors["running_var"]
        tensors = {**tensors, "running_var": (var.double() + eps).sqrt().to(var.dtype)}
    return {theirs: tensors[ours] for theirs, ours in known.names.items() if ours in tensors}
