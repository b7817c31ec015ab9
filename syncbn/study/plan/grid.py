"""A study as a grid: arms over a sweep and further axes, and seeds; resolved into keyed runs.

A *setting* is an arm at a point of the axes; a *cell* is a setting with a seed. Two cells with the same resolved
configuration are one run: an arm that a sweep does not touch (GroupNorm does not see how a batch is cut) is run once,
and its result stands at every point.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from syncbn.study.plan.contrasts import Contrast
from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.config_io import config_from_dict, config_to_dict

KEY_LENGTH = 16
"""Hexadecimal digits of a cell's key (64 bits: no accidental collision among any number of runs one can pay for)."""

Vary = Literal["per_gpu_batch_size", "ghost_batch_size", "sync_group_size"]
Value = int | float | str | bool | None
Point = tuple[tuple[str, Value], ...]
"""A place on the axes: (name, value) in the order of :attr:`Study.axes`."""

HOLD = "hold"
"""Name of the axis of a coupled sweep that is run both at constant epochs and at constant steps."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of normalizing under comparison."""

    name: str
    """Short name, used in files and commands."""
    label: str
    """Name in tables and plots."""
    overrides: dict[str, Any]
    """What differs from the study's base configuration, as a nested mapping."""
    reference: bool = False
    """The arm that the others are measured against (at most one)."""
    only: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Values of an axis at which this arm is run; an axis that is not named is run in full."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How the normalization batch is varied.

    ``decoupled`` isolates normalization: global batch, learning rate and steps stay as they are, and the same global
    batches are cut otherwise. ``coupled`` is the protocol of Wu and He 2018 (Group Normalization, arXiv 1803.08494,
    section 4.1): the batch on each GPU varies, and the global batch and the learning rate with it.
    """

    kind: Literal["decoupled", "coupled"] = "decoupled"
    vary: Vary = "per_gpu_batch_size"
    values: tuple[int, ...]
    global_batch_size: int | None = None
    """Decoupled over ``per_gpu_batch_size``: images in a forward pass over all logical GPUs."""
    hold: tuple[Literal["epochs", "steps"], ...] = ("epochs",)
    """Coupled: what stays constant while the batch varies; with both, the whole sweep is run for each."""
    steps: int | None = None
    """Coupled, with ``steps`` held: optimizer steps of every run."""


@dataclass(frozen=True, kw_only=True)
class RepeatDistributed:
    """The one cell that is repeated under real processes, to check the emulation of logical GPUs."""

    arm: str
    seed: int
    processes: int
    at: dict[str, Value] = field(default_factory=dict)
    """Place on the axes; an axis that is not named is at the arm's first value."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the arms that answer it, the axes they are run along, and the seeds of each setting."""

    name: str
    title: str
    question: str
    base: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    sweep: Sweep | None = None
    grid: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Further axes: a dotted key of the run configuration, and its values."""
    contrasts: tuple[Contrast, ...] = ()
    """The planned comparisons, which are the family over which the tests are corrected."""
    repeat_distributed: RepeatDistributed | None = None
    notes: str | None = None
    """What a reader of the main figure should know besides, such as why it differs from a published one."""

    @property
    def reference(self) -> Arm | None:
        """The reference arm, if the study names one."""
        return next((arm for arm in self.arms if arm.reference), None)

    @property
    def axes(self) -> dict[str, tuple[Value, ...]]:
        """All axes by name, the sweep's first; empty for a plain comparison of arms."""
        found: dict[str, tuple[Value, ...]] = {}
        if self.sweep is not None:
            found[self.sweep.vary] = self.sweep.values
            if len(self.sweep.hold) > 1:
                found[HOLD] = self.sweep.hold
        return found | self.grid

    def points(self, arm: Arm) -> list[Point]:
        """The places at which an arm is run, in the order of the axes."""
        choices = [
            [(name, value) for value in values if name not in arm.only or value in arm.only[name]]
            for name, values in self.axes.items()
        ]
        return list(product(*choices))

    def comparison_point(self) -> Point:
        """The place to show arms side by side: that of the first contrast between arms, or the axes' first values."""
        for contrast in self.contrasts:
            if contrast.first.point == contrast.second.point:
                return contrast.first.point
        return tuple((name, values[0]) for name, values in self.axes.items())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study: a setting with a seed, resolved into a full run configuration."""

    arm: str
    seed: int
    point: Point = ()
    config: RunConfig
    key: str
    """Hash of ``config``: an unchanged cell keeps its key and is not run again, a changed one is a new cell."""

    @property
    def label(self) -> str:
        """Name of the cell in messages."""
        return ", ".join([self.arm, *(f"{name} {value}" for name, value in self.point), f"seed {self.seed}"])


def study_cells(study: Study, source: str | None = None) -> list[Cell]:
    """The runs of a study, setting by setting within each seed: a study cut short has compared all on some seeds.

    Seeds are paired: a cell's seed is its run's seed, so all arms of one seed share initial weights, data order and
    augmentation as far as their configurations allow.

    Raises:
        ConfigError: a setting's configuration is impossible; the message names the arm and the key.
    """
    where = source or study.name
    parsed: _Parsed = {}
    settings = [(arm, point) for arm in study.arms for point in study.points(arm)]
    configs = [_resolve(study, arm, point, where, parsed) for arm, point in settings]
    return [
        _seeded(arm, point, config, seed)
        for seed in study.seeds
        for (arm, point), config in zip(settings, configs, strict=True)
    ]


def unique_cells(cells: list[Cell]) -> list[Cell]:
    """One cell for each key, the first: the runs there are to do."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.key, cell)
    return list(found.values())


