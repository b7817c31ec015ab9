"""Checks that each value of a run is set in one place only, so that none is silently overwritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from syncbn.study.plan.grid import Study, Sweep
from syncbn.train.config import ConfigError


def check_overlaps(study: Study, source: str) -> None:
    """Check that no two parts of a study set the same key.

    The base may set the key of an axis, which the axis then replaces. Nothing may set a key that the sweep sets.

    Raises:
        ConfigError: two parts set a key; the message names the file (``source``), the part and the key.
    """
    _check_axes(study, source)
    base = list(_leaves(study.base))
    for key, value in base:
        inside = [axis for axis in study.grid if axis.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"{source}: base: {key}", value, f"a mapping, as the axis {inside[0]} lies in it")
    arms = [(f"{source}: arms.{arm.name}.overrides", list(_leaves(arm.overrides))) for arm in study.arms]
    for where, values in arms:
        for key, value in values:
            axis = next((axis for axis in study.grid if _overlap(key, axis)), None)
            if axis is not None:
                raise ConfigError(f"{where}: {key}", value, f"no such key in an arm, as the axis {axis} sets it")
    if study.sweep is None:
        return
    taken = _sweep_keys(study.sweep)
    for where, values in [(f"{source}: base", base), *arms]:
        for key, value in values:
            # A null in the budget is what the sweep itself sets.
            if key in taken and not (value is None and key.startswith("budget.")):
                raise ConfigError(f"{where}: {key}", value, "no such key here, as the sweep sets it")


def _check_axes(study: Study, source: str) -> None:
    names = list(study.grid)
    for number, name in enumerate(names):
        other = next((other for other in names[:number] if _overlap(name, other)), None)
        if other is not None:
            raise ConfigError(f"{source}: axes: axis", name, f"no such axis, as the axis {other} sets the same")
        if study.sweep is None:
            continue
        coupled = study.sweep.kind == "coupled"
        taken = _sweep_keys(study.sweep) + (["optimizer.lr_scaling"] if coupled else [])
        if coupled and "steps" in study.sweep.hold:
            taken += ["budget.epochs"]
        if any(_overlap(name, key) for key in taken):
            raise ConfigError(f"{source}: axes: axis", name, "no such axis, as the sweep sets it")


def _sweep_keys(sweep: Sweep) -> list[str]:
    """The keys that the sweep sets."""
    if sweep.kind == "coupled":
        keys = ["per_gpu_batch_size"]
        if "steps" in sweep.hold:
            keys.append("budget.steps")
        if "epochs" not in sweep.hold:
            keys.append("budget.epochs")
        return keys
    if sweep.vary == "per_gpu_batch_size":
        return ["gpus", "per_gpu_batch_size"]
    return ["norm.ghost_batch_size"] if sweep.vary == "ghost_batch_size" else ["sync_group_size"]


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping with its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
