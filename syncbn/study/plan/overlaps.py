"""Checks that each value of a run is set in one place only, so that none is silently overwritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from syncbn.study.plan.grid import Study, Sweep
from syncbn.train.config import ConfigError, require


def check_overlaps(study: Study, source: str) -> None:
    """Check that no two parts of a study set the same key.

    The base may set the key of an axis, which the axis then replaces. Nothing may set a key that the sweep sets.

    Raises:
        ConfigError: two parts set a key; the message names the file (``source``), the part and the key.
    """
    _check_axes(study, f"{source}: axes: axis")
    swept = _sweep_keys(study.sweep)
    for key, value in _leaves(study.base):
        inside = [axis for axis in study.grid if axis.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"{source}: base: {key}", value, f"a mapping, as the axis {inside[0]} lies in it")
        _check_swept(key, value, swept, f"{source}: base")
    for arm in study.arms:
        where = f"{source}: arms.{arm.name}.overrides"
        for key, value in _leaves(arm.overrides):
            axes = [axis for axis in study.grid if _overlap(key, axis)]
            if axes:
                raise ConfigError(f"{where}: {key}", value, f"no such key in an arm, as the axis {axes[0]} sets it")
            _check_swept(key, value, swept, where)


def _check_swept(key: str, value: object, swept: list[str], where: str) -> None:
    # A null in the budget is what the sweep itself sets.
    free = key not in swept or (value is None and key.startswith("budget."))
    require(free, f"{where}: {key}", value, "no such key here, as the sweep sets it")


def _check_axes(study: Study, where: str) -> None:
    names = list(study.grid)
    swept = _sweep_keys(study.sweep)
    if study.sweep is not None and study.sweep.kind == "coupled":
        swept += ["optimizer.lr_scaling"] + ["budget.epochs"] * ("steps" in study.sweep.hold)
    for number, name in enumerate(names):
        others = [other for other in names[:number] if _overlap(name, other)]
        if others:
            raise ConfigError(where, name, f"no such axis, as the axis {others[0]} sets the same")
        require(not any(_overlap(name, key) for key in swept), where, name, "no such axis, as the sweep sets it")


def _sweep_keys(sweep: Sweep | None) -> list[str]:
    """The keys that the sweep sets."""
    if sweep is None:
        return []
    if sweep.kind == "coupled":
        keys = ["per_gpu_batch_size"]
        keys += ["budget.steps"] if "steps" in sweep.hold else []
        return keys + ([] if "epochs" in sweep.hold else ["budget.epochs"])
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
