"""A study as a grid of runs: arms, over the values of the axes, over seeds.

A *setting* is an arm at one point of the axes; a *cell* is a setting with a seed. Cells that resolve to the same run
configuration are trained once: GroupNorm does not depend on how the batch is divided among GPUs, so one of its runs
serves every point of such a sweep.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from syncbn.train.config import ConfigError, RunConfig, config_from_dict, config_to_dict
from syncbn.train.result import RunResult

KEY_LENGTH = 16
"""Hexadecimal digits of a cell's key. 64 bits rule out accidental collisions."""

State = Literal["missing", "running", "done", "diverged", "failed"]
"""State of a cell, wherever one is named: in files, messages and reports."""

Vary = Literal["per_gpu_batch_size", "ghost_batch_size", "sync_group_size"]
Value = int | float | str | bool | None
Point = tuple[tuple[str, Value], ...]
"""A place on the axes: (name, value) pairs in the order of :attr:`Study.axes`."""

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
    """Whether the other arms are compared with this one (at most one arm)."""
    only: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Values of an axis at which this arm is run; it is run at all values of an axis that is not named."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How the normalization batch is varied.

    ``decoupled`` changes normalization alone: global batch, learning rate and steps stay the same, and the same global
    batches are divided differently. ``coupled`` is the protocol of Wu and He 2018 (Group Normalization, arXiv
    1803.08494, section 4.1): the batch on each GPU varies, and the global batch and the learning rate with it.
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


@dataclass(frozen=True)
class Place:
    """An arm at a point of the axes."""

    arm: str
    point: Point


@dataclass(frozen=True)
class Contrast:
    """Error at ``first`` minus error at ``second``; with ``minus``, minus the same difference there."""

    name: str  # unique within the study; made of the arms and of the values that differ
    first: Place
    second: Place
    minus: tuple[Place, Place] | None = None
    margin: float | None = None
    """Error (a fraction of the test images) by which ``first`` may exceed ``second`` and still count as no worse."""

    @property
    def places(self) -> tuple[Place, ...]:
        """All places whose runs the contrast needs: two, or four with ``minus``."""
        return (self.first, self.second, *(self.minus or ()))


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The exact check of one cell: its training must not depend on the number of processes (``syncbn parity``)."""

    arm: str
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes that train the cell; the others are compared with the first."""
    steps: int = 8
    """Optimizer steps, in float64."""
    at: dict[str, Value] = field(default_factory=dict)
    """Place on the axes; an axis that is not named is at the arm's first value."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the arms that answer it, the axes along which they are run, and the seeds of each setting.

    Example:
        >>> from syncbn.study import load_study
        >>> study = load_study("quickstart")
        >>> [arm.name for arm in study.arms]
        ['batch', 'sync', 'renorm', 'group', 'batch_iid']
        >>> study.reference.label
        'Local BatchNorm on i.i.d. data'
    """

    name: str
    title: str
    question: str
    base: dict[str, Any]
    """Run configuration that all arms share, as a nested mapping."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    sweep: Sweep | None = None
    grid: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Further axes: a dotted key of the run configuration, and its values."""
    contrasts: tuple[Contrast, ...] = ()
    """The planned comparisons, which are the family over which the tests are corrected."""
    parity: Parity | None = None
    notes: str | None = None
    """A remark for the reader of the main figure, such as why it differs from a published one."""

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
        """The points of the axes at which an arm is run."""
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
    """Hash of ``config``. A cell whose configuration changes has another key and is run again."""

    @property
    def label(self) -> str:
        """Name of the cell in messages."""
        return ", ".join([self.arm, *(f"{name} {value}" for name, value in self.point), f"seed {self.seed}"])


def study_cells(study: Study, source: str | None = None) -> list[Cell]:
    """The cells of a study, all settings of the first seed first, so that an interrupted study has compared all arms.

    Seeds are paired: a cell's seed is its run's seed, so all arms of one seed share initial weights, data order and
    augmentation as far as their configurations allow.

    Raises ConfigError if a setting has an impossible configuration; the message names ``source`` (by default the
    study's name), the arm and the key.
    """
    where = source or study.name
    parsed: dict[str, RunConfig] = {}  # by the values they are parsed from: parsing is slow, and settings share values
    settings = [(arm, point) for arm in study.arms for point in study.points(arm)]
    configs = [_resolve(study, arm, point, where, parsed) for arm, point in settings]
    cells = []
    for seed in study.seeds:
        for (arm, point), config in zip(settings, configs, strict=True):
            seeded = replace(config, seed=seed)
            cells.append(Cell(arm=arm.name, seed=seed, point=point, config=seeded, key=cell_key(seeded)))
    return cells