def repeated_cell(study: Study, cells: list[Cell]) -> Cell | None:
    """The cell that the study repeats under real processes; None where it names none."""
    repeat = study.repeat_distributed
    return None if repeat is None else cell_to_repeat(repeat, cells)


def cell_to_repeat(repeat: RepeatDistributed, cells: Sequence[Cell]) -> Cell | None:
    """The first cell at the place that a repeat names; None where there is none."""
    places = (c for c in cells if (c.arm, c.seed) == (repeat.arm, repeat.seed))
    return next((c for c in places if all(dict(c.point).get(k) == v for k, v in repeat.at.items())), None)


def cell_key(config: RunConfig) -> str:
    """Hash of a resolved run configuration: ``KEY_LENGTH`` hexadecimal digits of the sha256 of its canonical JSON."""
    content = json.dumps(_canonical(config_to_dict(config)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides`` laid over it, section by section; neither is changed."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


_Parsed = dict[str, RunConfig]
"""Configurations by the values they were made of: settings that differ for other arms alone are parsed once."""


def _resolve(study: Study, arm: Arm, point: Point, source: str, parsed: _Parsed) -> RunConfig:
    """The configuration of a setting, with a seed that means nothing."""
    values = merge(study.base, arm.overrides)
    if "seed" in values:
        raise ConfigError(f"{source}: arm {arm.name}: seed", values["seed"], "no seed here: the study's `seeds` set it")
    at = dict(point)
    where = f"{source}: arm {arm.name}" + "".join(f", {name} {value}" for name, value in point)
    for name in study.grid:
        values = merge(values, _nested(name, at[name]))
    if study.sweep is not None:
        config = _config(merge(values, _any_place(study.sweep, values)), where, parsed)
        if study.sweep.kind == "coupled" and at.get(HOLD, study.sweep.hold[0]) == "epochs":
            epochs = config.budget.epochs
            if epochs is None:
                raise ConfigError(f"{where}: budget.epochs", epochs, "a number of epochs, as the sweep holds them")
        values = merge(values, _swept(study.sweep, config, at))
    return _config(values, where, parsed)


def _any_place(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that a sweep sets itself, so that an arm which leaves them open can be read before they are known."""
    norm = values.get("norm")
    if sweep.vary == "ghost_batch_size":
        ghost = isinstance(norm, Mapping) and norm.get("name") == "ghost"
        return {"norm": {"ghost_batch_size": sweep.values[0]}} if ghost else {}
    whole = sweep.global_batch_size
    return {} if whole is None else {"gpus": 1, "per_gpu_batch_size": whole, "sync_group_size": None}


def _swept(sweep: Sweep, config: RunConfig, at: Mapping[str, Value]) -> dict[str, Any]:
    """What a point of the sweep sets in a configuration; nothing, where the arm's normalization does not see it."""
    value = at[sweep.vary]
    assert isinstance(value, int), "checked when the study was read"
    if sweep.kind == "coupled":
        hold = at.get(HOLD, sweep.hold[0])
        scaling = config.optimizer.lr_scaling if config.optimizer.lr_scaling != "none" else "linear"
        budget = {"epochs": None, "steps": sweep.steps} if hold == "steps" else {}
        return {"per_gpu_batch_size": value, "optimizer": {"lr_scaling": scaling}, "budget": budget}
    if sweep.vary == "per_gpu_batch_size":
        assert sweep.global_batch_size is not None, "checked when the study was read"
        if config.normalization_batch_size is None:
            value = sweep.global_batch_size
        return {"gpus": sweep.global_batch_size // value, "per_gpu_batch_size": value}
    if sweep.vary == "ghost_batch_size":
        return {"norm": {"ghost_batch_size": value}} if config.norm.name == "ghost" else {}
    return {"sync_group_size": value} if config.norm.synchronized else {}


def _nested(dotted: str, value: Value) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _seeded(arm: Arm, point: Point, config: RunConfig, seed: int) -> Cell:
    config = replace(config, seed=seed)
    return Cell(arm=arm.name, seed=seed, point=point, config=config, key=cell_key(config))


def _config(values: dict[str, Any], where: str, parsed: _Parsed) -> RunConfig:
    name = repr(values)
    if name not in parsed:
        try:
            parsed[name] = config_from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.key}", error.value, error.expected) from None
    return parsed[name]


def _canonical(value: Any) -> Any:
    """Lists for tuples, and 1 for 1.0: how a number was written in the file must not make a new cell."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