def unique_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each key: the runs to be trained."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.key, cell)
    return list(found.values())


def parity_cell(parity: Parity, cells: Sequence[Cell]) -> Cell | None:
    """The first cell at the place that a parity check names; None if no cell is there."""
    return next((c for c in cells if c.arm == parity.arm and parity.at.items() <= dict(c.point).items()), None)


def state_of(result: RunResult) -> State:
    """State of a cell whose run has a result: ``done`` or ``diverged``."""
    return "diverged" if result.status == "diverged" else "done"


def cell_key(config: RunConfig) -> str:
    """The first ``KEY_LENGTH`` hexadecimal digits of the SHA-256 of a run configuration's canonical JSON.

    A number is an integer there if it can be, so that 1 and 1.0 give the same key.
    """

    def number(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() else value

    values = json.loads(json.dumps(config_to_dict(config), allow_nan=False), parse_float=number)
    content = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping: ``base`` with the values of ``overrides`` in place of its own, section by section."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _resolve(study: Study, arm: Arm, point: Point, source: str, parsed: dict[str, RunConfig]) -> RunConfig:
    """The configuration of a setting, before a seed is set."""
    values = merge(study.base, arm.overrides)
    if "seed" in values:
        raise ConfigError(f"{source}: arm {arm.name}: seed", values["seed"], "no seed here: the study's `seeds` set it")
    at = dict(point)
    where = f"{source}: arm {arm.name}" + "".join(f", {name} {value}" for name, value in point)
    for name in study.grid:
        values = merge(values, _nested(name, at[name]))
    if study.sweep is not None:
        config = _parse(merge(values, _any_place(study.sweep, values)), where, parsed)
        values = merge(values, _swept(study.sweep, config, at, where))
    return _parse(values, where, parsed)


def _any_place(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Stand-ins for the values that the sweep sets, so that an arm can be parsed before they are known."""
    norm = values.get("norm")
    if sweep.vary == "ghost_batch_size":
        ghost = isinstance(norm, Mapping) and norm.get("name") == "ghost"
        return {"norm": {"ghost_batch_size": sweep.values[0]}} if ghost else {}
    whole = sweep.global_batch_size
    return {} if whole is None else {"gpus": 1, "per_gpu_batch_size": whole, "sync_group_size": None}


def _swept(sweep: Sweep, config: RunConfig, at: Mapping[str, Value], where: str) -> dict[str, Any]:
    """The values that a point of the sweep sets; none if the arm's normalization does not depend on it."""
    value = at[sweep.vary]
    assert isinstance(value, int)
    if sweep.kind == "coupled":
        hold = at.get(HOLD, sweep.hold[0])
        if hold == "epochs" and config.budget.epochs is None:
            raise ConfigError(f"{where}: budget.epochs", None, "a number of epochs, as the sweep holds them")
        scaling = config.optimizer.lr_scaling if config.optimizer.lr_scaling != "none" else "linear"
        budget = {"epochs": None, "steps": sweep.steps} if hold == "steps" else {}
        return {"per_gpu_batch_size": value, "optimizer": {"lr_scaling": scaling}, "budget": budget}
    if sweep.vary == "per_gpu_batch_size":
        assert sweep.global_batch_size is not None
        if config.normalization_batch_size is None:
            value = sweep.global_batch_size
        return {"gpus": sweep.global_batch_size // value, "per_gpu_batch_size": value}
    if sweep.vary == "ghost_batch_size":
        return {"norm": {"ghost_batch_size": value}} if config.norm.name == "ghost" else {}
    return {"sync_group_size": value} if config.norm.synchronized else {}


def _nested(dotted: str, value: Value) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _parse(values: dict[str, Any], where: str, parsed: dict[str, RunConfig]) -> RunConfig:
    name = repr(values)
    if name not in parsed:
        try:
            parsed[name] = config_from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.key}", error.value, error.expected) from None
    return parsed[name]
